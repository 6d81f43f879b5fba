"""What sampled opponents do to last iterates: the optimistic and the proximal scheme in the cyclic game.

    python examples/noise.py [--figure docs/figures/noise.png] [--seeds 8]

Every reward is the mean over K opponents sampled from the current policy, as in a run with K samples per prompt; all
else is exact. The figure wants pip install 'dno_jax[plot]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dno_jax import games
from dno_jax.console import console

START = np.array([0.5, 0.3, 0.2])
SCHEMES: dict[str, dict[str, Any]] = {
    "optimistic": {"algorithm": "onpo"},
    "proximal, tau .02": {"algorithm": "comal", "tau": 0.02, "refresh": 50},
    "proximal, tau .1": {"algorithm": "comal", "tau": 0.1, "refresh": 50},
}
ETAS, OPPONENTS = (2.0, 5.0), (None, 64, 8, 5)


def gaps(scheme: str, *, eta: float, num_opponents: int | None, seeds: int = 8, iterations: int = 400) -> np.ndarray:
    """Return the duality gap of pi_1 .. pi_{T+1}, the mean over seeds; each seed is a prompt with draws of its own."""
    P, start = (np.broadcast_to(one, (seeds, *one.shape)) for one in (games.cyclic_game(), START))
    solution = games.solve(
        P, eta=eta, initial=start, iterations=iterations, num_opponents=num_opponents, seed=0, **SCHEMES[scheme]
    )
    return solution.gaps


def late(gaps: np.ndarray) -> float:
    """The mean over iterates 301 to 400."""
    return float(gaps[300:400].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/noise.png"))
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    played = {
        (eta, count, scheme): gaps(scheme, eta=eta, num_opponents=count, seeds=options.seeds)
        for eta in ETAS
        for count in OPPONENTS
        for scheme in SCHEMES
    }
    table = Table(title=f"mean gap of iterates 301 to 400, {options.seeds} seeds")
    for column in ("eta", "opponents", *SCHEMES):
        table.add_column(column, justify="right")
    for eta in ETAS:
        for count in OPPONENTS:
            row = [f"{late(played[eta, count, scheme]):.2g}" for scheme in SCHEMES]
            table.add_row(f"{eta:g}", "exact" if count is None else str(count), *row)
    console.print(table)
    draw(played, options.figure)
    console.print(f"figure: {options.figure}", markup=False)


def draw(played: dict[tuple[float, int | None, str], np.ndarray], path: Path) -> None:
    """One panel per eta and number of opponents: gap against iteration."""
    from matplotlib.figure import Figure  # without pyplot there is neither window nor global state

    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    panels = figure.subplots(len(ETAS), len(OPPONENTS), sharex=True, sharey=True)
    for row, eta in zip(panels, ETAS, strict=True):
        for panel, count in zip(row, OPPONENTS, strict=True):
            for scheme in SCHEMES:
                panel.semilogy(np.maximum(played[eta, count, scheme], 1e-4), label=scheme, linewidth=1.0)
            panel.set_title(f"eta {eta:g}, {'exact' if count is None else f'{count} opponents'}", fontsize=9)
            panel.grid(alpha=0.3)
        row[0].set_ylabel("duality gap")
    for panel in panels[-1]:
        panel.set_xlabel("iteration")
    panels[0][0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
