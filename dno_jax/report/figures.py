"""The figures of a run that stand in its manifests and receipts: policies, pairs, judge, time and money."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dno_jax.report.comparison import BETTER, comparison_figures, measured_figures
from dno_jax.report.facts import Facts
from dno_jax.report.judge import NAMES
from dno_jax.report.shapes import Figure, Shape
from dno_jax.report.training import ITERATION

PAIRS, JUDGE, COSTS, SAMPLER = "pairs", "judge", "costs", "sampler"


def figures(facts: Facts) -> Iterator[Figure]:
    """Yield every figure that the run has numbers for; one that they do not make is told, and the others are shown."""
    others = (_funnel, _kinds, _cut, _judge, _scores, _seconds, _money, _audit)
    for make in (_win_rates, _lengths, comparison_figures, measured_figures, *others):
        try:
            made = make(facts)
            found = [made] if isinstance(made, Figure) else list(made)
        except (LookupError, TypeError, ValueError) as error:
            name = make.__name__.strip("_").replace("_", " ")
            facts.tell(f"The figure of {name} is left out: {type(error).__name__} {error} in what the stages noted.")
            continue
        yield from (figure for figure in found if figure.rows)


def pair_kind(kind: str) -> str:
    """T>S for gold>student: T the teacher's response, S a sample of the policy, D one of the data."""
    return kind.replace("student", "S").replace("gold", "T").replace("data", "D")


def _win_rates(facts: Facts) -> Figure:
    rows = []
    for iteration, details in facts.details("evaluate"):
        rates = details.get("win_rates", {})
        for name, shown in {str(iteration): "the previous policy", "0": "policy 0", "gold": "the teacher"}.items():
            if rate := rates.get(name):
                rows.append((iteration + 1, shown, *_interval(rate, "rate"), rate.get("prompts")))
    order = ["policy 0", "the previous policy", "the teacher"]
    rows.sort(key=lambda row: (order.index(row[1]), row[0]))
    return Figure(
        "win_rates",
        BETTER,
        "Win rate by policy",
        "Share of held-out comparisons that a policy wins, ties counted half, with 95 % intervals by prompt. "
        "Above the line at 50 % it beats its opponent.",
        ("policy", "against", "win rate", "low", "high", "prompts"),
        rows,
        Shape("intervals", "policy", "win rate", "against", percent=True, rule=0.5),
    )


def _lengths(facts: Facts) -> Figure:
    """Of held-out responses; the interval is of the mean, by responses."""
    found: dict[int, dict[str, Any]] = {}
    for _, details in facts.details("evaluate"):
        found |= {int(policy): own for policy, own in details.get("lengths", {}).items() if own}
    where = "held-out responses"
    if not found:  # nothing is held out: those that were trained on
        found = {t: details for t, details in facts.details("sample") if details.get("responses")}
        where = "sampled responses"
    rows = []
    for policy, own in sorted(found.items()):
        half = 1.96 * own["std_words"] / max(own["responses"], 1) ** 0.5
        mean = own["mean_words"]
        rows.append((policy, where, mean, round(mean - half, 2), round(mean + half, 2), own["mean_tokens"]))
    return Figure(
        "lengths",
        BETTER,
        "Length by policy",
        f"Mean words of {where}, with 95 % intervals of the mean. A win rate that grows with the length may be the "
        "judge's liking for length.",
        ("policy", "of", "words", "low", "high", "tokens"),
        rows,
        Shape("intervals", "policy", "words"),
    )


def _funnel(facts: Facts) -> Figure:
    rows = []
    for iteration, manifest in facts.of("pair"):
        kept = {"kept, new": manifest.details.get("new"), "kept, replayed": manifest.details.get("replayed")}
        rows += [(iteration, what, count) for what, count in [*kept.items(), *manifest.dropped.items()] if count]
    return Figure(
        "funnel",
        PAIRS,
        "What became of the pairs",
        "Pairs of candidates by what became of them: trained on, or left out and why.",
        ("iteration", "what", "pairs"),
        rows,
        Shape("bars", "pairs", "iteration", "what"),
    )


def _kinds(facts: Facts) -> Figure:
    rows = [
        (iteration, pair_kind(kind), count)
        for iteration, details in facts.details("pair")
        for kind, count in sorted(details.get("kinds", {}).items())
    ]
    return Figure(
        "kinds",
        PAIRS,
        "New pairs by kind",
        "Who won against whom: T is the teacher's response, S a sample of the policy, D a response of the data. "
        "T>S fades as the policy catches up.",
        ("iteration", "kind", "pairs"),
        rows,
        Shape("bars", "pairs", "iteration", "kind"),
    )


def _cut(facts: Facts) -> Figure:
    rows = [
        (iteration, f"{source} ({stage})", share)
        for stage in ("teach", "sample", "pair")
        for iteration, details in facts.details(stage)
        for source, share in _shares(details.get("cut")).items()
    ]
    return Figure(
        "cut",
        PAIRS,
        "Responses cut at the limit of tokens",
        "Share of responses that did not end by themselves.",
        ("iteration", "of", "share"),
        rows,
        Shape("bars", "share", "iteration", "of", percent=True),
    )


def _shares(cut: Any) -> dict[str, float]:
    return {name: share for name, share in cut.items() if share} if isinstance(cut, dict) else {}


def _judge(facts: Facts) -> Figure:
    rows = []
    for iteration, details in facts.details("annotate"):
        quality = details.get("quality") or {}
        for name, title in NAMES.items():
            if figure := quality.get(name):
                rows.append((iteration, title, *_interval(figure, "value"), figure["n"]))
    return Figure(
        "judge",
        JUDGE,
        "The judge's figures",
        "What an honest judge has near one half (places, order), or low (ties, flips, cycles), with 95 % intervals.",
        ("iteration", "figure", "value", "low", "high", "over"),
        rows,
        Shape("intervals", "iteration", "value", "figure", percent=True),
    )


def _scores(facts: Facts) -> Figure:
    rows = []
    for iteration, details in facts.details("annotate"):
        for source, bins in ((details.get("quality") or {}).get("scores") or {"bins": {}})["bins"].items():
            rows += [(f"{source}, iteration {iteration}", float(edge), count) for edge, count in bins.items()]
    return Figure(
        "scores",
        JUDGE,
        "Points by source",
        "How many responses were given how many points: of the rubric, or the share of its pool that a response beats.",
        ("of", "points", "responses"),
        rows,
        Shape("histogram", "points", "responses", "of"),
    )


def _seconds(facts: Facts) -> Figure:
    rows: list[tuple[Any, ...]] = []
    for (iteration, stage), manifest in sorted(facts.manifests.items(), key=lambda item: item[0][0]):
        rows.append((iteration, stage, round(manifest.seconds, 1)))
    for row in facts.metrics:
        if row.get("stage") == ITERATION and row.get("share_waiting") and row.get("wall_seconds"):
            rows.append((row["iteration"], "waiting", round(row["share_waiting"] * row["wall_seconds"], 1)))
    return Figure(
        "seconds",
        COSTS,
        "Time by stage",
        "Seconds of each stage's last call. Annotation runs beside sampling; waiting is what no finished call covers.",
        ("iteration", "stage", "seconds"),
        sorted(rows, key=lambda row: row[0]),
        Shape("bars", "seconds", "iteration", "stage"),
    )


def _money(facts: Facts) -> Figure:
    rows = [
        (str(place).rsplit("/", 1)[-1], model, own.get("requests"), own.get("tokens_in"), own.get("tokens_out"),
         round(float(own.get("usd") or 0.0), 4))
        for place, store in (facts.receipts.get("stores") or {}).items()
        for model, own in sorted((store.get("models") or {}).items())
    ]  # fmt: skip
    return Figure(
        "money",
        COSTS,
        "Dollars by model",
        "What judges and teachers were paid, by the store that holds their answers.",
        ("store", "model", "requests", "tokens in", "tokens out", "dollars"),
        rows,
        Shape("bars", "dollars", "model", "store") if any(row[-1] for row in rows) else None,
    )


def _audit(facts: Facts) -> Figure:
    rows = []
    for iteration, details in facts.details("sample"):
        if own := details.get("audit"):
            numbers = (own.get(name) for name in ("mean", "max", "error", "bound"))
            rows.append((iteration, own["responses"], own["tokens"], *numbers, own.get("dtype")))
    return Figure(
        "audit",
        SAMPLER,
        "Sampler and trainer compared",
        "Log-probabilities of the same tokens by the sampler and by the trainer: difference per token in nats, and the "
        "error of a response over the root of its tokens, which the bound is for.",
        ("iteration", "responses", "tokens", "mean", "max", "error", "bound", "dtype"),
        rows,
    )


def _interval(found: dict[str, Any], value: str) -> tuple[Any, Any, Any]:
    return found.get(value), found.get("low"), found.get("high")
