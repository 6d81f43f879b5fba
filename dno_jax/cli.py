"""The command line. Heavy imports happen inside commands, so that `dno --help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dno_jax.config import RunConfig

app = typer.Typer(
    help="Direct Nash Optimization: a language model improves itself against a general preference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback of ours shows locals of nobody
    rich_markup_mode=None,
)

Config = Annotated[Path, typer.Argument(help="a YAML file (see configs/)", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="fields to set, such as sampling.num_samples=8", show_default=False)
]
Iteration = Annotated[int, typer.Option(help="which iteration, from 0")]
Coordinator = Annotated[str | None, typer.Option(help="host:port of process 0, for several processes")]
NumProcesses = Annotated[int | None, typer.Option(help="how many processes there are")]
ProcessId = Annotated[int | None, typer.Option(help="which of them this is, from 0")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
) -> None:
    """Run all iterations, or go on where an earlier run stopped; export the best policy."""
    from dno_jax import iteration
    from dno_jax.parallel.mesh import is_primary
    from dno_jax.report.console import console
    from dno_jax.report.summary import iteration_table, policy_table
    from dno_jax.run_dir import RunDir

    settings = _load(config, overrides)
    _join(coordinator, num_processes, process_id)
    result = iteration.run(settings)
    if is_primary():
        folder = RunDir(settings.run_dir)
        console.print(policy_table(folder, iterations=settings.iterations))
        console.print(iteration_table(folder, iterations=settings.iterations))
        console.print(f"best on held-out prompts: policy {result.best}, exported to {result.export}", markup=False)


def _stage_command(name: str, summary: str, *, needs_devices: bool = True) -> None:
    def command(
        config: Config,
        overrides: Overrides = None,
        iteration: Iteration = 0,
        coordinator: Coordinator = None,
        num_processes: NumProcesses = None,
        process_id: ProcessId = None,
    ) -> None:
        import importlib

        settings = _load(config, overrides)
        if not 0 <= iteration < settings.iterations:
            from dno_jax.errors import DnoError

            raise DnoError(
                f"--iteration is {iteration}; the configuration has iterations 0 to {settings.iterations - 1}"
            )
        stage = importlib.import_module(f"dno_jax.stages.{name}").run
        if needs_devices:
            from dno_jax.iteration import prepare

            _join(coordinator, num_processes, process_id)
            prepare(settings)
        stage(settings, iteration)

    command.__doc__ = summary
    app.command(name)(command)


_stage_command("sample", "Sample K responses a prompt from policy t.")
_stage_command(
    "annotate",
    "Judge the candidates; needs no accelerator, any machine with the run directory will do.",
    needs_devices=False,
)
_stage_command("pair", "Choose the training pairs.", needs_devices=False)
_stage_command("score", "Write the reference log-probabilities of the pairs.")
_stage_command("train", "Train policy t into policy t+1.")
_stage_command("evaluate", "Measure policy t+1 on held-out prompts.")


@app.command()
def sft(
    config: Config,
    overrides: Overrides = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
) -> None:
    """Supervised fine-tuning, the step before DNO; prompt tokens are masked."""
    from dno_jax.config import SftConfig, load_config

    settings = load_config(SftConfig, config, overrides or [])
    _join(coordinator, num_processes, process_id)
    from dno_jax.stages import sft as stage

    stage.run(settings)


@app.command("import")
def import_(config: Config, overrides: Overrides = None) -> None:
    """Check the configuration, open the run directory and import the checkpoint as policy 0."""
    from dno_jax import iteration

    iteration.prepare(_load(config, overrides))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="a run directory", show_default=False)],
    path: Annotated[Path, typer.Argument(help="where the Hugging Face checkpoint goes", show_default=False)],
    policy: Annotated[int | None, typer.Option(help="which policy; the best on held-out prompts by default")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace what is at the path")] = False,
) -> None:
    """Write a policy as a Hugging Face checkpoint and check that it reloads to the same logits."""
    from dno_jax.report.console import say
    from dno_jax.report.summary import best_policy_of
    from dno_jax.run_dir import RunDir

    folder = RunDir(str(run_dir))
    settings = folder.load_config()
    if policy is None:
        policy = best_policy_of(folder, iterations=settings.iterations)
    from dno_jax.stages import policies

    policies.export(settings, policy=policy, path=str(path), overwrite=overwrite)
    say(f"policy {policy} exported to {path}")


@app.command()
def status(run_dir: Annotated[Path, typer.Argument(help="a run directory", show_default=False)]) -> None:
    """Say which stages are done, with rows and seconds, and what comes next."""
    from dno_jax.report.console import console
    from dno_jax.report.summary import iteration_table, policy_table, stage_statuses, status_table
    from dno_jax.run_dir import RunDir

    folder = RunDir(str(run_dir))
    settings = folder.load_config()
    console.print(status_table(stage_statuses(folder, iterations=settings.iterations)))
    console.print(policy_table(folder, iterations=settings.iterations))
    console.print(iteration_table(folder, iterations=settings.iterations))


@app.command()
def inspect(config: Config, overrides: Overrides = None) -> None:
    """Show one prompt and response as tokens: where the loss starts and ends, BOS, whether the end token is trained."""
    from dno_jax.stages import inspect as stage

    typer.echo(stage.describe(stage.strip(_load(config, overrides))), nl=False)


def _load(path: Path, overrides: list[str] | None) -> RunConfig:
    from dno_jax.config import RunConfig, load_config

    return load_config(RunConfig, path, overrides or [])


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    from dno_jax.parallel.mesh import initialize

    initialize(coordinator=coordinator, num_processes=num_processes, process_id=process_id)


def main() -> None:
    """Run the command line; a DnoError is printed without a traceback, exit status 2."""
    from dno_jax.errors import DnoError

    try:
        app()
    except DnoError as error:
        typer.echo(f"dno: {error}", err=True)
        raise SystemExit(2) from None
