"""`dno game`: algorithms played on a small game, in a table and a plot of their duality gaps."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dno_jax import games
from dno_jax.errors import DnoError

NUM_PROMPTS = 4  # of the contextual game
_MOST_RESPONSES = 1000  # 17 s to solve
SUFFIXES = (".svg", ".png", ".pdf")
SMALLEST_GAP = 1e-16  # of a policy in float64; gaps of 0 are drawn there

# One of each kind of behaviour: cycles, settles beside the Nash policy, reaches it, cannot find it.
DEFAULT_ALGORITHMS = ("dno", "reward_maximisation", "dno_option_1", "dno_option_2", "onpo", "comal", "mpo")
# (eta, tau) that show it in the cyclic game (docs/theory.md); an eta of None is the algorithm's own schedule.
DEFAULT_KNOBS: dict[str, tuple[float | None, float]] = {
    "dno": (5.0, 0.0),
    "spo": (5.0, 0.0),
    "sppo": (5.0, 0.0),
    "iterative_dpo": (20.0, 0.0),
    "dno_option_1": (1.0, 0.1),
    "dno_option_2": (1.0, 0.1),
    "comal": (0.5, 0.1),
    "mpo": (0.5, 0.1),
    "nash_mirror_prox": (0.5, 0.1),
}
_FOLLOWS = ("comal", "mpo")  # their reference moves, so that no one regularised Nash policy is their aim


@dataclass(frozen=True)
class Samples:
    """How much is drawn when games are played from samples; the arguments of `games.sampled.solve_sampled`."""

    num_pairs: int = 4096
    num_samples: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Played:
    """One algorithm's run on a game.

    Attributes:
        name: in `games.ALGORITHMS`.
        eta, tau: its knobs; an eta of None is the algorithm's schedule.
        solution: pi_1 .. pi_{T+1} and their gaps.
        sampled: from samples rather than exactly.
        regularised: the Nash policy of the regularised game that it aims at, if it does.
    """

    name: str
    eta: float | None
    tau: float
    solution: games.Solution
    sampled: bool
    regularised: np.ndarray | None


def build_game(name: str, *, num_responses: int | None, strength: float | None, seed: int) -> np.ndarray:
    """Return the game that the command line names.

    Args:
        name: cycle, rps, random, bradley-terry or contextual.
        num_responses: C; None is the game's own number.
        strength: of the preferences; in bradley-terry the standard deviation of the rewards. None is 1.
        seed: of the random ones.

    Raises:
        DnoError: an unknown game, or an option that it lacks or cannot use.
    """
    sizes = {"cycle": 3, "rps": 3, "random": 10, "bradley-terry": 5, "contextual": 5}
    if name not in sizes:
        raise DnoError(f"--game is {name!r}; choose one of {', '.join(sizes)}")
    if num_responses is not None and name in ("cycle", "rps"):
        raise DnoError(f"--num-responses is {num_responses}, but the game {name} always has 3; leave the option out")
    if strength is not None and name == "cycle":
        raise DnoError(f"--strength is {strength}, but the game cycle is fixed; leave it out, or take --game rps")
    if num_responses is not None and num_responses > _MOST_RESPONSES:
        raise DnoError(f"--num-responses is {num_responses}; at most {_MOST_RESPONSES:,}: a game is solved as a whole")
    count, scale = sizes[name] if num_responses is None else num_responses, 1.0 if strength is None else strength
    try:
        if name == "cycle":
            return games.cyclic_game()
        if name == "rps":
            return games.rock_paper_scissors(scale)
        if name == "random":
            return games.random_game(count, seed=seed, scale=scale)
        if name == "contextual":
            return games.contextual(
                [games.random_game(count, seed=seed + prompt, scale=scale) for prompt in range(NUM_PROMPTS)]
            )
        return games.bradley_terry(scale * np.random.default_rng(seed).normal(size=count))
    except ValueError as error:
        raise DnoError(f"--game {name}: {error}; change --strength, --num-responses or --seed") from None


def parse_start(text: str | None, P: np.ndarray, *, game: str) -> np.ndarray:
    """Return pi_1 for every prompt of P, from probabilities separated by commas.

    None is off-centre in the two cycles, where nothing moves from the centre of a symmetric one, else uniform.

    Raises:
        DnoError: no policy with full support.
    """
    size = P.shape[-1]
    if text is None:
        values = np.array([0.5, 0.3, 0.2]) if game in ("cycle", "rps") else np.full(size, 1.0 / size)
    else:
        try:
            values = np.array([float(part) for part in text.split(",")])
            games.check_policy(values, P[(0,) * (P.ndim - 2)], name="it", full_support=True)
        except ValueError as error:
            raise DnoError(
                f"--start is {text!r}: {error}; give {size} positive, comma-separated probabilities that sum to 1"
            ) from None
    return np.broadcast_to(values, P.shape[:-1])


def parse_algorithms(text: str | None) -> tuple[str, ...]:
    """Return names of algorithms from a comma-separated list.

    Raises:
        DnoError: an unknown name, or none.
    """
    names = DEFAULT_ALGORITHMS if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in games.ALGORITHMS:
            raise DnoError(f"--algorithms names {name!r}; there are {', '.join(games.ALGORITHMS)}")
    return names


def check_plot_path(path: Path) -> None:
    """Refuse what `save_plot` could not write, before anything is computed.

    Raises:
        DnoError: a suffix of no format, or no matplotlib.
    """
    if path.suffix not in SUFFIXES:
        raise DnoError(f"--out is {str(path)!r}; its suffix says the format and must be one of {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise DnoError(f"--out {path} needs matplotlib, which is not installed: pip install 'dno_jax[plot]'")


def play(
    P: np.ndarray,
    *,
    algorithms: Sequence[str],
    iterations: int,
    eta: float | None,
    tau: float | None,
    start: np.ndarray,
    samples: Samples | None = None,
) -> list[Played]:
    """Play algorithms on a game, exactly and, with `samples`, a second time from those.

    Args:
        eta, tau: for every algorithm that has them; None is each one's own (`DEFAULT_KNOBS`).
        start: pi_1, the reference too.

    The others are those of `games.solve`.

    Raises:
        DnoError: numbers that an algorithm cannot use.
    """
    limits = [("--iterations", iterations, 1)]
    if samples is not None:
        limits += [("--pairs", samples.num_pairs, 1), ("--samples", samples.num_samples, 2)]
    for option, value, least in limits:
        if value < least:
            raise DnoError(f"{option} is {value}; it must be at least {least}")
    if tau is not None and not any(games.ALGORITHMS[name].takes_tau for name in algorithms):
        raise DnoError(f"--tau is {tau}, but none of {', '.join(algorithms)} has a tau; leave the option out")
    # What is asked of each algorithm: (name, from samples, eta, tau). The sampled ones know constant etas only.
    asked: list[tuple[str, bool, float | None, float]] = []
    for name in algorithms:
        entry = games.ALGORITHMS[name]
        own_eta, own_tau = DEFAULT_KNOBS.get(name, (None, 0.1 if entry.needs_tau else 0.0))
        chosen_eta = own_eta if eta is None else eta
        chosen_tau = own_tau if tau is None or not entry.takes_tau else tau
        asked.append((name, False, chosen_eta, chosen_tau))
        if samples is not None:
            asked.append((name, True, 1.0 if chosen_eta is None else chosen_eta, chosen_tau))
    for name, _, used, pull in asked:  # one step of each finds what cannot be used, before the others are played
        try:
            games.solve(P, algorithm=name, iterations=1, eta=used, tau=pull, initial=start)
        except ValueError as error:
            raise DnoError(f"--algorithms {name}: {error}; change --eta or --tau") from None

    played = []
    for name, drawn, used, pull in asked:
        if drawn and samples is not None:
            from dno_jax.games.sampled import solve_sampled

            solution = solve_sampled(
                P,
                algorithm=name,
                iterations=iterations,
                eta=1.0 if used is None else used,
                tau=pull,
                initial=start,
                num_pairs=samples.num_pairs,
                num_samples=samples.num_samples,
                seed=samples.seed,
            )
        else:
            solution = games.solve(P, algorithm=name, iterations=iterations, eta=used, tau=pull, initial=start)
        aims = pull > 0.0 and name not in _FOLLOWS
        regularised = games.regularised_nash(P, reference=start, tau=pull) if aims else None
        played.append(Played(name=name, eta=used, tau=pull, solution=solution, sampled=drawn, regularised=regularised))
    return played


def game_table(played: Sequence[Played], P: np.ndarray) -> Table:
    """One row per run: gaps of pi_T and unif(pi_1 .. pi_T); for regularised ones how far their own Nash policy is."""
    caption = "average: unif(pi_1 .. pi_T); pi_tau: the Nash policy of the regularised game, beside that of the game"
    table = Table(title="duality gaps", caption=caption, box=SIMPLE_HEAD)
    table.add_column("algorithm", no_wrap=True)
    for column in ("eta", "tau", "gap of pi_T", "gap of average", "KL to pi_tau", "gap of pi_tau"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in played:
        aim = ("", "")
        if run.regularised is not None:
            # pi_T, the last policy of the average, rather than the pi_{T+1} after it.
            distance = np.mean(games.kl(run.regularised, run.solution.policies[-2]))
            aim = (_short(float(distance)), _short(games.duality_gap(P, run.regularised)))
        table.add_row(
            "  from samples" if run.sampled else run.name,
            _eta(run),
            f"{run.tau:g}" if run.tau else "",
            _short(float(run.solution.gaps[-2])),
            _short(float(run.solution.average_gaps[-1])),
            *aim,
        )
    return table


def nash_lines(P: np.ndarray) -> list[str]:
    """Say the exact Nash policy of each prompt, response: probability; what it never plays is left out."""
    lines = []
    policies = games.nash(P).reshape(-1, P.shape[-1])
    for prompt, policy in enumerate(policies):
        shown = ", ".join(f"{response}: {share:.4f}" for response, share in enumerate(policy) if share > 1e-9)
        lines.append(f"Nash policy{f' of prompt {prompt}' if len(policies) > 1 else ''}  {shown}")
    return lines


def advice() -> str:
    """Say which scheme is to be preferred where rewards are estimates, as they are in language models."""
    return (
        "exact rewards flatter optimism: with few opponents per reward the proximal last iterates (comal, mpo) stay "
        "nearer; in a run: outer.scheme=proximal with reference.tau >= 0.1 (docs/theory.md, Noise)"
    )


def save_plot(played: Sequence[Played], path: Path, *, title: str) -> None:
    """Draw gap against iteration, of last iterates and of averages, and write the file whole or not at all.

    Args:
        path: its suffix (`SUFFIXES`) is the format.

    Raises:
        DnoError: another suffix, or a place that cannot be written.
    """
    check_plot_path(path)
    from matplotlib.figure import Figure  # without pyplot there is neither window nor global state

    figure = Figure(figsize=(11.0, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    names = list(dict.fromkeys(run.name for run in played))
    for run in played:
        style = {"color": f"C{names.index(run.name) % 10}", "linestyle": "--" if run.sampled else "-", "linewidth": 1.2}
        label = f"{run.name} (sampled)" if run.sampled else run.name
        steps = np.arange(1, len(run.solution.average_gaps) + 1)
        for panel, gaps in zip(panels, (run.solution.gaps[:-1], run.solution.average_gaps), strict=True):
            panel.plot(steps, np.maximum(gaps, SMALLEST_GAP), label=label, **style)
    for panel, name in zip(panels, ("last iterate", "average of all iterates"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="iteration", title=name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("duality gap")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle(title)

    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format=path.suffix[1:])
        temporary.replace(path)
    except OSError as error:
        raise DnoError(f"--out {path} cannot be written: {error.strerror}; name another place") from None
    finally:
        temporary.unlink(missing_ok=True)


def _eta(run: Played) -> str:
    if run.eta is not None:
        return f"{run.eta:g}"
    own = games.ALGORITHMS[run.name].default_eta is games.nash_md_schedule
    return "schedule" if own else "1"


def _short(value: float) -> str:
    return f"{max(value, 0.0):.2g}"
