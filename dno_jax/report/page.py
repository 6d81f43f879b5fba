"""report.html: what a run's judge was worth and what it cost, iteration by iteration, in one file without scripts."""

from __future__ import annotations

import json
from typing import Any

import jinja2

from dno_jax.config import RunConfig
from dno_jax.files import write_atomically
from dno_jax.report.judge import NAMES
from dno_jax.report.tables import shares_text
from dno_jax.run_dir import RunDir

_TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ run }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
.bar { background: #69c; height: .8em } .warning { color: #a50 } .judge { color: #666; overflow-wrap: anywhere }
</style>
<h1>{{ run }}</h1>
{% for page in iterations %}
<h2>Iteration {{ page.iteration }}</h2>
<p class="judge">{{ page.judge }}</p>
{% if page.cut %}<p>Cut at the limit of tokens: {{ page.cut }}.</p>
{% endif %}{% for sentence in page.warnings %}<p class="warning">warning: {{ sentence }}</p>
{% endfor %}
<table>
<tr><th></th><th>value</th><th>95 % interval</th><th>over</th></tr>
{% for name, figure in page.figures %}
<tr><td>{{ name }}</td><td>{{ "%.3f" % figure.value }}</td>
<td>{% if figure.low is not none %}{{ "%.3f" % figure.low }} to {{ "%.3f" % figure.high }}{% endif %}</td>
<td>{{ "{:,}".format(figure.n) }}</td></tr>
{% endfor %}
</table>
{% for source, bins in page.histograms %}
<table>
<tr><th>points of {{ source }}</th><th>responses</th><th></th></tr>
{% for edge, count, share in bins %}
<tr><td>{{ edge }}</td><td>{{ "{:,}".format(count) }}</td>
<td><div class="bar" style="width: {{ "%.1f" % (12 * share) }}em"></div></td></tr>
{% endfor %}
</table>
{% endfor %}
{% if page.rates %}
<table>
<tr><th>policy {{ page.iteration + 1 }} beats</th><th>win rate</th><th>95 % interval</th></tr>
{% for opponent, rate in page.rates %}
<tr><td>{{ opponent }}</td><td>{{ "%.3f" % rate.rate }}</td>
<td>{{ "%.3f" % rate.low }} to {{ "%.3f" % rate.high }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% endfor %}
{% if usd is not none %}<p>Verdicts and teachers cost {{ "$%.2f" % usd }} so far.</p>{% endif %}
</html>
"""


def write_report(run_dir: RunDir, config: RunConfig) -> None:
    """Write the report of all iterations that have been judged, from their manifests and the receipts."""
    pages = [page for t in range(config.iterations) if (page := _page(run_dir, t))]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(_TEMPLATE).render(run=run_dir.path.name, iterations=pages, usd=_paid(run_dir))
    write_atomically(run_dir.report_path, text)


def _page(run_dir: RunDir, iteration: int) -> dict[str, Any] | None:
    judged = run_dir.stage("annotate", iteration).manifest()
    if judged is None or "quality" not in judged.details:
        return None
    evaluated = run_dir.stage("evaluate", iteration).manifest()
    sampled = run_dir.stage("sample", iteration).manifest()
    figures = judged.details["quality"]
    rates = evaluated.details.get("win_rates", {}) if evaluated is not None else {}
    scores = figures.get("scores", {"mean": {}, "bins": {}})
    named = [(title, figures[name]) for name, title in NAMES.items() if name in figures]
    return {
        "iteration": iteration,
        "judge": judged.details["judge"],
        "cut": shares_text(sampled.details.get("cut", {})) if sampled is not None else "",
        "warnings": judged.details.get("warnings", ()),
        "figures": named + [(f"points of {source}", mean) for source, mean in scores["mean"].items()],
        "histograms": [(source, _bars(bins)) for source, bins in scores["bins"].items()],
        "rates": [(_player(name), rate) for name, rate in rates.items() if rate],
    }


def _player(name: str) -> str:
    return "the teacher" if name == "gold" else f"policy {name}"


def _bars(bins: dict[str, int]) -> list[tuple[str, int, float]]:
    most = max(bins.values())
    return [(edge, count, count / most) for edge, count in bins.items()]


def _paid(run_dir: RunDir) -> float | None:
    """Dollars, where the run has receipts."""
    if not run_dir.receipts_path.exists():
        return None
    return json.loads(run_dir.receipts_path.read_text()).get("usd")
