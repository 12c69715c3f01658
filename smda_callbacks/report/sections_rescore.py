"""What ``smda rescore`` found, beside what was booked live."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from smda_callbacks.report import figures as f
from smda_callbacks.report import texts_pairs as texts
from smda_callbacks.report.markup import Html, count, element, fixed, join, number
from smda_callbacks.report.pair_ranking import plus, ranking_table
from smda_callbacks.report.pairs_data import PairData, need_pairs, pair_name
from smda_callbacks.report.ranking import rescored, unit_of
from smda_callbacks.report.rescored import agreement
from smda_callbacks.report.section import Page, chooser, say
from smda_callbacks.sinks.rescored import Rescored, find_rescored

#: Functionals with a figure of their own.
COMPARED = 12


def influence_part(page: Page) -> Html | None:
    """The ranking by influence on the end of the run and how live effects compare; None where nobody asked."""
    pairs, record = need_pairs(page.data), find_rescored(page.data.store.path)
    if record is None or not rescored(pairs.table):
        return None
    verified = record.verified
    how = "made again bit by bit" if verified.exact else f"made again up to {number(verified.worst)} of a step"
    steps = count(record.last_step - record.first_step, "step")
    ended = page.data.steps[-1]
    left = f", for no step after it was kept (the run ends at {ended:,})" if record.last_step < ended else ""
    return join([
        element("h3", "Influence on the end of the run"),
        say(texts.INFLUENCE, last=f"{record.last_step:,}", left=left, steps=steps, how=how),
        ranking_table(page.rankings, page.data, pairs, "influence"),
        _compared(page, pairs, record),
    ])  # fmt: skip


def _compared(page: Page, pairs: PairData, record: Rescored) -> Html:
    names = rescored(pairs.table)[:COMPARED]
    for at, name in enumerate(names):
        page.figures[f"influence-{at}"] = compared(page, pairs, name, agreement(record, pairs.table, name))
    selects = {"functional": list(enumerate(names))}
    return chooser(page.figures, "influence", selects, texts.INFLUENCE_CAPTION)


def compared(page: Page, pairs: PairData, name: str, agree: float | None) -> go.Figure:
    """Live effects and influences of one functional, a point per pair, and the line where they are equal."""
    table, place, unit = pairs.table, pairs.place(name), unit_of(pairs.table, page.data.policy, name)
    assert table.influence is not None
    rows = np.flatnonzero(table.known & ~np.isnan(table.influence[:, place]))
    live, end = table.effect[rows, place], table.influence[rows, place]
    hover = [
        f"<b>{f.safe(pair_name(table.pairs[row]))}</b><br>live {plus(float(a))}<br>end of the run {plus(float(b))}"
        for row, a, b in zip(rows.tolist(), live, end, strict=True)
    ]
    far = float(max(np.abs(live).max(initial=0.0), np.abs(end).max(initial=0.0))) or 1.0
    equal = go.Scatter(x=[-far, far], y=[-far, far], mode="lines", line={"color": f.MUTED, "dash": "dash", "width": 1},
                       hoverinfo="skip", showlegend=False)  # fmt: skip
    points = go.Scatter(x=live, y=end, mode="markers", marker={"color": f.BLUE, "size": 7, "opacity": 0.7},
                        hovertext=hover, hoverinfo="text", showlegend=False)  # fmt: skip
    return f.figure(
        [equal, points],
        height=380,
        xaxis={"title": {"text": f"live effect, {unit}"}},
        yaxis={"title": {"text": f"influence on the end, {unit}"}},
        title={"text": f"rank correlation {fixed(agree, 2)}", "font": {"size": 13}},
    )
