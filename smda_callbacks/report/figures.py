"""What the report's figures share: colours that differ for colour-blind readers too, axes, and safe text.

Colours are those of the light theme; :data:`DARK` maps each to its twin, which the page puts in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from smda_callbacks.records import WindowRecord

INK, MUTED, GRID, PAPER = "#1b1f24", "#8b949e", "#e3e6ea", "#ffffff"
BLUE, VERMILLION, GREEN, PINK, OLIVE, VIOLET = "#0072b2", "#d05000", "#00875f", "#b2508a", "#85680a", "#6a51c8"
BAND = "rgba(139,148,158,0.30)"

DARK = {
    INK: "#e6e9ed",
    MUTED: "#7d8894",
    GRID: "#2d333b",
    PAPER: "#15191e",
    BLUE: "#5ab4f0",
    VERMILLION: "#ff8a4c",
    GREEN: "#36c796",
    PINK: "#e58fc3",
    OLIVE: "#d9bd4a",
    VIOLET: "#ab9cff",
    BAND: "rgba(125,136,148,0.38)",
}

#: For lines that must be told apart; each also has a marker of its own.
HIGHLIGHTS = (
    (BLUE, "circle"),
    (VERMILLION, "square"),
    (GREEN, "diamond"),
    (PINK, "triangle-up"),
    (OLIVE, "x"),
    (VIOLET, "star"),
)

RISE, FALL = BLUE, VERMILLION

PART_COLOURS = {"shift_x_magnitude": GREEN, "shift_x_gating": PINK, "shift_y": OLIVE}
PART_NAMES = {"shift_x_magnitude": "ΔX magnitude", "shift_x_gating": "ΔX gating", "shift_y": "ΔY"}
ROW_NAMES = {
    "magnitude": "features: magnitude",
    "gating": "features: gating",
    "shift_x_magnitude": "coefficients: ΔX magnitude",
    "shift_x_gating": "coefficients: ΔX gating",
    "shift_y": "coefficients: ΔY",
    "intercept": "intercept",
    "residual": "residual (not expressible by the policy)",
}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Helvetica Neue', Arial, sans-serif"


def figure(traces: Sequence[Any], *, height: int, **layout: Any) -> go.Figure:
    """A figure in the report's style. Text that comes from a run must have gone through :func:`safe`."""
    return style(go.Figure(list(traces)), height=height, **layout)


def style(found: go.Figure, *, height: int, **layout: Any) -> go.Figure:
    """Put the report's style on a figure; ``layout`` goes before it."""
    found.layout.template = go.layout.Template()  # the default one is large and has colours of its own
    found.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": INK},
        margin={"l": 8, "r": 12, "t": 34, "b": 8},
        hoverlabel={"bgcolor": PAPER, "bordercolor": MUTED, "font": {"color": INK, "family": FONT, "size": 13}},
        legend={"bgcolor": "rgba(0,0,0,0)", "font": {"size": 12}},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": INK},
        dragmode="zoom",
        bargap=0.3,
    )
    lines = {"gridcolor": GRID, "zerolinecolor": MUTED, "linecolor": MUTED, "automargin": True, "title_font_size": 13}
    found.update_xaxes(**lines, showgrid=True, zeroline=False, ticks="outside", tickcolor=MUTED)
    found.update_yaxes(**lines, showgrid=True, zeroline=False)
    found.update_layout(**layout)
    return found


def step_axis(steps: Sequence[int]) -> dict[str, Any]:
    """An x axis of optimizer steps; whole numbers only, however few there are."""
    few = {"dtick": 1} if steps[-1] - steps[0] < 6 else {}
    return {"title": {"text": "optimizer step"}, "tickformat": "d", **few}


def names_axis(names: Sequence[str], **settings: Any) -> dict[str, Any]:
    """A y axis of names, the first on top, whatever the names look like."""
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": list(names),
        "range": [len(names) - 0.4, -0.6],
        "showgrid": False,
        "ticksuffix": "  ",
        **settings,
    }


def safe(text: object) -> str:
    """Text for a figure: Plotly reads tags and entities in labels, legends and hover boxes."""
    return escape("".join(c if c.isprintable() else " " for c in str(text)), quote=False)


def values(array: Any) -> list[float | None]:
    """Numbers for a trace; what is not finite becomes a hole."""
    return [float(each) if each is not None and np.isfinite(each) else None for each in array]


def unbooked_marks(windows: Sequence[WindowRecord], most: int = 200) -> list[dict[str, Any]]:
    """Thin dotted lines where a window was not booked."""
    steps = [window.step for window in windows if window.status != "ok"][:most]
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    return [
        {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"}
        for step in steps
    ]


def line_at(value: float, **place: Any) -> dict[str, Any]:
    """A dashed line across a plot at ``value``."""
    line = {"color": INK, "width": 1.2, "dash": "dash"}
    return {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line, **place}


def marker_mode(points: int) -> str:
    """Markers only while there are few points; a single one would be invisible without."""
    return "lines+markers" if points <= 60 else "lines"
