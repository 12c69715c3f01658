"""Figures of the policy: how far its coefficients moved, how far that can be believed, and which features moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from smda_callbacks.records import PATHWAYS, Array
from smda_callbacks.report import figures as f
from smda_callbacks.report.data import RunData
from smda_callbacks.report.markup import signed
from smda_callbacks.report.shifts import FeatureShift, cumulative_shifts, feature_name, norms, shift_floors

COEF_UNIT = "per standard deviation of the feature"


def pathway_norms(data: RunData, behaviour: int) -> go.Figure:
    """L2 norm over features of every part's shift since the start, with its noise floor dotted."""
    shifts, floors = cumulative_shifts(data), shift_floors(data)
    traces = []
    for part in PATHWAYS:
        traces.append(_norm_line(data, part, norms(shifts[part], behaviour), floor=False))
        if floors is not None:
            traces.append(_norm_line(data, part, norms(floors[part], behaviour), floor=True))
    return f.figure(
        traces,
        height=400,
        xaxis=f.step_axis(data.steps),
        yaxis={"title": {"text": f"L2 norm of the shift<br>({data.unit} {COEF_UNIT})"}, "rangemode": "tozero"},
        shapes=f.unbooked_marks(data.windows),
        legend=_legend_on_top(),
    )


def _norm_line(data: RunData, part: str, points: Array, *, floor: bool) -> go.Scatter:
    name = f.PART_NAMES[part]
    title = f"noise floor of {name}" if floor else name
    return go.Scatter(
        x=data.steps,
        y=f.values(points),
        name=title,
        mode="lines" if floor else f.marker_mode(len(points)),
        line={"color": f.PART_COLOURS[part], "width": 1.6 if floor else 2.6, "dash": "dot" if floor else "solid"},
        hovertemplate=f"{title}<br>step %{{x}}: %{{y:.3g}}<extra></extra>",
    )


def window_trust(data: RunData) -> go.Figure:
    """Per window: agreement between two halves of the probes, and how far the first-order shift is from the exact."""
    found = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    steps = [window.step for window in data.ok]
    for part in PATHWAYS:
        points = f.values(window.reliability.get(part) for window in data.ok)
        found.add_trace(_small_line(steps, points, f.PART_NAMES[part], f.PART_COLOURS[part]), row=1, col=1)
    errors = _small_line(steps, f.values(window.first_order_error for window in data.ok), "first-order error", f.INK)
    found.add_trace(errors.update(showlegend=False), row=1, col=2)
    f.style(found, height=290, legend=_legend_on_top())
    found.update_xaxes(f.step_axis(data.steps))
    found.update_yaxes(title={"text": "reliability (correlation)"}, range=[-1.05, 1.05], zeroline=True, row=1, col=1)
    found.update_yaxes(title={"text": "error (share of the shift)"}, rangemode="tozero", row=1, col=2)
    return found


def _small_line(steps: list[int], points: list[float | None], name: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=steps,
        y=points,
        name=name,
        mode=f.marker_mode(len(points)),
        line={"color": colour, "width": 2},
        marker={"size": 5},
        hovertemplate=f"{name}<br>step %{{x}}: %{{y:.3g}}<extra></extra>",
    )


def feature_bars(data: RunData, shifts: Sequence[FeatureShift]) -> go.Figure:
    """Shift of each feature's coefficient over the run, by part; parts below their noise floor are pale."""
    names = [f.safe(feature_name(data, each.feature)) for each in shifts]
    traces: list[Any] = [_part_bars(names, shifts, part, strong) for part in PATHWAYS for strong in (True, False)]
    traces.append(
        go.Scatter(
            x=[each.total for each in shifts],
            y=names,
            mode="markers",
            name="sum: change of the coefficient",
            marker={"symbol": "line-ns", "size": 15, "line": {"width": 3, "color": f.INK}, "color": f.INK},
            hovertext=[f"<b>{name}</b><br>sum {signed(s.total, 4)}" for name, s in zip(names, shifts, strict=True)],
            hoverinfo="text",
        )
    )
    return f.figure(
        traces,
        height=130 + 27 * len(names),
        barmode="relative",
        xaxis={"title": {"text": f"change of the coefficient ({data.unit} {COEF_UNIT})"}, "zeroline": True},
        yaxis=f.names_axis(names),
        legend=_legend_on_top(),
    )


def _part_bars(names: list[str], shifts: Sequence[FeatureShift], part: str, strong: bool) -> go.Bar:
    """The bars of the features whose ``part`` is above its noise floor, or those of the others."""
    note = "" if strong else "<br>below its noise floor, or not reliable"
    return go.Bar(
        y=names,
        x=[each.shifts[part] if each.above.get(part, True) == strong else None for each in shifts],
        orientation="h",
        name=f.PART_NAMES[part],
        legendgroup=part,
        showlegend=strong,
        marker={"color": f.PART_COLOURS[part], "line": {"width": 0}},
        opacity=1.0 if strong else 0.28,
        hovertext=[
            f"<b>{name}</b><br>{f.PART_NAMES[part]} {signed(each.shifts[part], 4)}{note}"
            for name, each in zip(names, shifts, strict=True)
        ],
        hoverinfo="text",
    )


def lam_grid(data: RunData) -> go.Figure:
    """Leave-one-out error over the grid of penalties, and the one that was chosen."""
    points = sorted(data.policy.lam_grid)
    trace = go.Scatter(
        x=[lam for lam, _ in points],
        y=f.values(error for _, error in points),
        mode="lines+markers",
        name="leave-one-out error",
        line={"color": f.BLUE, "width": 2},
        hovertemplate="λ %{x:.3g}: %{y:.4g}<extra></extra>",
    )
    lam = data.policy.lam
    line = {"color": f.INK, "width": 1.4, "dash": "dash"}
    mark = {"type": "line", "x0": lam, "x1": lam, "yref": "paper", "y0": 0, "y1": 1, "line": line}
    return f.figure(
        [trace],
        height=300,
        xaxis={"type": "log", "title": {"text": "λ (penalty on a sum of squares)"}, "exponentformat": "power"},
        yaxis={"title": {"text": "leave-one-out error (MSE)"}},
        shapes=[mark],
        showlegend=False,
    )


def _legend_on_top() -> dict[str, Any]:
    return {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}}
