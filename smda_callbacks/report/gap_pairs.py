"""The pairs that would close or widen each gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smda_callbacks.report import texts_pairs as texts
from smda_callbacks.report.data import RunData, gaps_now
from smda_callbacks.report.markup import Html, element, join, table
from smda_callbacks.report.pair_ranking import plus
from smda_callbacks.report.pairs_data import PairData, above_noise, data_columns, pair_name
from smda_callbacks.report.section import say

#: Pairs named on either side of a gap.
NAMED = 5


def pairs_behind_gaps(data: RunData, pairs: PairData) -> Html:
    """A table of the gaps at the start and now with their pairs, then one of the other categories, folded away."""
    noise = texts.GAP_UNFLOORED if pairs.table.floor is None else texts.GAP_NOISE
    close, widen = ("would close", "would widen") if data.audit else ("closed", "widened")
    rows = {gap["category"]: gap for gap in data.store.gaps_start}
    gaps = {gap["category"] for gap in (*data.store.gaps_start, *gaps_now(data)) if gap["is_gap"]}
    first = [gap for name, gap in rows.items() if name in gaps]
    others = [gap for name, gap in rows.items() if name not in gaps]
    shown = _table(data, pairs, first) if first else element("p", "No category is a gap.")
    folded = element("details", element("summary", "Categories that are no gap"), _table(data, pairs, others))
    text = say(texts.GAP_PAIRS, unit=data.unit, noise=noise, close=close, widen=widen)
    return join([element("h3", "Pairs behind the gaps"), text, shown, folded if others else None])


def _table(data: RunData, pairs: PairData, gaps: Sequence[Mapping[str, Any]]) -> Html:
    head = ["category", "expected", "closing", "widening", "pairs above noise"]
    return table(head, [_row(data, pairs, gap) for gap in gaps], {"pairs above noise"})


def _row(data: RunData, pairs: PairData, gap: Mapping[str, Any]) -> Html:
    name, refuse = str(gap["category"]), gap["expected"] == "refuse"
    closing, widening = closers(data, pairs, name, refuse=refuse)
    raises, lowers = ("raise", "lower") if refuse else ("lower", "raise")
    verb = data.behaviours[0]
    above = above_noise(pairs.table)
    place = pairs.category(0, name)
    total = "–" if above is None or place is None else f"{int(above[:, place].sum()):,} of {len(above):,}"
    return element(
        "tr",
        element("th", name, scope="row"),
        element("td", gap["expected"]),
        element("td", _list(pairs, closing, place, f"{raises} {verb}")),
        element("td", _list(pairs, widening, place, f"{lowers} {verb}")),
        element("td", total, class_="number"),
    )


def closers(data: RunData, pairs: PairData, category: str, *, refuse: bool) -> tuple[list[int], list[int]]:
    """Rows of the pairs that close a category's gap and of those that widen it, largest effect first, above noise.

    ``refuse``: whether refusing is expected, so that what raises the first behaviour closes. Where the noise floor was
    not measured, all that have any effect.
    """
    place = pairs.category(0, category)
    if place is None:
        return [], []
    effect, above = pairs.table.effect[:, place], above_noise(pairs.table)
    enough = effect != 0 if above is None else above[:, place]
    order = [int(row) for row in np.argsort(-np.abs(effect), kind="stable") if enough[row]]
    good = [row for row in order if (effect[row] > 0) == refuse]
    return good, [row for row in order if (effect[row] > 0) != refuse]


def _list(pairs: PairData, rows: Sequence[int], place: int | None, verb: str) -> Html:
    if place is None:
        return element("span", "not attributed", class_="quiet")
    if not rows:
        return element("span", "none" if pairs.table.floor is None else "none above noise", class_="quiet")
    items = []
    for row in rows[:NAMED]:
        pair = pairs.table.pairs[row]
        about = [pair.columns[name] for name in data_columns(pairs.table)[:2] if name in pair.columns]
        effect = element("span", plus(float(pairs.table.effect[row, place])), class_="figures")
        items.append(element("li", join([pair_name(pair), effect], " "), element("i", " ".join(["", *about]))))
    more = element("li", f"and {len(rows) - NAMED:,} more", class_="quiet") if len(rows) > NAMED else None
    return join([element("div", f"{verb}:", class_="quiet"), element("ul", *items, more, class_="named")])
