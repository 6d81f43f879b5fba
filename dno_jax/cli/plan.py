"""`dno plan`: what a run takes and costs, and whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    config: Annotated[
        Path,
        typer.Argument(help="a YAML file (see configs/); relative paths in it start at its folder", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="fields to set, such as sampling.num_samples=8", show_default=False)
    ] = None,
    variants: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="YAML", help="lay a variant's changes over CONFIG (see configs/variants)"),
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(help="compile for devices that need not be here: v5e:16x16, v5p:4x4x4, h200:8, cpu:8, ..."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="find the largest micro batch and cheapest remat that fit")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="a bundled shape in place of model.path, such as mistral-7b; nothing is read")
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=1, help="assume so many prompts (rows, of a training), each of the longest length, and read none"
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="memory of one device, such as 16GiB; by default this machine's")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="how many to plan for; those that this machine lacks need --memory")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="the programs of a topology; else all is arithmetic")
    ] = True,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of a response; by default the longest possible")
    ] = None,
    reply_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of a judge's reply; by default the longest possible")
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0.0, help="dollars of one device")] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1.0, help="of training, as you measured it; in place of a roofline")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="drawn by all devices, as you measured it; in place of a roofline")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on standard output")] = False,
) -> None:
    """Show what a run takes and costs and whether it fits, before it starts; needs no weights and no accelerator.

    A recipe of `dno sft` or `dno reward` is planned as the training that it is. With --topology the run's own programs
    are compiled for devices that need not be here.
    """
    import json

    from rich.text import Text

    from dno_jax import stopping
    from dno_jax.cli.quantities import read_bytes
    from dno_jax.config import RewardConfig, RunConfig, SftConfig, kind_of, load_config
    from dno_jax.console import results
    from dno_jax.files import cache_folder
    from dno_jax.plan.run import Asked, plan_run
    from dno_jax.plan.search import refuse
    from dno_jax.plan.search import search as searched
    from dno_jax.plan.tables import as_json as json_of
    from dno_jax.plan.tables import command_of, render
    from dno_jax.plan.trainings import plan_training

    kind = kind_of(config, (RunConfig, SftConfig, RewardConfig))
    settings = load_config(kind, config, overrides or [], variants=variants or [])
    stopping.allow(settings.grace_seconds)
    asked = Asked(
        topology=topology,
        num_devices=devices,
        memory=None if memory is None else read_bytes(memory, option="--memory"),
        model=model,
        num_prompts=prompts,
        compiled=compiled,
        response_tokens=response_tokens,
        reply_tokens=reply_tokens,
        price_per_hour=price_per_hour,
        mfu=mfu,
        tokens_per_second=tokens_per_second,
        cache=cache_folder() / "plans",
    )
    if isinstance(settings, RunConfig):
        found = plan_run(settings, asked=asked)
    else:
        found = plan_training(settings, asked=asked)
    best = searched(found) if search else None
    if as_json:
        typer.echo(json.dumps(json_of(found, found=best), indent=2))
    else:
        results.print(render(found, found=best))
        if best is not None:  # on one line, to be copied
            beside = [part for variant in variants or [] for part in ("--with", str(variant))]
            command = command_of(found, best, [str(config), *(overrides or []), *beside])
            results.print(Text(f"    {command}\n"), soft_wrap=True)
    refuse(found, best)
