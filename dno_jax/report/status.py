"""What `dno status` shows of a directory."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from dno_jax.config import SftConfig
from dno_jax.report import verify as verification
from dno_jax.report.summary import fine_tuning_table, iteration_table, policy_table, stage_statuses, status_table
from dno_jax.report.training import training_table
from dno_jax.run_dir import RunDir


def tables(folder: RunDir, *, verify: bool = False) -> Iterator[RenderableType]:
    """Yield a run's tables, or those of a fine-tuning.

    Args:
        verify: read everything first, and hold it to its digests.

    Raises:
        DnoError: there is no run, or something is not as it was written.
    """
    trainings = training_table(folder)
    if folder.kind() is SftConfig:
        yield fine_tuning_table(folder)
    else:
        settings = folder.load_config()
        if verify:
            verification.check(folder, settings)
        yield status_table(stage_statuses(folder, settings))
        yield policy_table(folder, iterations=settings.iterations)
        yield iteration_table(folder, settings)
    if trainings is not None:
        yield trainings
