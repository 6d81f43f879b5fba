"""The arguments of a recipe, which most commands take, and how one is read and run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dno_jax import stopping

if TYPE_CHECKING:
    from dno_jax.config import RunConfig

Config = Annotated[
    Path,
    typer.Argument(help="a YAML file (see configs/); relative paths in it start at its folder", show_default=False),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="fields to set, such as sampling.num_samples=8", show_default=False)
]
With = Annotated[
    list[Path] | None,
    typer.Option("--with", metavar="YAML", help="lay a variant's changes over CONFIG (see configs/variants)"),
]
Iteration = Annotated[int, typer.Option(help="which iteration, from 0")]


def load(path: Path, overrides: list[str] | None, variants: list[Path] | None, *, kind: str = "RunConfig") -> Any:
    from dno_jax import config

    settings = config.load_config(getattr(config, kind), path, overrides or [], variants=variants or [])
    stopping.allow(settings.grace_seconds)
    return settings


def stage_settings(
    name: str, config: Path, overrides: list[str] | None, variants: list[Path] | None, iteration: int
) -> RunConfig:
    """Read the configuration of a command that runs one stage.

    Raises:
        DnoError: the run has no such iteration, or the iteration no such stage.
    """
    from dno_jax.errors import DnoError
    from dno_jax.stage_dir import stage_names

    settings = load(config, overrides, variants)
    if not 0 <= iteration < settings.iterations:
        raise DnoError(f"--iteration is {iteration}; the configuration has iterations 0 to {settings.iterations - 1}")
    if name not in stage_names(settings, iteration):
        raise DnoError(
            f"iteration {iteration} has no stage {name!r} under outer.scheme={settings.outer.scheme}; "
            f"it has {', '.join(stage_names(settings, iteration))}"
        )
    return settings


def run_on_devices(name: str, module: str, settings: RunConfig, iteration: int) -> None:
    import importlib

    from dno_jax.parallel.cluster import is_primary
    from dno_jax.report.page import refresh
    from dno_jax.runtime.runtime import Runtime
    from dno_jax.stages.preflight import prepared

    stage, runtime = importlib.import_module(f"dno_jax.stages.{module}"), Runtime.start(settings)
    with prepared(runtime, only=(name, iteration)):
        stage.run(runtime, iteration)
        if is_primary():
            refresh(runtime.run_dir, runtime.config, held_out=runtime.prompts.split.held_out)
