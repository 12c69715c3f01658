"""Figures of a comparison: how the behaviour went in every run, and where the runs came out apart."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from smda_callbacks.report import figures as f
from smda_callbacks.report.compare import Comparison
from smda_callbacks.report.compare_policy import TOTAL, FeatureApart
from smda_callbacks.report.compare_series import Trajectory
from smda_callbacks.report.data import TIMES
from smda_callbacks.report.figures_policy import COEF_UNIT, feature_bars
from smda_callbacks.report.markup import fixed, number, signed
from smda_callbacks.report.shifts import FeatureShift

_DASHES = {"comply": "dash"}


def courses(found: Comparison, series: Sequence[Trajectory]) -> go.Figure:
    """Mean behaviour over steps of every run, a line for each of ``series``; those to comply with are dashed."""
    traces = [
        _line(found, each, run.name, several=len(series) > 1)
        for each in series
        for run in found.runs
        if run.name in each.values
    ]
    steps = sorted({step for each in series for values in each.values.values() for step in values}) or [0]
    limits = {"range": [-0.02, 1.02]} if found.reference.target == "probability" else {}
    title = f.safe(f"mean {series[0].behaviour} ({found.reference.target})")
    return f.figure(
        traces,
        height=420,
        xaxis=f.step_axis(steps),
        yaxis={"title": {"text": title}, **limits},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        showlegend=True,
    )


def _line(found: Comparison, each: Trajectory, run: str, *, several: bool) -> go.Scatter:
    values = each.values[run]
    reference = each.values.get(found.reference.name, {})
    hover = []
    for step, value in values.items():
        apart = ""
        if run != found.reference.name and step in reference:
            apart = f"<br>{run} − {found.reference.name}: {signed(value - reference[step], 3)}"
        hover.append(f"<b>{run}</b> {f.safe(each.name)}<br>step {step}: {fixed(value, 3)}{apart}")
    colour, symbol = colour_of(found, run)
    return go.Scatter(
        x=list(values),
        y=f.values(values.values()),
        name=f"{run}: should {each.expected}" if several else run,
        mode=f.marker_mode(len(values)),
        line={"color": colour, "width": 2.4, "dash": _DASHES.get(each.expected or "", "solid")},
        marker={"symbol": symbol, "size": 7},
        hovertext=hover,
        hoverinfo="text",
    )


def ends_apart(found: Comparison, series: Sequence[Trajectory]) -> go.Figure:
    """Per group and category, how far each run's end is from the reference's; bars reach to the limit of the noise."""
    names = [title_of(each) for each in series]
    traces = []
    for run in found.others:
        aparts = [each.at_end.get(run.name) for each in series]
        colour, symbol = colour_of(found, run.name)
        noise = [None if one is None or one.floor is None else TIMES * one.floor for one in aparts]
        hover = [
            f"<b>{name}</b><br>{run.name} − {found.reference.name}: "
            + ("not known" if one is None else signed(one.difference, 4))
            + ("" if limit is None else f"<br>{TIMES:g} × noise: {number(limit, 2)}")
            for name, one, limit in zip(names, aparts, noise, strict=True)
        ]
        traces.append(
            go.Scatter(
                x=[None if one is None else one.difference for one in aparts],
                y=names,
                mode="markers",
                name=f"{run.name} − {found.reference.name}",
                marker={"color": colour, "symbol": symbol, "size": 9},
                error_x={"array": f.values(noise), "color": colour, "thickness": 1.2, "width": 3},
                hovertext=hover,
                hoverinfo="text",
            )
        )
    unit = found.reference.target
    return f.figure(
        traces,
        height=110 + 24 * len(names),
        xaxis={"title": {"text": f"difference at the end ({unit})"}, "zeroline": True},
        yaxis=f.names_axis(names),
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )


def features_apart(found: Comparison, features: Sequence[FeatureApart], run: str) -> go.Figure:
    """How far the shift of each feature's coefficient is from the reference's, by part; below the noise pale."""
    rows = []
    for place, each in enumerate(features):
        apart = each.apart[run]
        assert apart is not None
        parts = {part: one for part, one in apart.items() if part != TOTAL}
        above = {part: one.above_noise for part, one in parts.items() if one.above_noise is not None}
        shifts = {part: one.difference for part, one in parts.items()}
        rows.append(FeatureShift(place, each.feature, 0.0, apart[TOTAL].difference, shifts, above))
    data = found.reference.data
    assert data is not None
    result = feature_bars(data, rows)
    title = f"difference in the shift, {run} − {found.reference.name} ({found.reference.target} {COEF_UNIT})"
    result.data[-1].name = "sum of the pathways"
    return result.update_xaxes(title={"text": title})


def colour_of(found: Comparison, run: str) -> tuple[str, str]:
    """Colour and marker of a run."""
    place = [each.name for each in found.runs].index(run)
    return f.HIGHLIGHTS[place % len(f.HIGHLIGHTS)]


def title_of(each: Trajectory) -> str:
    """A group or category as an axis names it."""
    if each.of == "group":
        return f"<b>all to {f.safe(each.name)}</b>"
    return f.safe(f"{each.name} (comply)" if each.expected == "comply" else each.name)
