"""Figures of the behaviour itself: every category over the run, what changed, and through what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from smda_callbacks.report import figures as f
from smda_callbacks.report.data import TIMES, RunData, behaviour_floors
from smda_callbacks.report.markup import fixed, signed
from smda_callbacks.report.shifts import categories_above
from smda_callbacks.report.waterfall import Bar


def category_lines(data: RunData, behaviour: int) -> go.Figure:
    """Mean behaviour of every category over steps; the most changed are coloured, the means over groups bold."""
    means = data.means[:, :, behaviour]
    strong = categories_above(data, behaviour)
    # Those that changed by more than their noise first: only they are coloured.
    order = np.lexsort((-np.abs(means[-1] - means[0]), ~strong)).tolist()
    traces = [
        *(_category_line(data, means, c, rank, bool(strong[c])) for rank, c in reversed(list(enumerate(order)))),
        *(_group_line(data, group, values[:, behaviour]) for group, values in data.group_means.items()),
    ]
    return f.figure(
        traces,
        height=max(420, 120 + 19 * len(traces)),
        xaxis=f.step_axis(data.steps),
        yaxis={"title": {"text": axis_title(data, behaviour)}, **_range(data)},
        shapes=f.unbooked_marks(data.windows),
        legend={"traceorder": "normal", "itemwidth": 30, "tracegroupgap": 0, "font": {"size": 12}},
    )


def _category_line(data: RunData, means: np.ndarray, category: int, rank: int, strong: bool) -> go.Scatter:
    name, highlighted = data.categories[category], strong and rank < len(f.HIGHLIGHTS)
    colour, symbol = f.HIGHLIGHTS[rank] if highlighted else (f.MUTED, "circle")
    points = means[:, category]
    return go.Scatter(
        x=data.steps,
        y=f.values(points),
        name=f.safe(name),
        mode=f.marker_mode(len(points)) if highlighted or len(points) == 1 else "lines",
        line={"color": colour, "width": 2 if highlighted else 1.2, "dash": _dash(data.expected[name])},
        marker={"symbol": symbol, "size": 7},
        opacity=1.0 if highlighted else 0.75,
        legendrank=100 + rank,
        hovertext=[
            f"<b>{f.safe(name)}</b> (should {data.expected[name]})<br>step {step}: {fixed(value, 3)}"
            f" ({signed(value - points[0], 3)} since the start)"
            for step, value in zip(data.steps, points.tolist(), strict=True)
        ],
        hoverinfo="text",
    )


def _group_line(data: RunData, group: str, points: np.ndarray) -> go.Scatter:
    return go.Scatter(
        x=data.steps,
        y=f.values(points),
        name=f"<b>mean, should {group}</b>",
        mode="lines+markers" if len(points) == 1 else "lines",
        line={"color": f.INK, "width": 4, "dash": _dash(group)},
        marker={"size": 9},
        legendrank=1 if group == "refuse" else 2,
        hovertext=[
            f"<b>mean of the probes to {group}</b><br>step {step}: {fixed(value, 3)}"
            for step, value in zip(data.steps, points.tolist(), strict=True)
        ],
        hoverinfo="text",
    )


def change_arrows(data: RunData, behaviour: int) -> go.Figure:
    """Start and end of every category, the largest fall on top, with the noise floor of its change."""
    means = data.means[:, :, behaviour]
    order = np.argsort(means[-1] - means[0], kind="stable").tolist()
    names = [f.safe(category_title(data, c)) for c in order]
    start, end = means[0, order], means[-1, order]
    floors = behaviour_floors(data)
    limit = None if floors is None else TIMES * floors[-1][order, behaviour]
    hover = _change_hover(names, start, end, limit)
    traces: list[Any] = [] if limit is None else [_floor_bars(names, start, limit)]
    strong = categories_above(data, behaviour)[order]
    traces += [_arrow(names, start, end, rising, strong) for rising in (False, True)]
    if not strong.all():
        traces.append(_arrow(names, start, end, None, strong))
    ring = {"symbol": "circle", "size": 10, "color": f.PAPER, "line": {"width": 1.8, "color": f.INK}}
    traces.append(_points("start", names, start, hover, ring))
    colours = [
        (f.RISE if rising else f.FALL) if known else f.MUTED for rising, known in zip(end >= start, strong, strict=True)
    ]
    traces.append(_points("end", names, end, hover, {"symbol": "circle", "size": 11, "color": colours}))
    return f.figure(
        traces,
        height=110 + 24 * len(names),
        xaxis={"title": {"text": axis_title(data, behaviour)}, **_range(data)},
        yaxis=f.names_axis(names),
        barmode="overlay",
        bargap=0.35,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )


def _floor_bars(names: list[str], start: np.ndarray, limit: np.ndarray) -> go.Bar:
    return go.Bar(
        y=names,
        base=f.values(start - limit),
        x=f.values(2 * limit),
        orientation="h",
        name=f"within {TIMES:g} × noise floor of the change",
        marker={"color": f.BAND, "line": {"width": 0}},
        hoverinfo="skip",
    )


def _arrow(names: list[str], start: np.ndarray, end: np.ndarray, rising: bool | None, strong: np.ndarray) -> go.Scatter:
    """The categories that rose, or fell, by more than their noise; those that did not where ``rising`` is None."""
    x: list[float | None] = []
    y: list[str | None] = []
    for name, low, high, known in zip(names, start.tolist(), end.tolist(), strong.tolist(), strict=True):
        if (known and (high >= low) == rising) or (not known and rising is None):
            x += [low, high, None]
            y += [name, name, None]
    said = {True: ("rise", f.RISE), False: ("fall", f.FALL), None: ("not above noise", f.MUTED)}
    title, colour = said[rising]
    return go.Scatter(x=x, y=y, mode="lines", line={"color": colour, "width": 3}, name=title, hoverinfo="skip")


def _points(name: str, names: list[str], at: np.ndarray, hover: list[str], marker: dict[str, Any]) -> go.Scatter:
    shown = {"showlegend": name == "start"}  # the end has the colour of its line
    return go.Scatter(
        x=f.values(at), y=names, mode="markers", name=name, marker=marker, hovertext=hover, hoverinfo="text", **shown
    )


def _change_hover(names: list[str], start: np.ndarray, end: np.ndarray, limit: np.ndarray | None) -> list[str]:
    notes = [""] * len(names)
    if limit is not None:
        notes = [
            f"<br>{'above' if abs(moved) > most else 'within'} {TIMES:g} × noise floor ({fixed(most, 3)})"
            for moved, most in zip((end - start).tolist(), limit.tolist(), strict=True)
        ]
    return [
        f"<b>{name}</b><br>{fixed(low, 3)} → {fixed(high, 3)} ({signed(high - low, 3)}){note}"
        for name, low, high, note in zip(names, start.tolist(), end.tolist(), notes, strict=True)
    ]


def waterfall(bars: Sequence[Bar], unit: str, *, limit: float = 0.0) -> go.Figure:
    """Diamonds for start and end, and bars between them that each begin where the one before stopped.

    ``limit``: a change that is not larger is grey, and so is all of a change that as a whole is not.
    """
    names = [f.safe(bar.label) for bar in bars]
    tops = _running(bars)
    room = 0.16 * (max(tops) - min(tops)) or 0.05
    decimals, strong = _decimals(bars), abs(bars[-1].value - bars[0].value) > limit
    inner = list(zip(bars, names, tops, strict=True))[1:-1]
    return f.figure(
        [
            *(_change_bar(*each, decimals, limit if strong else math.inf) for each in inner),
            _ends(bars, names, decimals),
        ],
        height=100 + 27 * len(bars),
        xaxis={"title": {"text": unit}, "range": [min(tops) - room, max(tops) + room]},
        yaxis=f.names_axis(names),
        shapes=_connectors(tops),
        barmode="overlay",
        showlegend=False,
    )


def _decimals(bars: Sequence[Bar]) -> int:
    """Three, or as many as the largest change needs for two digits."""
    largest = max(abs(bar.value) for bar in bars if bar.kind not in ("start", "end"))
    return max(3, 1 - math.floor(math.log10(largest))) if largest > 0 else 3


def _change_bar(bar: Bar, name: str, top: float, decimals: int, limit: float) -> go.Bar:
    colour = f.MUTED if abs(bar.value) < limit else f.RISE if bar.value >= 0 else f.FALL
    marker: dict[str, Any] = {"color": colour, "line": {"width": 0}}
    if bar.kind == "residual":
        marker["pattern"] = {"shape": "/", "bgcolor": colour, "fgcolor": f.PAPER}
    return go.Bar(
        y=[name],
        x=[bar.value],
        base=[top - bar.value],
        orientation="h",
        marker=marker,
        text=[signed(bar.value, decimals)],
        textposition="outside",
        cliponaxis=False,
        hovertext=[f"<b>{name}</b><br>{signed(bar.value, decimals + 1)}"],
        hoverinfo="text",
    )


def _ends(bars: Sequence[Bar], names: list[str], decimals: int) -> go.Scatter:
    texts = [fixed(bar.value, decimals) for bar in (bars[0], bars[-1])]
    return go.Scatter(
        x=[bars[0].value, bars[-1].value],
        y=[names[0], names[-1]],
        mode="markers+text",
        marker={"symbol": "diamond", "size": 13, "color": f.INK},
        text=[f"<b>{text}</b>  " for text in texts],
        textposition="middle left",
        cliponaxis=False,
        hovertext=[f"<b>{name}</b><br>{text}" for name, text in zip((names[0], names[-1]), texts, strict=True)],
        hoverinfo="text",
    )


def _running(bars: Sequence[Bar]) -> list[float]:
    """Where every bar stops."""
    tops, at = [], 0.0
    for bar in bars:
        at = bar.value if bar.kind in ("start", "end") else at + bar.value
        tops.append(at)
    return tops


def _connectors(tops: list[float]) -> list[dict[str, Any]]:
    line = {"color": f.MUTED, "width": 1}
    return [
        {"type": "line", "x0": top, "x1": top, "y0": place - 0.35, "y1": place + 1.35, "line": line, "layer": "below"}
        for place, top in enumerate(tops[:-1])
    ]


def category_title(data: RunData, category: int) -> str:
    """A category's name; those to comply with are marked."""
    name = data.categories[category]
    return name if data.expected[name] == "refuse" else f"{name} (comply)"


def axis_title(data: RunData, behaviour: int) -> str:
    """Name and unit of a behaviour's axis."""
    return f.safe(f"mean {data.behaviours[behaviour]} ({data.unit})")


def _range(data: RunData) -> dict[str, Any]:
    return {"range": [-0.02, 1.02]} if data.unit == "probability" else {}


def _dash(expected: str) -> str:
    return "solid" if expected == "refuse" else "dash"
