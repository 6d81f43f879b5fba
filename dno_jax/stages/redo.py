"""What in a run directory a configuration no longer fits, and how work is redone: earlier results are set aside."""

from __future__ import annotations

from etils import epath

from dno_jax.config import RunConfig
from dno_jax.console import say
from dno_jax.errors import DnoError
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import STAGES, stage_names, stale_message

# Folders of held-out responses and of answers to the guard's questions: what they are of has not changed.
_KEPT_OF_EVALUATION = ("policy-", "guard-")


def check(config: RunConfig, run_dir: RunDir) -> None:
    """Refuse a configuration that would change the results of a stage that has begun.

    What only evaluation reads may change: `set_evaluation_aside` redoes that.

    Raises:
        DnoError: naming the first such stage, the fields with both values, and what can be done.
    """
    if not run_dir.config_path.exists():
        return
    _check_iterations(config, run_dir)
    for iteration in run_dir.begun():
        for name in stage_names(config, iteration):
            stage = run_dir.stage(name, iteration)
            if name != "evaluate" and (changed := stage.changed(config)):
                raise DnoError(stale_message(stage, changed))


def _check_iterations(config: RunConfig, run_dir: RunDir) -> None:
    before: RunConfig = run_dir.load_config()
    if before.iterations == config.iterations or not run_dir.begun():
        return
    remedy = f"set iterations back to {before.iterations}, or give another run_dir"
    if config.prompts.split == "disjoint":
        raise DnoError(
            f"iterations: {before.iterations} -> {config.iterations}: with prompts.split=disjoint each iteration has "
            f"its own part of the prompts, cut by their number, and {run_dir.path} has samples of the old cut; {remedy}"
            " (prompts.split=shared can be raised at any time)"
        )
    if config.outer.scheme == "lookahead":
        raise DnoError(
            f"iterations: {before.iterations} -> {config.iterations}: with outer.scheme=lookahead the last iteration "
            f"restarts from policy 0, and another one would be the last; {remedy}"
        )


def parse_place(text: str, config: RunConfig) -> tuple[str, int]:
    """Return the stage and iteration of `--from STAGE` or `--from STAGE:ITERATION`.

    Raises:
        DnoError: there is no such stage.
    """
    name, _, number = text.partition(":")
    name = name.replace("-", "_")
    if not (number or "0").isdecimal() or int(number or 0) >= config.iterations:
        raise DnoError(f"--from is {text!r}; the configuration has iterations 0 to {config.iterations - 1}")
    iteration = int(number or 0)
    if name not in stage_names(config, iteration):
        raise DnoError(
            f"--from is {text!r}; iteration {iteration} has the stages {', '.join(stage_names(config, iteration))}"
        )
    return name, iteration


def set_aside(run_dir: RunDir, stage: str, iteration: int) -> None:
    """Move what a stage of an iteration made, and all that follows from it, to a folder of its own; say so.

    Verdicts stay in their store: whatever is asked again is not paid for again.

    Raises:
        DnoError: something cannot be moved.
    """
    if stage == "evaluate":
        for later in run_dir.begun():
            if later >= iteration:
                _move_evaluation(run_dir, later)
        return
    names = list(STAGES)
    redone = names[names.index(stage) :]
    paths = [run_dir.stage(name, iteration).path for name in redone]
    if stage in ("teach", "sample"):
        paths.append(run_dir.prompts_path(iteration))
    paths += [run_dir.iteration_path(later) for later in run_dir.begun() if later > iteration]
    paths += [path for path in _policies(run_dir) if int(path.name.split("-")[0]) > iteration]
    paths += [run_dir.export_path, run_dir.exported_path, run_dir.export_average_path]
    paths += [run_dir.report_path, run_dir.report_files_path]
    target = _move(run_dir, paths)
    say(
        f"redone from {stage} of iteration {iteration}: {', '.join(redone)} of it, every later iteration and policy; "
        + (f"what was there is kept in {target}" if target else "none of these existed")
    )


def set_evaluation_aside(run_dir: RunDir, config: RunConfig, iteration: int) -> None:
    """Set the results of an evaluation aside whose configuration has changed; held-out responses stay."""
    if changed := run_dir.stage("evaluate", iteration).changed(config):
        target = _move_evaluation(run_dir, iteration)
        say(
            f"evaluation of iteration {iteration} is redone ({'; '.join(changed)}): responses and verdicts that are "
            f"there are used again, the earlier figures are kept in {target}"
        )


def _move_evaluation(run_dir: RunDir, iteration: int) -> epath.Path | None:
    folder = run_dir.stage("evaluate", iteration).path
    if not folder.exists():
        return None
    return _move(run_dir, [path for path in folder.iterdir() if not path.name.startswith(_KEPT_OF_EVALUATION)])


def _policies(run_dir: RunDir) -> list[epath.Path]:
    folder = run_dir.path / "policies"
    return [p for p in folder.iterdir() if p.name.split("-")[0].isdecimal()] if folder.exists() else []


def _move(run_dir: RunDir, paths: list[epath.Path]) -> epath.Path | None:
    """Move paths to aside/<n>/, where they lie as they lay in the run directory, beside the configuration so far."""
    there = [path for path in paths if path.exists()]
    if not there:
        return None
    taken = [int(p.name) for p in run_dir.aside_path.iterdir()] if run_dir.aside_path.exists() else []
    target = run_dir.aside_path / str(max(taken, default=-1) + 1)
    try:
        target.mkdir(parents=True)
        for path in (run_dir.config_path, *run_dir.metrics_paths()):
            if path.exists():
                place = target / path.relative_to(run_dir.path)
                place.parent.mkdir(exist_ok=True)
                path.copy(place)
        for path in there:
            place = target / path.relative_to(run_dir.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    except OSError as error:
        raise DnoError(
            f"{target}: what is redone cannot be set aside ({error.strerror or error}); see to the disk, then start "
            "again"
        ) from None
    return target
