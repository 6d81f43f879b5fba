"""Training curves: what metrics.jsonl says of every step, iterations one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dno_jax.report.facts import Facts
from dno_jax.report.shapes import Figure, Shape

TRAINING = "training"
_MOST_POINTS = 400  # of a curve
# Name, title, note, and column of metrics.jsonl -> how the curve is called.
_CURVES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("loss", "Loss", "The loss of each step; a training begins at log 2 = 0.693.", {"loss": "loss"}),
    (
        "logprobs",
        "Log-probabilities of responses",
        "Mean log-probability (nats) of chosen and rejected responses. Both falling is usual; chosen falling as fast "
        "as rejected is not.",
        {"chosen_logprob": "chosen", "rejected_logprob": "rejected"},
    ),
    (
        "rewards",
        "Implicit rewards",
        "beta times the log-ratio to the policy before, of chosen and rejected responses; what lies between is learnt.",
        {"chosen_reward": "chosen", "rejected_reward": "rejected"},
    ),
    ("grad_norm", "Gradient norm", "Of each step, before clipping.", {"grad_norm": "gradient norm"}),
    ("kl", "Drift", "Estimated KL from the policy before, nats a response.", {"kl": "KL"}),
    ("accuracy", "Accuracy", "Share of a batch's pairs in which chosen gains on rejected.", {"accuracy": "accuracy"}),
)


def curves(facts: Facts) -> Iterator[Figure]:
    """Yield the curves that the run has points for. Long ones are thinned: every n-th step, and the last."""
    trainings: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in facts.metrics:
        if {"iteration", "stage", "step", "loss"} <= row.keys():
            trainings.setdefault((row["iteration"], row["stage"]), []).append(row)
    for name, title, note, columns in _CURVES:
        rows: list[tuple[Any, ...]] = []
        before = 0
        for (iteration, stage), steps in sorted(trainings.items()):
            thinned = _thinned(steps, most=max(2, _MOST_POINTS // len(trainings)))
            rows += [
                (before + row["step"], called, row[column], iteration, stage, row["step"])
                for column, called in columns.items()
                for row in thinned
                if row.get(column) is not None
            ]
            before += steps[-1]["step"] + 1
        if rows:
            header = ("step of all", "of", "value", "iteration", "training", "step")
            yield Figure(name, TRAINING, title, note, header, rows, Shape("lines", "step of all", "value", "of"))


def _thinned(steps: list[dict[str, Any]], *, most: int) -> list[dict[str, Any]]:
    stride = -(-len(steps) // most)
    return steps if stride <= 1 else [*steps[:-1:stride], steps[-1]]
