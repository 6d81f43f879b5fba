"""Plots: Vega-Lite by altair, drawn in the page by Vega itself; SVG by vl-convert. The extra `report` brings both.

Without them the page has its tables. Nothing is fetched: the library that draws lies in the package vl-convert.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
from contextlib import suppress
from importlib import metadata
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.files import cache_folder, write_atomically
from dno_jax.report.shapes import Figure, Shape

EXTRA = 'pip install "dno_jax[report]"'
# Of middle brightness, told apart by the colour-blind, and seen on white as on black.
_COLOURS = [
    "#3b82d6",
    "#e08214",
    "#1a9e77",
    "#c8548f",
    "#8b6fd6",
    "#7f8c2d",
    "#c0504d",
    "#4bacc6",
    "#8a8a8a",
    "#b8860b",
]
ROWS = "rows"  # what a specification calls the figure's numbers
_HEIGHT = 230
# A line is one thing to point at: words of a point would be the first one's, and take most of the time of drawing.
_LINE = {"aria": False, "tooltip": False}
_SVG_WIDTH = 680
_CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "gridColor": "#8884"},
    "axisX": {"labelAngle": 0, "labelOverlap": True, "labelFlush": False},
    "legend": {"orient": "top", "title": None, "labelFontSize": 12, "labelLimit": 260, "columns": 3, "offset": 4},
    "view": {"stroke": None},
    "range": {"category": _COLOURS},
}


def installed() -> bool:
    """Whether plots can be drawn."""
    return all(importlib.util.find_spec(name) is not None for name in ("altair", "vl_convert"))


@functools.cache
def library() -> str:
    """The JavaScript that draws a specification; it takes seconds to make, and is kept in the user's cache."""
    path = cache_folder() / f"{version().replace(' ', '-')}.js"
    with suppress(OSError, ValueError):
        seal, text = path.read_text(encoding="utf-8").split("\n", 1)
        if seal == _seal(text):
            return text
    text = _module("vl_convert").javascript_bundle(vl_version=_version())
    with suppress(DnoError):  # it is made again next time
        write_atomically(path, f"{_seal(text)}\n{text}")
    return text


def _seal(text: str) -> str:
    return f"// {hashlib.sha256(text.encode()).hexdigest()}"


def version() -> str:
    """What draws: "vega-lite 6.4 vl-convert 1.9.0"."""
    return f"vega-lite {_version()} vl-convert {metadata.version('vl-convert-python')}"


def svg(spec: dict[str, Any]) -> str:
    """A picture of a specification on white."""
    spec = spec | {"width": _SVG_WIDTH, "background": "white"}
    return _module("vl_convert").vegalite_to_svg(spec, vl_version=_version())


def specification(figure: Figure) -> dict[str, Any]:
    """The Vega-Lite specification of a figure, its numbers in it."""
    assert figure.shape is not None
    alt = _module("altair")
    chart = _KINDS[figure.shape.kind](alt, figure, figure.shape)
    spec = chart.properties(width="container", height=_height(figure)).to_dict(validate=False)
    return spec | {
        "datasets": spec.get("datasets", {}) | {ROWS: figure.records},
        "config": _CONFIG,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "description": f"{figure.title}. {figure.note}",
    }


def _height(figure: Figure) -> int:
    assert figure.shape is not None
    if figure.shape.kind == "heat":
        return 60 + 34 * len({row[figure.columns.index(figure.shape.colour)] for row in figure.rows})
    if figure.shape.kind == "bars":
        return 40 + 26 * len({row[figure.columns.index(figure.shape.y)] for row in figure.rows})
    return _HEIGHT


def _intervals(alt: Any, figure: Figure, shape: Shape) -> Any:
    kind = "nominal" if isinstance(figure.rows[0][figure.columns.index(shape.x)], str) else "ordinal"
    x = alt.X(field=shape.x, type=kind, title=shape.x)
    y = alt.Y(field=shape.y, type="quantitative", title=shape.y, **_format(alt, shape), scale=alt.Scale(zero=False))
    base = alt.Chart(alt.NamedData(name=ROWS)).encode(x=x, y=y, tooltip=_tooltip(alt, figure))
    if shape.colour:
        base = base.encode(
            color=alt.Color(field=shape.colour, type="nominal", sort=None),
            xOffset=alt.XOffset(field=shape.colour, type="nominal", sort=None),
        )
    whole = base.mark_rule(strokeWidth=2, **_colour(shape)).encode(
        y=alt.Y(field=shape.low, type="quantitative", title=shape.y), y2=alt.Y2(field=shape.high)
    )
    layers = [whole, base.mark_point(filled=True, size=70, opacity=1, **_colour(shape))]
    if shape.rule is not None:
        at = alt.Chart(alt.Data(values=[{}])).mark_rule(strokeDash=[4, 4], color="#888")
        layers.insert(0, at.encode(y=alt.datum(shape.rule)))
    return alt.layer(*layers)


def _heat(alt: Any, figure: Figure, shape: Shape) -> Any:
    axis = alt.Axis(labelAngle=-35, labelOverlap=False)  # every name, on a phone too
    base = alt.Chart(alt.NamedData(name=ROWS)).encode(
        x=alt.X(field=shape.x, type="nominal", sort=_words(figure, shape.colour), title="against", axis=axis),
        y=alt.Y(field=shape.colour, type="nominal", sort=None, title=None),
        tooltip=_tooltip(alt, figure),
    )
    # Light at every value, so that black numbers are read on it.
    scale = alt.Scale(domain=[0, 0.5, 1], range=["#f0a58f", "#f4f1e8", "#8fc0ea"], interpolate="rgb")
    cells = base.mark_rect().encode(color=alt.Color(field=shape.y, type="quantitative", scale=scale, legend=None))
    words = base.mark_text(color="#111").encode(text=alt.Text(field=shape.y, type="quantitative", format=".0%"))
    return alt.layer(cells, words)


def _bars(alt: Any, figure: Figure, shape: Shape) -> Any:
    chart = alt.Chart(alt.NamedData(name=ROWS)).mark_bar(**_colour(shape))
    chart = chart.encode(
        x=alt.X(field=shape.x, type="quantitative", title=shape.x, stack=not shape.percent, **_format(alt, shape)),
        y=alt.Y(field=shape.y, type="ordinal", title=shape.y, sort=None),
        tooltip=_tooltip(alt, figure),
    )
    if not shape.colour:
        return chart
    chart = chart.encode(color=alt.Color(field=shape.colour, type="nominal", sort=None))
    if shape.percent:
        return chart.encode(yOffset=alt.YOffset(field=shape.colour, type="nominal", sort=None))
    place = f"indexof({json.dumps(_words(figure, shape.colour))}, datum[{json.dumps(shape.colour)}])"
    return chart.transform_calculate(place=place).encode(order=alt.Order(field="place", type="quantitative"))


def _histogram(alt: Any, figure: Figure, shape: Shape) -> Any:
    chart = alt.Chart(alt.NamedData(name=ROWS)).mark_line(interpolate="step", strokeWidth=2, **_LINE, **_colour(shape))
    return chart.encode(
        x=alt.X(field=shape.x, type="quantitative", title=shape.x),
        y=alt.Y(field=shape.y, type="quantitative", title=shape.y),
        **({"color": alt.Color(field=shape.colour, type="nominal", sort=None)} if shape.colour else {}),
    )


def _lines(alt: Any, figure: Figure, shape: Shape) -> Any:
    colours = {row[figure.columns.index(shape.colour)] for row in figure.rows}
    legend = {} if len(colours) > 1 else {"legend": None}
    return (
        alt.Chart(alt.NamedData(name=ROWS))
        .mark_line(strokeWidth=1.5, interpolate="linear", **_LINE)
        .encode(
            x=alt.X(field=shape.x, type="quantitative", title="step, iterations one after the other"),
            y=alt.Y(field=shape.y, type="quantitative", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color(field=shape.colour, type="nominal", sort=None, **legend),
            detail=[alt.Detail(field="iteration", type="nominal"), alt.Detail(field="training", type="nominal")],
        )
    )


_KINDS = {"intervals": _intervals, "heat": _heat, "bars": _bars, "histogram": _histogram, "lines": _lines}


def _words(figure: Figure, column: str) -> list[str]:
    """The words of a column, in the order in which they come."""
    return list(dict.fromkeys(str(row[column]) for row in figure.records))


def _tooltip(alt: Any, figure: Figure) -> list[Any]:
    numbers = {name for name, cell in zip(figure.columns, figure.rows[0], strict=True) if not isinstance(cell, str)}
    return [alt.Tooltip(field=name, type="quantitative" if name in numbers else "nominal") for name in figure.columns]


def _format(alt: Any, shape: Shape) -> dict[str, Any]:
    return {"axis": alt.Axis(format="%")} if shape.percent else {}


def _colour(shape: Shape) -> dict[str, str]:
    return {} if shape.colour else {"color": _COLOURS[0]}


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _version() -> str:
    """altair's Vega-Lite, as vl-convert counts them: "6.4"."""
    return ".".join(_module("altair").SCHEMA_VERSION.lstrip("v").split(".")[:2])
