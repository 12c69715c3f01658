"""Figures of the instrument: the SAE's health over the run, and what measuring cost."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from smda_callbacks.report import figures as f
from smda_callbacks.report.data import RunData

_TICKS = [a * 10**b for b in range(-4, 6) for a in (1, 3)]
_TITLES = ("FVU", "", "L0", "Jaccard")  # the legend stands above delta-FVU


def sae_health(data: RunData) -> go.Figure:
    """FVU, delta-FVU with its limit at 1, L0 and Jaccard over steps, one small plot each."""
    found = make_subplots(rows=2, cols=2, subplot_titles=_TITLES, horizontal_spacing=0.11, vertical_spacing=0.17)
    f.style(found, height=560, showlegend=True)
    found.add_trace(_line(data, "fvu", "FVU", f.BLUE), row=1, col=1)
    found.add_trace(_line(data, "delta_fvu_magnitude", "delta-FVU at fixed gates", f.GREEN), row=1, col=2)
    found.add_trace(_line(data, "delta_fvu", "delta-FVU plain", f.PINK), row=1, col=2)
    found.add_trace(_line(data, "l0", "L0", f.BLUE), row=2, col=1)
    found.add_trace(_line(data, "jaccard", "Jaccard", f.BLUE), row=2, col=2)
    _label_axes(found)
    axis = f.step_axis(data.steps)
    found.update_xaxes({**axis, "title": {"text": "measurement: a pair and repeat"}} if data.audit else axis)
    found.update_xaxes(title={"text": ""}, row=1)
    found.update_annotations(font={"size": 13, "color": f.INK})
    start = data.store.baseline.health
    if start is not None:
        found.add_shape(f.line_at(start.fvu), row=1, col=1)
    found.add_shape(f.line_at(1.0), row=1, col=2)
    found.update_layout(
        margin={"t": 34},
        legend={"orientation": "h", "x": 0.56, "xanchor": "left", "y": 1.0, "yanchor": "bottom"},
    )
    return found


def _label_axes(found: go.Figure) -> None:
    found.update_yaxes(title={"text": "share of variance missed"}, rangemode="tozero", row=1, col=1)
    log = {"type": "log", "tickvals": _TICKS, "tickformat": "~g"}
    found.update_yaxes(title={"text": "share of change missed"}, **log, row=1, col=2)
    found.update_yaxes(title={"text": "active features"}, rangemode="tozero", row=2, col=1)
    found.update_yaxes(title={"text": "overlap with the start"}, range=[0, 1.05], row=2, col=2)


def _line(data: RunData, field: str, name: str, colour: str) -> go.Scatter:
    # The fixed model of an audit is no measurement of a pair; its FVU is the dashed line.
    records = [record for record in (data.ok if data.audit else data.records) if record.health is not None]
    points = [getattr(record.health, field) for record in records]
    if field.startswith("delta"):
        points = [point if point is not None and point > 0 else None for point in points]  # a log axis has no zero
    return go.Scatter(
        x=[record.step for record in records],
        y=f.values(points),
        name=name,
        mode="markers" if data.audit else f.marker_mode(len(points)),  # pairs are no course of time
        connectgaps=False,
        line={"color": colour, "width": 2},
        marker={"size": 5},
        showlegend=field.startswith("delta"),
        hovertemplate=f"{name}<br>{'number' if data.audit else 'step'} %{{x}}: %{{y:.3g}}<extra></extra>",
    )


def cost_bars(data: RunData) -> go.Figure:
    """Wall time of every window's measurement."""
    colours = {"ok": f.BLUE, "not_finite": f.PINK, "failed": f.VERMILLION}
    width = 0.7 * float(np.median(np.diff([data.steps[0], *(window.step for window in data.windows)])))
    traces = [
        go.Bar(
            width=width,
            x=[window.step for window in data.windows if window.status == status],
            y=[window.seconds for window in data.windows if window.status == status],
            name=status,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"step %{{x}}: %{{y:.2f}} s, {status}<extra></extra>",
        )
        for status, colour in colours.items()
        if any(window.status == status for window in data.windows)
    ]
    return f.figure(
        traces,
        height=260,
        barmode="overlay",
        xaxis=f.step_axis(data.steps),
        yaxis={"title": {"text": "measurement (s)"}, "rangemode": "tozero"},
        showlegend=len(traces) > 1,
    )
