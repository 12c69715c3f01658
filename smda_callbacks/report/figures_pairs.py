"""Figures of training pairs: what they did to every feature, their shares over steps, and the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from smda_callbacks.records import Array
from smda_callbacks.report import figures as f
from smda_callbacks.report.data import RunData
from smda_callbacks.report.markup import number
from smda_callbacks.report.pair_ranking import plus
from smda_callbacks.report.pairs_data import TERMS, Ledger, cumulative_shares
from smda_callbacks.report.shifts import feature_name

TERM_NAMES = {
    "pairs": "pairs",
    "later": "later (momentum booked to pairs)",
    "momentum": "momentum",
    "decay": "weight decay",
    "unexplained": "unexplained",
}
TERM_COLOURS = {"pairs": f.BLUE, "later": f.GREEN, "momentum": f.OLIVE, "decay": f.PINK, "unexplained": f.VERMILLION}

_TWO_SIDED = [[0.0, f.FALL], [0.5, f.PAPER], [1.0, f.RISE]]
_ONE_SIDED = [[0.0, f.PAPER], [1.0, f.BLUE]]


def effect_map(
    data: RunData, names: Sequence[str], parts: Mapping[str, Array], shown: Mapping[str, Any], features: Sequence[int]
) -> go.Figure:
    """Effects ``parts[part]`` ``[pair, feature]`` of the pairs ``names``, a heat map per part; blank if not ``shown``.

    One symmetric scale for all parts; ``features``: SAE indices of the columns.
    """
    columns = [str(feature) for feature in features]
    found = make_subplots(rows=1, cols=len(parts), shared_yaxes=True, horizontal_spacing=0.03,
                          subplot_titles=[f.PART_NAMES[part] for part in parts])  # fmt: skip
    limit = colour_limit(np.concatenate([values[shown[part]] for part, values in parts.items()]))
    titles = [f.safe(feature_name(data, feature)) for feature in features]
    for place, (part, values) in enumerate(parts.items(), start=1):
        cells = np.where(shown[part], values, np.nan)
        found.add_trace(
            go.Heatmap(
                x=columns, y=list(names), z=[_rounded(row) for row in cells], coloraxis="coloraxis", xgap=1, ygap=1,
                hovertext=_map_hover(names, titles, f.PART_NAMES[part], values, shown[part]), hoverinfo="text",
            ), row=1, col=place,
        )  # fmt: skip
    f.style(found, height=150 + 17 * len(names) + 6 * max(map(len, columns), default=0))
    found.update_xaxes(type="category", tickangle=-90, showgrid=False, ticks="")
    found.update_yaxes(**f.names_axis(names), ticks="")
    _colours(found, _TWO_SIDED, -limit, limit, "effect")
    return found


def colour_limit(values: Array) -> float:
    """Where colours end: the largest size, but no more than twelve times the median, lest few cells pale all."""
    sizes = np.abs(values[values != 0])
    return float(min(sizes.max(), 12 * np.median(sizes))) if sizes.size else 1.0


def _map_hover(names: Sequence[str], titles: Sequence[str], part: str, values: Array, shown: Any) -> list[list[str]]:
    return [
        [
            f"<b>{name}</b><br>{title}<br>{part} {plus(float(value))}{'' if known else ', not above noise'}"
            for title, value, known in zip(titles, row, mask, strict=True)
        ]
        for name, row, mask in zip(names, values, shown, strict=True)
    ]


def interference_map(data: RunData, matrix: Array, rows: Sequence[int], columns: Sequence[int]) -> go.Figure:
    """Where the effects of pairs go ``[intended, shifted]``, as shares; ``rows``, ``columns``: SAE indices."""
    across, names = [str(each) for each in columns], [f.safe(feature_name(data, each)) for each in rows]
    titles = [f.safe(feature_name(data, each)) for each in columns]
    hover = [
        [f"intended <b>{name}</b><br>moved {title}<br>{number(100 * float(share), 2)} %" for title, share in
         zip(titles, row, strict=True)]
        for name, row in zip(names, matrix, strict=True)
    ]  # fmt: skip
    trace = go.Heatmap(
        x=across, y=names, z=[_rounded(row) for row in matrix], coloraxis="coloraxis", xgap=1, ygap=1,
        hovertext=hover, hoverinfo="text",
    )  # fmt: skip
    found = f.figure([trace], height=190 + 20 * len(rows))
    # An intended feature that a pair does move: outlined, so that what is beside it can be seen.
    own = [(y, across.index(str(each))) for y, each in enumerate(rows) if str(each) in across]
    line = {"color": f.INK, "width": 1.4}
    found.update_layout(
        shapes=[{"type": "rect", "x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5, "line": line}
                for y, x in own]
    )  # fmt: skip
    found.update_xaxes(type="category", tickangle=-90, showgrid=False, ticks="", title={"text": "feature moved"})
    found.update_yaxes(**f.names_axis(names), ticks="", title={"text": "feature intended", "standoff": 14})
    _colours(found, _ONE_SIDED, 0.0, float(np.nanmax(matrix, initial=0.0)) or 1.0, "share")
    return found


def _colours(found: go.Figure, scale: list[list[Any]], low: float, high: float, title: str) -> None:
    bar = {"title": {"text": title, "font": {"size": 12}}, "thickness": 12, "outlinewidth": 0, "tickformat": ".2~g"}
    found.update_layout(coloraxis={"colorscale": scale, "cmin": low, "cmax": high, "colorbar": bar})
    found.update_annotations(font={"size": 13, "color": f.INK})


def share_curves(data: RunData, names: Sequence[str], rows: Sequence[int], place: int, unit: str) -> go.Figure:
    """Summed shares, own and later, of the pairs ``rows`` over steps."""
    steps, curves = cumulative_shares(data, rows, place)
    traces = [
        go.Scatter(
            x=steps, y=_rounded(curve), name=f.safe(name), mode="lines",
            line={"color": colour, "width": 2, "dash": dash},
            hovertemplate=f"<b>{f.safe(name)}</b><br>to step %{{x}}: %{{y:.3g}}<extra></extra>",
        )
        for name, curve, (colour, dash) in zip(names, curves, _lines(), strict=False)
    ]  # fmt: skip
    return f.figure(
        traces,
        height=380,
        xaxis=f.step_axis(data.steps),
        yaxis={"title": {"text": f"share so far ({f.safe(unit)})"}, "zeroline": True, "tickformat": ".3~g"},
        showlegend=True,
    )


def _lines() -> list[tuple[str, str]]:
    return [(colour, dash) for dash in ("solid", "dash") for colour, _ in f.HIGHLIGHTS]


def ledger_bars(data: RunData, found: Ledger, place: int, unit: str) -> go.Figure:
    """The terms of every window stacked, their sum as a diamond; below it, what is unexplained alone."""
    result = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.7, 0.3], vertical_spacing=0.07)
    for term in TERMS:
        result.add_trace(_term_bar(found, term, place, alone=False), row=1, col=1)
    measured = go.Scatter(
        x=list(found.steps), y=_rounded(found.terms["measured"][:, place]), name="measured", mode="markers",
        marker={"symbol": "diamond", "size": 8, "color": f.INK, "line": {"width": 1, "color": f.PAPER}},
        hovertemplate="<b>measured</b><br>step %{x}: %{y:.3g}<extra></extra>",
    )  # fmt: skip
    result.add_trace(measured, row=1, col=1)
    result.add_trace(_term_bar(found, "unexplained", place, alone=True), row=2, col=1)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"}
    f.style(result, height=500, barmode="relative", legend=legend, bargap=0.25)
    result.update_xaxes(f.step_axis(data.steps))
    result.update_xaxes(title={"text": ""}, row=1)
    result.update_yaxes(title={"text": f"change per window<br>({f.safe(unit)})"}, zeroline=True, row=1, col=1)
    result.update_yaxes(title={"text": "unexplained"}, zeroline=True, row=2, col=1)
    result.update_yaxes(tickformat=".2~g")
    return result


def _term_bar(found: Ledger, term: str, place: int, *, alone: bool) -> go.Bar:
    marker: dict[str, Any] = {"color": TERM_COLOURS[term], "line": {"width": 0}}
    if term == "unexplained":
        marker["pattern"] = {"shape": "/", "bgcolor": TERM_COLOURS[term], "fgcolor": f.PAPER}
    return go.Bar(
        x=list(found.steps),
        y=_rounded(found.terms[term][:, place]),
        name=TERM_NAMES[term],
        showlegend=not alone,
        marker=marker,
        hovertemplate=f"<b>{TERM_NAMES[term]}</b><br>step %{{x}}: %{{y:.3g}}<extra></extra>",
    )


def _rounded(values: Array) -> list[float | None]:
    """Numbers of six digits: a figure shows no more, and a page of many is half as long."""
    return [float(f"{each:.6g}") if np.isfinite(each) else None for each in values.tolist()]
