"""What was measured of policies, on the terminal: the win-rate matrix, suites, the guard, and runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dno_jax.report.tables import stacked
from dno_jax.run_dir import RunDir

_SHOWN = 60  # characters of a field's value


def last_matrix(run_dir: RunDir, *, iterations: int) -> RenderableType:
    """The matrix of a run's last evaluation; nothing where there is none yet."""
    manifests = (run_dir.stage("evaluate", t).manifest() for t in reversed(range(iterations)))
    found = next((manifest for manifest in manifests if manifest is not None), None)
    return Group() if found is None else matrix_table(found.details)


def matrix_table(details: Mapping[str, Any]) -> RenderableType:
    """The win-rate matrix of an evaluation and what it says; nothing where nothing was compared.

    Args:
        details: of the evaluation's manifest.
    """
    found = details.get("comparison")
    guard = _guard(details.get("guard"))
    if not found:
        return Group(*guard)
    names, different = found["players"], {(one["player"], one["opponent"]) for one in found["different"]}
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, other in enumerate(names):
            rate = found["rates"][i][j]
            told = (name, other) in different or (other, name) in different
            cells.append("" if i == j or rate is None else f"{100 * rate:.0f}{'*' if told else ''}")
        rows.append((name, *cells))
    table = stacked("win rates, %", ("", *names), rows)
    legend = Text("of the row over the column; * told apart, over all pairs at once")
    said = (*sentences(found), *label_sentences(details))
    return Group(table, legend, *(Text(sentence) for sentence in said), *guard)


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What a comparison says besides its rates.

    Args:
        found: as `Matrix.as_dict` returns it.
    """
    said = []
    if found.get("stop"):
        said.append(found["stop"])
    if (choice := found.get("choice")) and len(found["policies"]) > 1:
        alike = f", not told apart from {', '.join(choice['alike'])}" if choice["alike"] else ""
        said.append(
            f"best on these prompts: {choice['best']}{alike}; choosing it on them flatters its mean win rate by about "
            f"{100 * choice['flattery']:.1f} points"
        )
    if cycles := found.get("cycles"):
        said.append(
            f"cycles: {cycles['observed']} of {cycles['triples']} triples, {cycles['expected']:.1f} expected of a "
            "ranking with this much noise"
        )
    if (nash := found.get("nash")) and len(found["policies"]) > 1:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in nash["shares"].items() if share > 0.005)
        gap = "" if nash["gap"] is None else f"; gap {nash['gap']:.3f} on prompts that it was not made from"
        said.append(f"Nash mixture of the policies: {shares}{gap}")
    return said


def label_sentences(details: Mapping[str, Any]) -> list[str]:
    """What labelled pairs say of the judge, and the newest policy's win rates corrected for its errors.

    Args:
        details: of the evaluation's manifest.
    """
    labels = details.get("labels")
    if not labels:
        return []
    if labels["why"]:
        return [f"win rates are not corrected for the judge's errors: {labels['why']}"]
    errors = ", ".join(
        f"{name} {_rate(labels[name])} % of {labels[name]['n']}" for name in ("sensitivity", "specificity")
    )
    rates = ", ".join(f"{name} in {_rate(found)} %" for name, found in labels["corrected"].items())
    said = [f"policy {details['policy']} beats {rates}"]
    if beyond := labels.get("beyond"):
        told = "the judge's rate is beyond what such errors allow: it may err otherwise here than on the labelled pairs"
        said.append(f"over {', '.join(beyond)} {told}")
    return [f"corrected for the judge's errors ({errors} labels): {'; '.join(said)}"]


def suite_table(results: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Results of published suites, a line each; nothing where there are none."""
    if not results:
        return Group()
    rows = [
        (
            f"{found.get('run', '')} {found['policy']}".strip(),
            f"{found['win_rate']:.2f}",
            "" if found["standard_error"] is None else f"{found['standard_error']:.2f}",
            _controlled(found),
            f"{found['n_total']}",
            f"{found['avg_length']:.0f}",
        )
        for found in results
    ]
    columns = ("policy", "win rate", "error", "length-controlled", "prompts", "characters")
    table = stacked(f"{results[0]['suite']}, % of wins over the reference", columns, rows)
    notes = []
    if not all(found["lc_is_official"] for found in results):
        notes.append(Text("~ without the suite's difficulties and gamed baselines (--tables)"))
    if not all(found["template"] for found in results):
        notes.append(Text("judged by another text than the suite's own: no number for its leaderboard"))
    return Group(table, *notes)


def _controlled(found: Mapping[str, Any]) -> str:
    rate = found["length_controlled_winrate"]
    return "" if rate is None else f"{rate:.2f}{'' if found['lc_is_official'] else '~'}"


def comparison_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """Runs side by side.

    Args:
        found: as `stages.compare.Comparison.as_dict` returns it.
    """
    names = [run["name"] for run in found["runs"]]
    tables: list[RenderableType] = [Text(f"note: {note}", style="yellow") for note in found["notes"]]
    fields = [(field, *(_value(values[name]) for name in names)) for field, values in found["differences"].items()]
    title = "what the configurations differ in"
    table = Table(title=title, box=SIMPLE_HEAD, min_width=len(title))
    table.add_column("", no_wrap=True)
    for column in names:
        table.add_column(column, overflow="fold")
    for row in fields:
        table.add_row(*row)
    tables.append(table if fields else Text("the configurations differ in nothing but where the runs lie"))
    tables.append(_policies(found["runs"]))
    suites = [result | {"run": run["name"]} for run in found["runs"] for result in run["suites"]]
    tables += [
        suite_table([result for result in suites if result["suite"] == suite])
        for suite in dict.fromkeys(result["suite"] for result in suites)
    ]
    if judged := found["judged"]:
        told = ", ".join(f"{name} by policy {policy}" for name, policy in judged["policies"].items())
        tables.append(Text(f"judged against each other by {judged['judge']} on {judged['prompts']} prompts: {told}"))
        tables.append(matrix_table(judged))
        tables += [Text(f"warning: {sentence}", style="yellow") for sentence in judged["warnings"]]
    return tables


def _policies(runs: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A line per run and policy: what it wins by the run's own judge, its length, and the guard's questions."""
    rows = []
    for run in runs:
        for details in run["iterations"].values():
            policy = details["policy"]
            rates = [_rate(details["win_rates"].get(name)) for name in ("0", str(policy - 1), "gold")]
            lengths = details.get("lengths", {}).get(str(policy)) or {}
            accuracy = (details.get("guard") or {}).get("accuracy", {}).get(str(policy))
            words = f"{lengths['mean_words']:.1f}" if lengths else ""
            guard = f"{100 * accuracy['value']:.1f}" if accuracy else ""
            best = "* " if policy == run["best"] else ""
            rows.append((f"{best}{run['name']} {policy}", *rates, words, guard))
    if not rows:
        return Text("none of the runs has evaluated a policy yet")
    columns = ("policy", "beats 0", "beats previous", "beats gold", "words", "guard")
    used = [i for i in range(len(columns)) if not i or any(row[i] for row in rows)]
    picked = [tuple(row[i] for i in used) for row in rows]
    table = stacked("policies (* best)", [columns[i] for i in used], picked)
    return Group(table, Text("win rates by each run's own judge"))


def _guard(found: Mapping[str, Any] | None) -> list[Text]:
    if not found:
        return []
    told = ", ".join(f"policy {name} {100 * share['value']:.1f} %" for name, share in found["accuracy"].items())
    gone = ", ".join(str(policy) for policy in found.get("not_asked", ()))
    told += f"; not asked, their weights being gone: {gone}" if gone else ""
    return [Text(f"guard: right answers to {found['questions']} questions: {told}")] + [
        Text(f"warning: {sentence}", style="yellow") for sentence in found["warnings"]
    ]


def _rate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{100 * found.get('rate', found.get('value')):.0f} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
