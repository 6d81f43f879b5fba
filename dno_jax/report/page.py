"""report.html: a run in one page that needs no network: figures, tables, and samples to read.

What models, judges and servers wrote is data in it: it stands in JSON, is put in place as text, and no script but the
page's own may run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from dno_jax.config import RunConfig, dump_config
from dno_jax.console import say
from dno_jax.display import hide_keys, printable
from dno_jax.errors import DnoError
from dno_jax.files import write_atomically
from dno_jax.records import Prompt
from dno_jax.report import figures as known
from dno_jax.report import plots
from dno_jax.report.comparison import BETTER, comparison_words
from dno_jax.report.curves import TRAINING, curves
from dno_jax.report.distributions import distributions
from dno_jax.report.facts import Facts, read_facts
from dno_jax.report.judge import quality_table
from dno_jax.report.kept import Kept
from dno_jax.report.packing import browser
from dno_jax.report.samples import lengths, places
from dno_jax.report.shapes import Figure
from dno_jax.report.summary import is_measured, iteration_table, policy_table, stage_statuses, status_table, told_policy
from dno_jax.report.tables import PlainTable, duration, plain
from dno_jax.report.training import training_table
from dno_jax.run_dir import RunDir
from dno_jax.stage_dir import stage_names

_SECTIONS = (
    (BETTER, "Did it get better?"),
    ("samples", "Samples"),
    (known.PAIRS, "Pairs"),
    (TRAINING, "Training"),
    (known.JUDGE, "The judge"),
    (known.COSTS, "Time and money"),
    (known.SAMPLER, "Sampler audit"),
    ("setting", "Configuration and environment"),
)


@dataclass(frozen=True)
class _Part:
    """A section of the page: what it says in words and tables, before its figures."""

    name: str
    title: str
    tables: list[PlainTable]
    words: list[str]
    figures: list[Figure]
    texts: list[tuple[str, str]]


def write_report(
    run_dir: RunDir,
    config: RunConfig,
    *,
    pictures: bool = True,
    held_out: Iterable[Prompt] | None = None,
    kept: Kept | None = None,
) -> epath.Path:
    """Write the report of a run in whatever state it is; return the page's path.

    Args:
        pictures: write every figure beside the page too, as CSV and, where plots can be drawn, as SVG.
        held_out: the held-out prompts, where they have been read already.
        kept: what earlier reports of the run were made of; the page is the same without.
    """
    kept = Kept() if kept is None else kept
    facts = read_facts(run_dir, config)
    drawn = plots.installed()
    if not drawn:
        facts.tell(f"Plots are left out, their numbers are here: {plots.EXTRA} brings what draws them.")
    samples = places(facts, held_out, kept=kept)
    found = [*known.figures(facts), *curves(facts), *distributions(facts, lengths(samples), kept=kept)]
    packed = browser(samples)
    notes = [note for place in samples for note in place.notes]
    parts = _parts(facts, found, notes=[*notes, packed.note] if packed.note else notes)
    specs = {
        figure.name: kept.once(repr(figure), functools.partial(plots.specification, figure))
        for figure in found
        if drawn and figure.shape
    }
    library, script = _script(plots.library() if specs else ""), _script(_asset("page.js"))
    text = _template().render(
        run=printable(run_dir.path.name),
        tiles=_tiles(facts),
        missing=[printable(sentence) for sentence in facts.missing],
        parts=parts,
        specs={name: _json(spec) for name, spec in specs.items()},
        style=Markup(_asset("page.css")),
        library=library,
        script=script,
        hashes=" ".join(f"'sha256-{_sha256(text)}'" for text in (library, script) if text),
        chunks=[Markup(chunk) for chunk in packed.chunks],
        num_prompts=packed.prompts,
        places=[place.name for place in samples if place.prompts],
    )
    _write(run_dir.report_path, text)
    kept.turn()
    if pictures:
        _write_pictures(run_dir.report_files_path, found, specs)
    return run_dir.report_path


def refresh(
    run_dir: RunDir,
    config: RunConfig,
    *,
    pictures: bool = False,
    held_out: Iterable[Prompt] | None = None,
    kept: Kept | None = None,
) -> None:
    """Write the report anew while a run goes on: a fault of the report's own costs the run nothing but the report.

    Raises:
        DnoError: the disk is full, or may not be written.
    """
    try:
        write_report(run_dir, config, pictures=pictures, held_out=held_out, kept=kept)
    except DnoError:
        raise
    except Exception as error:
        say(f"warning: report.html is not up to date ({type(error).__name__}: {error}); `dno report` writes it again")


def _write_pictures(folder: epath.Path, found: Iterable[Figure], specs: Mapping[str, Any]) -> None:
    for figure in found:
        _write(folder / f"{figure.name}.csv", figure.csv())
        if figure.name in specs:
            _write_picture(folder / f"{figure.name}.svg", specs[figure.name])


def _write_picture(path: epath.Path, spec: dict[str, Any]) -> None:
    """Draw a figure, unless that of the same specification lies there: its last line says of which it is."""
    drawn_of = f"<!-- {hashlib.sha256(f'{json.dumps(spec)} {plots.version()}'.encode()).hexdigest()} -->\n"
    if not path.exists() or not path.read_text().endswith(drawn_of):
        write_atomically(path, f"{plots.svg(spec)}\n{drawn_of}")


def _write(path: epath.Path, text: str) -> None:
    """Write a file unless it says so already: a run that is started again leaves what is finished alone."""
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text)


def _parts(facts: Facts, found: list[Figure], *, notes: list[str]) -> list[_Part]:
    run_dir, config = facts.run_dir, facts.config
    tables: dict[str, list[PlainTable]] = {name: [] for name, _ in _SECTIONS}
    words: dict[str, list[str]] = {name: [] for name, _ in _SECTIONS}

    def add(section: str, renderable: Any) -> None:
        more, said = plain(renderable)
        tables[section] += [table.without_empty_columns() for table in more if table.rows]
        words[section] += said

    for section, make in (
        (BETTER, lambda: policy_table(run_dir, iterations=config.iterations)),
        (known.PAIRS, lambda: iteration_table(run_dir, config, judge=False)),
        (TRAINING, lambda: training_table(run_dir) or ""),
        (known.COSTS, lambda: status_table(stage_statuses(run_dir, config))),
    ):
        if (made := facts.tried(make)) is not None:
            add(section, made)
    words[BETTER] += comparison_words(facts)
    for iteration, details in facts.details("annotate"):
        if details.get("quality"):
            add(known.JUDGE, quality_table(details["quality"], config.annotation.quality, iteration=iteration))
    judges = {iteration: details["judge"] for iteration, details in facts.details("annotate") if "judge" in details}
    for judge in dict.fromkeys(judges.values()):
        of = ", ".join(str(iteration) for iteration, own in judges.items() if own == judge)
        words[known.JUDGE].insert(0, f"Iteration{'s' if ',' in of else ''} {of}: judged by {judge}.")
    if not tables[known.JUDGE]:
        words[known.JUDGE].append("Not measured: no iteration's judge has figures.")
    words["samples"] += notes
    if "usd" in facts.receipts:
        words[known.COSTS].append(f"Judges and teachers cost ${facts.receipts['usd']:,.2f} so far.")
    if not any(figure.section == known.SAMPLER for figure in found):
        words[known.SAMPLER].append("Not measured: sampling.audit_prompts is 0, or nothing has been sampled here.")
    texts = [("config.yaml", hide_keys(printable(dump_config(config)))), ("Versions", _versions(facts))]
    return [
        _Part(
            name,
            title,
            tables[name],
            [printable(text) for text in words[name]],
            [figure for figure in found if figure.section == name],
            texts if name == "setting" else [],
        )
        for name, title in _SECTIONS
    ]


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """The few numbers that a reader looks for first: (what, number, what it is of)."""
    run_dir, iterations = facts.run_dir, facts.config.iterations
    evaluated = [iteration for iteration, _ in facts.of("evaluate")]
    tiles = []
    if evaluated:
        details = facts.manifests[evaluated[-1], "evaluate"].details
        rate = details.get("win_rates", {}).get("0")
        if rate:
            interval = f"95 % interval {100 * rate['low']:.1f} to {100 * rate['high']:.1f} %"
            tiles.append((f"policy {details['policy']} beats policy 0", f"{100 * rate['rate']:.1f} %", interval))
        told = facts.tried(lambda: told_policy(run_dir, iteration=evaluated[-1])) or ""
        measured = facts.tried(lambda: is_measured(run_dir, evaluated[-1]))
        tiles.append(("best policy" if measured else "newest policy", str(details["best"]), told))
    done, total = len(facts.manifests), sum(len(stage_names(facts.config, t)) for t in range(iterations))
    tiles.append(("iterations", f"{len(evaluated)} of {iterations}", f"{done} of {total} stages are done"))
    if facts.wall_seconds:
        tiles.append(("wall time", duration(facts.wall_seconds), "of finished iterations"))
    if "usd" in facts.receipts:
        tiles.append(("paid", f"${facts.receipts['usd']:,.2f}", "to judges and teachers"))
    return [(what, number, printable(of)) for what, number, of in tiles]


def _versions(facts: Facts) -> str:
    """Of the software by which stages were finished: one paragraph for each set of versions."""
    found: dict[str, list[str]] = {}
    for (iteration, stage), manifest in facts.manifests.items():
        versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        found.setdefault(f"{versions}; git {manifest.git or 'unknown'}", []).append(f"{stage} {iteration}")
    whole = len(found) == 1
    return printable("\n".join(text if whole else f"{text}: {', '.join(of)}" for text, of in found.items()))


def _cell(value: Any) -> str:
    """A table's cell: few digits, none of them wrong."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else printable(str(value))


def _json(value: Any) -> Markup:
    """JSON in a page: no character of it can end a script or begin one."""
    text = json.dumps(value, ensure_ascii=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"cell": _cell, "shown": printable}
    return environment.from_string(_asset("page.html.jinja"))


@functools.cache
def _script(text: str) -> Markup:
    """A script as it may stand in the page: none of its words ends its element."""
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _asset(name: str) -> str:
    return resources.files(__package__ or "").joinpath("assets", name).read_text(encoding="utf-8")
