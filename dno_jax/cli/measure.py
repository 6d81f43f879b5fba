"""`dno sample`, `dno evaluate` and `dno compare`: draw from a policy, measure it, and set runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dno_jax.cli.joining import Coordinator, NumProcesses, ProcessId, join
from dno_jax.cli.recipes import Config, Iteration, Overrides, With, load, run_on_devices, stage_settings

if TYPE_CHECKING:
    from dno_jax.stages.suite import Wanted

Suite = Annotated[
    str | None, typer.Option(help="a published suite in place of an iteration: alpaca_eval or arena_hard")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="the suite's prompts: alpaca_eval's rows of {instruction, output}, arena_hard's {question_id, turns}"
    ),
]
Policy = Annotated[int | None, typer.Option(help="of a suite: which policy; the best on held-out prompts by default")]


def sample(
    config: Config,
    overrides: Overrides = None,
    variants: With = None,
    iteration: Iteration = 0,
    suite: Suite = None,
    prompts: Prompts = None,
    policy: Policy = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
) -> None:
    """Sample K responses per prompt from policy t; with --suite, answer the suite's prompts in its own format."""
    if suite is None:
        settings = stage_settings("sample", config, overrides, variants, iteration)
        join(settings, coordinator, num_processes, process_id)
        run_on_devices("sample", "sample", settings, iteration)
        return
    from dno_jax.run_dir import RunDir
    from dno_jax.stages import suites

    settings = load(config, overrides, variants)
    with RunDir(settings.run_dir).written():
        suites.sample(settings, _wanted(suite, prompts, policy))


def evaluate(
    config: Config,
    overrides: Overrides = None,
    variants: With = None,
    iteration: Iteration = 0,
    suite: Suite = None,
    prompts: Prompts = None,
    policy: Policy = None,
    reference: Annotated[
        Path | None, typer.Option(help="of a suite: the reference's outputs, if apart, in its own form")
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(help="of alpaca_eval: its judge's text in ChatML; by default the configuration's rubric"),
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="of alpaca_eval: folder of instruction_difficulty.csv and df_gamed.csv")
    ] = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
) -> None:
    """Measure policy t+1 on held-out prompts; with --suite, answer a published suite and have it judged."""
    from dno_jax.console import results
    from dno_jax.report.measured import matrix_table, suite_table
    from dno_jax.run_dir import RunDir

    if suite is None:
        settings = stage_settings("evaluate", config, overrides, variants, iteration)
        join(settings, coordinator, num_processes, process_id)
        run_on_devices("evaluate", "evaluate", settings, iteration)
        results.print(matrix_table(RunDir(settings.run_dir).stage("evaluate", iteration).require().details))
        return
    from dno_jax.stages import suites

    apart = tuple(None if path is None else str(path) for path in (reference, template, tables))
    settings = load(config, overrides, variants)
    with RunDir(settings.run_dir).written():
        found = suites.evaluate(settings, _wanted(suite, prompts, policy, *apart))
    results.print(suite_table([found | {"suite": suite}]))


def _wanted(
    suite: str,
    prompts: Path | None,
    policy: int | None,
    reference: str | None = None,
    template: str | None = None,
    tables: str | None = None,
) -> Wanted:
    from dno_jax.errors import DnoError
    from dno_jax.stages.suite import Wanted

    if prompts is None:
        raise DnoError(
            f"--suite {suite} without --prompts: give the suite's file of prompts (docs/evaluation.md); it is not part "
            "of this package"
        )
    return Wanted(suite, str(prompts), reference, policy, template, tables)


def compare(
    runs: Annotated[list[str], typer.Argument(help="two or more run directories", show_default=False)],
    judge: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG", help="judge their best policies against each other, by this recipe's evaluation judge"
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="a field of --judge's recipe, such as annotation.max_usd=5")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON on standard output")] = False,
) -> None:
    """Set runs side by side: what their configurations differ in, what came of each, and, judged, who beats whom."""
    import json

    from dno_jax.console import results
    from dno_jax.report.measured import comparison_tables
    from dno_jax.stages import compare as stage

    settings = None if judge is None else load(judge, overrides, None)
    found = stage.run(runs, settings)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    for table in comparison_tables(found.as_dict()):
        results.print(table)
