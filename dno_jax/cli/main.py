"""The command line. Heavy imports happen inside commands, so that `dno --help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dno_jax.cli import process
from dno_jax.cli.annotations import annotations
from dno_jax.cli.chat import chat, generate
from dno_jax.cli.game import game
from dno_jax.cli.joining import Coordinator, NumProcesses, ProcessId, join, leave
from dno_jax.cli.launch import launch
from dno_jax.cli.looking import report, status
from dno_jax.cli.measure import compare, evaluate, sample
from dno_jax.cli.plan import plan
from dno_jax.cli.prompts import prompts
from dno_jax.cli.quantities import read_bytes
from dno_jax.cli.recipes import Config, Iteration, Overrides, With, load, run_on_devices, stage_settings
from dno_jax.cli.rehearsal import fake_judge
from dno_jax.cli.settings import config as list_settings
from dno_jax.cli.smoke import run_smoke
from dno_jax.cli.version import show_version

if TYPE_CHECKING:
    from dno_jax.config import RunConfig

app = typer.Typer(
    help="Direct Nash Optimization: a language model improves itself against a general preference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback of ours shows locals of nobody
    rich_markup_mode=None,
)


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """What holds for every command."""


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    variants: With = None,
    redo_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STAGE[:ITERATION]",
            help="redo this stage and all that follows, such as train or pair:1; earlier results are set aside",
        ),
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="measure 16 prompts and two steps of every stage here, and keep nothing")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="of one device, in dollars; for --smoke", show_default=False)
    ] = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
) -> None:
    """Run all iterations, or resume where an earlier run stopped; export the best policy.

    SIGTERM and Ctrl-C save what can be saved, within grace_seconds; the exit status is then 75, or 130: the same
    command goes on.
    """
    settings = load(config, overrides, variants)
    from dno_jax import iteration
    from dno_jax.console import results
    from dno_jax.parallel.cluster import is_primary
    from dno_jax.report.answers import answers_text, shown_answers
    from dno_jax.report.measured import last_matrix
    from dno_jax.report.summary import iteration_table, policy_table, told_policy
    from dno_jax.run_dir import RunDir

    join(settings, coordinator, num_processes, process_id)
    if smoke:
        run_smoke(settings, price_per_hour)
        return
    result = iteration.run(settings, redo_from=redo_from)
    if is_primary():
        folder = RunDir(settings.run_dir)
        results.print(policy_table(folder, iterations=settings.iterations))
        results.print(last_matrix(folder, iterations=settings.iterations))
        results.print(iteration_table(folder, settings))
        if shown := shown_answers(folder, iterations=settings.iterations, policy=result.best):
            results.print(answers_text(shown))
        policy = told_policy(folder, iteration=settings.iterations - 1)
        results.print(f"{policy}, exported to {folder.shown(folder.export_path)}", soft_wrap=True)
        results.print(f"report: {folder.shown(folder.report_path)}", soft_wrap=True)


def _host_stage(name: str, summary: str) -> None:
    """Add the command of a stage that needs no device: any machine with the run directory will do."""

    def command(config: Config, overrides: Overrides = None, variants: With = None, iteration: Iteration = 0) -> None:
        _run_on_host(name, stage_settings(name, config, overrides, variants, iteration), iteration)

    command.__doc__ = summary
    app.command(name)(command)


def _run_on_host(name: str, settings: RunConfig, iteration: int) -> None:
    import importlib

    from dno_jax.report.page import refresh
    from dno_jax.run_dir import RunDir
    from dno_jax.stages import redo

    stage, folder = importlib.import_module(f"dno_jax.stages.{name}"), RunDir(settings.run_dir)
    with folder.written():
        redo.check(settings, folder)
        folder.create(settings)
        stage.run(settings, folder, iteration)
        refresh(folder, settings)


def _device_stage(name: str, summary: str) -> None:
    """Add the command of a stage that needs the devices."""

    def command(
        config: Config,
        overrides: Overrides = None,
        variants: With = None,
        iteration: Iteration = 0,
        coordinator: Coordinator = None,
        num_processes: NumProcesses = None,
        process_id: ProcessId = None,
    ) -> None:
        settings = stage_settings(name, config, overrides, variants, iteration)
        join(settings, coordinator, num_processes, process_id)
        run_on_devices(name, name, settings, iteration)

    command.__doc__ = summary
    app.command(name)(command)


_host_stage("teach", "Have a teacher write the gold responses that the data lacks; needs no accelerator.")
app.command()(sample)


@app.command()
def annotate(
    config: Config,
    overrides: Overrides = None,
    variants: With = None,
    iteration: Iteration = 0,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
) -> None:
    """Judge the candidates; any machine with the run directory will do, unless the judge is a model on the devices."""
    settings = stage_settings("annotate", config, overrides, variants, iteration)
    judges = {"self": "judge_on_devices.policy", "reward_model": "judge_on_devices.reward_model"}
    if settings.annotation.on_devices:
        join(settings, coordinator, num_processes, process_id)
        run_on_devices("annotate", judges[settings.annotation.kind], settings, iteration)
    else:
        _run_on_host("annotate", settings, iteration)


_host_stage("pair", "Choose the training pairs.")
_device_stage("score", "Write the reference log-probabilities of the pairs.")
_device_stage("train", "Train policy t into policy t+1.")
app.command()(evaluate)


def _one_training(name: str, kind: str, summary: str) -> None:
    """Add the command of a training that is no iteration of a run."""

    def command(
        config: Config,
        overrides: Overrides = None,
        variants: With = None,
        coordinator: Coordinator = None,
        num_processes: NumProcesses = None,
        process_id: ProcessId = None,
    ) -> None:
        settings = load(config, overrides, variants, kind=kind)
        join(settings, coordinator, num_processes, process_id)
        import importlib

        from dno_jax.runtime.runtime import Runtime

        importlib.import_module(f"dno_jax.stages.{name}").run(Runtime.start(settings))

    command.__doc__ = summary
    app.command(name)(command)


_one_training("sft", "SftConfig", "Supervised fine-tuning, the step before DNO; prompt tokens are masked.")
_one_training(
    "reward",
    "RewardConfig",
    "Train a Bradley-Terry reward model on preferences, and export it for annotation.kind=reward_model.",
)


@app.command("import")
def import_(config: Config, overrides: Overrides = None, variants: With = None) -> None:
    """Check the configuration, open the run directory and import the checkpoint as policy 0."""
    settings = load(config, overrides, variants)
    from dno_jax.runtime.runtime import Runtime
    from dno_jax.stages.preflight import prepared

    with prepared(Runtime.start(settings)):
        pass


@app.command()
def export(
    run_dir: Annotated[
        str, typer.Argument(help="a run directory, or one of `dno sft`, `dno reward`", show_default=False)
    ],
    path: Annotated[Path, typer.Argument(help="where the Hugging Face checkpoint goes", show_default=False)],
    policy: Annotated[int | None, typer.Option(help="which policy; the best on held-out prompts by default")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; by default that of the base")] = None,
    max_shard_size: Annotated[str, typer.Option(help="largest size of one file, such as 500MB")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="replace an earlier export, or an empty directory")] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="upload it to this repository on the Hub, model card too")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="where the run's base checkpoint lies on this machine, or its id on the Hub")
    ] = None,
    public: Annotated[bool, typer.Option(help="a repository that --push makes is for all to see")] = False,
) -> None:
    """Write a policy as a Hugging Face checkpoint and check that it reloads to the same values and logits.

    RUN_DIR may be a directory of `dno sft` or `dno reward` too, and the devices need not be those of the run.
    """
    from dno_jax.run_dir import RunDir
    from dno_jax.stages import exports

    wanted = exports.Wanted(
        policy=policy,
        base=base,
        dtype=dtype,
        max_shard_bytes=read_bytes(max_shard_size, option="--max-shard-size"),
        overwrite=overwrite,
        push=push,
        public=public,
    )
    exports.run(RunDir(run_dir), str(path), wanted)


class _TemplateByDefault(TyperGroup):
    """A group whose first argument may be left out: `dno inspect CONFIG` is `dno inspect template CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["template", *args]
        return super().parse_args(ctx, args)


app.add_typer(annotations, name="annotations", help="What judges were paid for: list, export or purge it.")
app.add_typer(launch, name="launch", help="Manifests for clusters.")
app.add_typer(prompts, name="prompts", help="What files of prompts or examples are taken for.")

_inspect = typer.Typer(cls=_TemplateByDefault, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(_inspect, name="inspect", help="Look at what a run would do; `inspect CONFIG` is `inspect template`.")


@_inspect.callback()
def _inspect_group() -> None:
    """Keep the group a group though it has one command."""


@_inspect.command("template")
def inspect_template(config: Config, overrides: Overrides = None, variants: With = None) -> None:
    """Show one prompt and response as tokens, where the loss starts and ends, and what the template does to chats."""
    settings = load(config, overrides, variants)
    from dno_jax.console import results
    from dno_jax.stages import template as stage

    found = stage.report(settings.model, settings.prompts.path)
    results.print(stage.render(found), end="", soft_wrap=True)
    stage.refuse(found.findings, place=settings.model.path)


app.command()(status)
app.command()(report)
app.command()(compare)
app.command()(plan)
app.command()(chat)
app.command()(generate)
app.command("config")(list_settings)
app.command()(game)
app.command()(fake_judge)


def main() -> None:
    """Run the command line; exit status 2 and no traceback after a DnoError, 75 after SIGTERM, 130 after a Ctrl-C."""
    failure = None
    try:
        status = process.run(app)
    except Exception as error:
        status, failure = 1, error
    leave(status, failure)
    raise SystemExit(status)
