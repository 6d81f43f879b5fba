"""How good the judge of an iteration is: reported after judging, and kept in the metrics."""

from __future__ import annotations

from typing import Any

from dno_jax.annotation.quality.figures import Quality, scalars
from dno_jax.annotation.quality.warnings import warnings
from dno_jax.config import AnnotationSection
from dno_jax.console import console
from dno_jax.report.judge import quality_table
from dno_jax.run_dir import RunDir


def tell_quality(run_dir: RunDir, quality: Quality, section: AnnotationSection, *, iteration: int) -> dict[str, Any]:
    """Say how good a judge is, leave its figures in the metrics, and return the manifest's details of it."""
    if section.nobody_judges:  # what a table says by definition has no quality
        return {"quality": {}, "warnings": []}
    figures = quality.figures()
    found = warnings(figures, section.quality)
    if section.judges or section.on_devices or section.kind == "python":  # what is embedded need not be watched
        console.print(quality_table(figures, section.quality, iteration=iteration))
        run_dir.forget_metrics(iteration=iteration, stage="annotate", from_step=0)
        row = {"iteration": iteration, "stage": "annotate", "step": 0, **scalars(figures)}
        run_dir.append_metrics(row | ({"warnings": found} if found else {}))
    return {"quality": figures, "warnings": found}
