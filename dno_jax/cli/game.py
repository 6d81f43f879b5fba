"""`dno game`: algorithms played on a small game."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def game(
    game: Annotated[str, typer.Option(help="cycle, rps, random, bradley-terry or contextual")] = "cycle",
    algorithms: Annotated[str | None, typer.Option(help="names in dno_jax.games, separated by commas")] = None,
    iterations: Annotated[int, typer.Option(help="iterations of each algorithm")] = 2000,
    eta: Annotated[float | None, typer.Option(help="KL coefficient of all; by default each one's own")] = None,
    tau: Annotated[
        float | None, typer.Option(help="regularisation of all that have one; by default each one's own")
    ] = None,
    start: Annotated[str | None, typer.Option(help="the first policy and reference, such as .5,.3,.2")] = None,
    num_responses: Annotated[
        int | None, typer.Option(help="size of a random, bradley-terry or contextual game")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="strength of the preferences; 1 by default")] = None,
    seed: Annotated[int, typer.Option(help="seed of random games and of samples")] = 0,
    out: Annotated[Path | None, typer.Option(help="a plot of the gaps: .svg, .png or .pdf")] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="also play them from samples, with the losses")] = False,
    pairs: Annotated[int, typer.Option(help="sampled: pairs per iteration and prompt")] = 4096,
    samples: Annotated[int, typer.Option(help="sampled: verdicts behind each win rate")] = 8,
) -> None:
    """Play algorithms on a game small enough to know its Nash policy: who gets there, and who goes in circles."""
    from dno_jax.console import results, say
    from dno_jax.report import game as report

    P = report.build_game(game, num_responses=num_responses, strength=strength, seed=seed)
    if out is not None:
        report.check_plot_path(out)
    played = report.play(
        P,
        algorithms=report.parse_algorithms(algorithms),
        iterations=iterations,
        eta=eta,
        tau=tau,
        start=report.parse_start(start, P, game=game),
        samples=report.Samples(pairs, samples, seed) if sampled else None,
    )
    results.print(report.game_table(played, P))
    for line in report.nash_lines(P):
        results.print(line, soft_wrap=True)
    results.print(report.advice(), soft_wrap=True)
    if out is not None:
        report.save_plot(played, out, title=f"{game}, {P.shape[-1]} responses")
        say(f"plot written to {out}")
