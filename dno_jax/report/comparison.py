"""What the last evaluation says of all players together: who beats whom, at equal length too, and which mixture holds.

An evaluation keeps it under `comparison` in its details; what is not there is said to be not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dno_jax.files import read_note
from dno_jax.report.facts import Facts
from dno_jax.report.measured import label_sentences
from dno_jax.report.shapes import Figure, Shape

BETTER = "better"


def player(name: str) -> str:
    """What a player of the held-out game is called."""
    known = {"gold": "the teacher", "average": "the mixture"}
    return f"policy {name}" if name.isdecimal() else known.get(name, name)


def _turned(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The same comparison, seen by the opponent."""
    ends = {"value": "value", "low": "high", "high": "low"}
    numbers = {end: None if pair[other] is None else round(1.0 - pair[other], 4) for end, other in ends.items()}
    return {**pair, "player": pair["opponent"], "opponent": pair["player"], **numbers}


def comparison_figures(facts: Facts) -> Iterator[Figure]:
    """Yield the matrix, win rates at equal length, neighbours, and the Nash mixture; without rows where unknown."""
    details = facts.evaluated or {}
    found = details.get("comparison") or {}
    names = found.get("players") or [str(index) for index in range(len(details.get("matrix", ())))]
    rates = found.get("rates") or details.get("matrix", ())
    ends = {(pair["player"], pair["opponent"]): (pair["low"], pair["high"]) for pair in found.get("pairs", ())}
    yield Figure(
        "matrix",
        BETTER,
        "Who beats whom",
        "How often the player of a row beats the player of a column on held-out prompts.",
        ("player", "against", "win rate", "low", "high"),
        [
            (player(one), player(other), rate, *ends.get((one, other), (None, None)))
            for one, row in zip(names, rates, strict=True)
            for other, rate in zip(names, row, strict=True)
            if one != other and rate is not None
        ],
        Shape("heat", "against", "win rate", "player", percent=True),
    )
    controlled = [
        pair
        for one in found.get("length_controlled", ())
        for pair in (one, _turned(one))
        if pair["opponent"] == "gold" or (pair["opponent"] == "0" and pair["player"].isdecimal())
    ]
    yield Figure(
        "length_controlled",
        BETTER,
        "Win rate at equal length",
        "The win rate that a model of length predicts for answers as long as the opponent's, with 95 % intervals.",
        ("player", "against", "win rate", "low", "high", "prompts"),
        [
            (player(pair["player"]), player(pair["opponent"]), pair["value"], pair["low"], pair["high"],
             pair.get("prompts"))
            for pair in controlled
        ],
        Shape("intervals", "player", "win rate", "against", percent=True, rule=0.5),
    )  # fmt: skip
    labels = details.get("labels") or {}
    yield Figure(
        "corrected",
        BETTER,
        "Win rate by the labels' measure",
        "The newest policy's win rates, corrected for what the judge gets wrong on labelled pairs; the 95 % intervals "
        "carry the uncertainty of both.",
        ("policy", "against", "win rate", "low", "high", "by the judge"),
        [
            (player(str(details["policy"])), player(name), one["value"], one["low"], one["high"],
             details["win_rates"][name]["rate"])
            for name, one in labels.get("corrected", {}).items()
        ],
        Shape("intervals", "against", "win rate", percent=True, rule=0.5),
    )  # fmt: skip
    yield Figure(
        "neighbours",
        BETTER,
        "Each policy against the one before it",
        "Intervals that hold for all neighbours at once: where one includes 50 % the two are not told apart.",
        ("policy", "against", "win rate", "low", "high", "different"),
        [
            (player(one["player"]), player(one["opponent"]), one["rate"], one["low"], one["high"],
             "yes" if one.get("different") else "no")
            for one in found.get("neighbours", ())
        ],
        Shape("intervals", "policy", "win rate", percent=True, rule=0.5),
    )  # fmt: skip
    nash = found.get("nash") or {}
    yield Figure(
        "nash",
        BETTER,
        "Nash mixture over the policies",
        "Shares of the mixture that no policy beats, and twice what a policy's strongest rival wins of it beyond one "
        "half (0: nobody beats it).",
        ("policy", "share", "gap"),
        [(player(name), share, nash.get("gaps", {}).get(name)) for name, share in nash.get("shares", {}).items()],
        Shape("bars", "share", "policy", percent=True),
    )


def measured_figures(facts: Facts) -> Iterator[Figure]:
    """Yield what else policies were asked: the guard's questions, and published suites."""
    guard = (facts.evaluated or {}).get("guard") or {}
    yield Figure(
        "guard",
        BETTER,
        "Questions with answers",
        "Share of the guard's questions that each policy answers rightly, with 95 % intervals: what a judge likes may "
        "cost them.",
        ("policy", "right", "low", "high", "questions"),
        [
            (player(name), own["value"], own.get("low"), own.get("high"), guard.get("questions"))
            for name, own in guard.get("accuracy", {}).items()
        ],
        Shape("intervals", "policy", "right", percent=True),
    )
    root = facts.run_dir.path / "suites"
    paths = sorted(root.glob("*/policy-*/results.json"), key=str) if root.exists() else []
    found = [(path.parent.parent.name, facts.tried(lambda path=path: read_note(path))) for path in paths]
    yield Figure(
        "suites",
        BETTER,
        "Published suites",
        "Win rates over the suite's reference in percent, with standard errors, and at equal length.",
        ("suite", "policy", "win rate", "standard error", "length-controlled", "prompts", "characters"),
        [
            (suite, player(str(own["policy"])), own["win_rate"], own.get("standard_error"),
             own.get("length_controlled_winrate"), own.get("n_total"), own.get("avg_length"))
            for suite, own in found
            if own
        ],
    )  # fmt: skip


def comparison_words(facts: Facts) -> list[str]:
    """What the comparison says in sentences, its warnings first; that it was not made, where it was not."""
    details = facts.evaluated
    if details is None:
        return []
    guard = details.get("guard") or {}
    said = [f"warning: {sentence}" for sentence in (*details.get("warnings", ()), *guard.get("warnings", ()))]
    if gone := guard.get("not_asked"):
        names = ", ".join(player(str(policy)) for policy in gone)
        said.append(f"Not asked the guard's questions, their weights being gone: {names}.")
    if "judge" in details:
        said.append(f"Held-out answers were judged by {details['judge']}.")
    found: dict[str, Any] = details.get("comparison") or {}
    if not found:
        return [*said, "Not measured: win rates at equal length, cycles, and the Nash mixture of the policies."]
    if found.get("stop"):
        said.append(f"Stop rule: {found['stop']}.")
    if choice := found.get("choice"):
        alike = " and ".join(player(name) for name in choice["alike"])
        said.append(
            f"Best by the mean over all others: {player(choice['best'])}"
            + (f"; not told apart from it: {alike}" if alike else "")
            + f". Choosing the best of several on these prompts flatters it by about {100 * choice['flattery']:.1f} "
            "points."
        )
    if cycles := found.get("cycles"):
        said.append(
            f"Cycles (a beats b beats c beats a): {cycles['observed']} of {cycles['triples']} triples; a ranking with "
            f"this much noise would show {cycles['expected']:.1f}."
        )
    said += label_sentences(details)
    if not found.get("length_controlled"):
        said.append("Not measured: win rates at equal length.")
    return said
