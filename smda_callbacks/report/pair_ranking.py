"""Tables of pairs that can be ranked by any functional. Every row is in the page once; a script fills and orders them.

Without a script, the ranking by the first functional is there to read.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from smda_callbacks.records import Array, Pair
from smda_callbacks.report.data import TIMES, RunData
from smda_callbacks.report.markup import NONE, Html, count, element, join, number, percent, signed
from smda_callbacks.report.pairs_data import PairData, Ranking, data_columns, moved_features, pair_name, rankings
from smda_callbacks.report.ranking import rescored, unit_of
from smda_callbacks.report.shifts import feature_name

#: Pairs listed by one functional; pairs in a table in all; characters of a text; columns of the data set.
PER, MOST_ROWS, MOST_TEXT, MOST_COLUMNS = 50, 800, 400, 3

_SHORT = 110  # characters of a text that are shown at once

Quantity = Literal["effect", "share", "influence"]


@dataclass(frozen=True)
class Column:
    """A column whose cells change with the functional: its title and its text for a pair and functional."""

    title: str
    cells: Sequence[Sequence[str]]  # per ranking, per row of it


def ranking_table(page_rankings: dict[str, list[Mapping[str, Any]]], data: RunData, pairs: PairData,
                  quantity: Quantity, *, per: int = PER, most: int = MOST_ROWS) -> Html:  # fmt: skip
    """Pairs by ``quantity``, with a choice of functional and a search; the first argument gets what the script needs.

    Effects come with their noise floor, spread, interference and texts; shares with what tells a pair only; influences
    with the effects beside them.
    """
    table, values = pairs.table, getattr(pairs.table, quantity)
    options = functional_options(data, pairs, rescored(table) if quantity == "influence" else table.functionals)
    names = [name for group in options.values() for name, _ in group]
    groups = [each.name for m in range(len(data.behaviours)) for each in pairs.groups(m) if not each.is_category]
    first = [name for name in groups if name in names]
    found = rankings(table, values, names, first, per=per, most=most)
    changing = _changing(data, pairs, quantity, found)
    page_rankings[quantity] = [
        _for_script(data, pairs, quantity, each, [column.cells[place] for column in changing])
        for place, each in enumerate(found)
    ]
    shown = found[0].rows
    rest = sorted({row for each in found for row in each.rows} - set(shown))
    rows = [_row(pairs, quantity, row, changing, place) for place, row in enumerate(shown)]
    rows += [_row(pairs, quantity, row, changing, None) for row in rest]
    head = _head(pairs, quantity, changing, data.audit)
    body = element("table", element("thead", element("tr", *head)), element("tbody", *rows))
    return element(
        "div",
        _controls(options),
        element("div", body, class_="scroll tall"),
        element("p", page_rankings[quantity][0]["rest"], class_="quiet", data_part="rest"),
        class_="ranking",
        data_ranking=quantity,
    )


def functional_options(data: RunData, pairs: PairData, among: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Functionals to choose from as (name, title), by heading: groups of probes, then the features most moved."""
    wanted = set(among)
    found: dict[str, list[tuple[str, str]]] = {}
    for m, behaviour in enumerate(data.behaviours):
        found[f"{behaviour} ({data.unit})"] = [(each.name, each.name) for each in pairs.groups(m)]
        rest = [each for each in pairs.means if each.behaviour == m and each.converted]
        if rest:
            unit = unit_of(pairs.table, data.policy, rest[0].name)
            found[f"{behaviour} ({unit})"] = [(each.name, each.name) for each in rest]
        moved = {int(pairs.table.features[place]) for place in moved_features(pairs, m)}
        shifts = [each for each in pairs.shifts if each.behaviour == m and each.feature in moved]
        words = {feature: feature_name(data, feature).partition(" ")[2] for feature in moved}
        found[f"coefficients of {behaviour}"] = [(e.name, f"{e.name}  {words[e.feature]}".strip()) for e in shifts]
    kept = {heading: [each for each in options if each[0] in wanted] for heading, options in found.items()}
    return {heading: options for heading, options in kept.items() if options}


def _controls(options: Mapping[str, list[tuple[str, str]]]) -> Html:
    groups, place = [], 0
    for heading, entries in options.items():
        found = [element("option", title, value=place + k) for k, (_, title) in enumerate(entries)]
        groups.append(element("optgroup", *found, label=heading))
        place += len(entries)
    return element(
        "p",
        element("label", "rank by ", element("select", *groups, data_part="functional")),
        element("label", "search ", element("input", type="search", placeholder="row, kind, text …")),
        element("span", class_="quiet", data_part="matches"),
        class_="controls",
    )


def _changing(data: RunData, pairs: PairData, quantity: Quantity, found: Sequence[Ranking]) -> list[Column]:
    """The columns that depend on the functional."""
    table = pairs.table
    places = [pairs.place(each.name) for each in found]
    values = getattr(table, quantity)

    def cells(text: Any) -> list[list[str]]:
        return [[text(row, place) for row in each.rows] for each, place in zip(found, places, strict=True)]

    columns = [
        Column(quantity, [aligned(values[list(each.rows), place]) for each, place in zip(found, places, strict=True)])
    ]
    if quantity == "effect" and table.floor is not None:
        columns.append(Column("×\u00a0floor", cells(lambda row, place: ratio(table, row, place))))
    if quantity == "effect" and table.spread is not None:
        spread = table.spread
        numbers = [aligned(spread[list(each.rows), place]) for each, place in zip(found, places, strict=True)]
        columns.append(Column("±\u00a0repeats", [[text.lstrip("+") for text in texts] for texts in numbers]))
    if quantity == "influence":
        effects = [aligned(table.effect[list(each.rows), place]) for each, place in zip(found, places, strict=True)]
        columns.append(Column("live\u00a0effect", effects))
    return columns


def plus(value: float) -> str:
    """A number of three digits with its sign."""
    return f"+{number(value)}" if value > 0 else number(value)


def aligned(values: Array) -> list[str]:
    """Numbers with their signs and as many decimals as give the largest three digits, to be read below each other."""
    largest = float(np.nanmax(np.abs(values), initial=0.0))
    decimals = 2 - math.floor(math.log10(largest)) if largest > 0 else 2
    if decimals > 6:  # zeros without end
        return [plus(float(each)) for each in values]
    return [signed(float(each), max(decimals, 0)) for each in values]


def ratio(table: Any, row: int, place: int) -> str:
    """How many times its noise floor an effect is."""
    floor, effect = float(table.floor[row, place]), abs(float(table.effect[row, place]))
    if np.isnan(floor):
        return NONE
    return number(effect / floor, 2) if floor > 0 else number(float("inf") if effect else 0.0)


def _weak(pairs: PairData, quantity: Quantity, row: int, name: str) -> bool:
    floor = pairs.table.floor
    if quantity != "effect" or floor is None:
        return False
    place = pairs.place(name)
    return not abs(float(pairs.table.effect[row, place])) > TIMES * float(floor[row, place])


def _for_script(
    data: RunData, pairs: PairData, quantity: Quantity, found: Ranking, cells: Sequence[Sequence[str]]
) -> Mapping[str, Any]:
    """One ranking as data: rows in order, and per column that changes the text of each."""
    return {
        "title": f"{quantity} ({unit_of(pairs.table, data.policy, found.name)})",
        "rest": _rest(found, quantity),
        "rows": list(found.rows),
        "weak": [int(_weak(pairs, quantity, row, found.name)) for row in found.rows],
        "cells": list(cells),
    }


def _rest(found: Ranking, quantity: Quantity) -> str:
    whole = len(found.rows) + found.left
    option = "" if quantity == "effect" else f" --quantity {quantity}"
    command = f"smda pairs RUN --by {shlex.quote(found.name)}{option} --top {whole}"
    if not found.left:
        return f"All {count(whole, 'pair')} with an account by {found.name}."
    return (
        f"The {len(found.rows):,} largest of {count(whole, 'pair')} by {found.name}; the {quantity} of no other is "
        f"larger than {number(found.largest)}. {command} lists all."
    )


def _head(pairs: PairData, quantity: Quantity, changing: Sequence[Column], audit: bool) -> list[Html]:
    numeric = [each.title for each in changing]
    names = ["#", "pair", *data_columns(pairs.table)[:MOST_COLUMNS], *numeric]
    times = "repeats" if audit else "windows"
    names += ["interference", "flag", times, "text"] if quantity == "effect" else [times]
    numbers = {"#", *numeric, "interference", times}
    return [
        element("th", element("button", each, type="button", class_="sort"), scope="col",
                class_="number" if each in numbers else None, data_changing=each == quantity)
        for each in names
    ]  # fmt: skip


def _row(pairs: PairData, quantity: Quantity, row: int, changing: Sequence[Column], place: int | None) -> Html:
    """A pair's row; ``place`` in the first ranking, None where it is not in it and waits for the script."""
    table, pair = pairs.table, pairs.table.pairs[row]
    cells = [element("td", "" if place is None else place + 1, class_="number", data_cell=True)]
    cells.append(element("th", pair_name(pair), scope="row", class_="tight"))
    cells += [element("td", pair.columns.get(name, NONE)) for name in data_columns(table)[:MOST_COLUMNS]]
    for column in changing:
        text = "" if place is None else column.cells[0][place]
        cells.append(element("td", text, class_="number", data_cell=True))
    windows = element("td", int(table.windows[row]), class_="number")
    if quantity == "effect":
        cells.append(element("td", percent(float(table.interference[row])), class_="number"))
        cells.append(element("td", element("b", "⚑") if table.flagged[row] else NONE, class_="tight"))
        cells += [windows, element("td", text_cell(pair), class_="pairtext")]
    else:
        cells.append(windows)
    # Greyed for the first functional; the script knows it for the others.
    weak = place is not None and _weak(pairs, quantity, row, _first_name(pairs))
    return element("tr", *cells, data_row=row, hidden=place is None, class_="weak" if weak else None)


def _first_name(pairs: PairData) -> str:
    return pairs.groups(0)[0].name if pairs.groups(0) else pairs.table.functionals[0]


def text_cell(pair: Pair) -> Html:
    """The text of a pair, folded after a line or two and cut where it is very long; a dash where it is kept out."""
    if pair.text is None:
        return Html(NONE)
    words = " ".join(pair.text[: 4 * _SHORT].split())
    if len(pair.text) <= _SHORT and "\n" not in pair.text:
        return join([words])
    whole = pair.text if len(pair.text) <= MOST_TEXT else f"{pair.text[:MOST_TEXT]} … ({len(pair.text):,} characters)"
    short = words if len(words) <= _SHORT else f"{words[:_SHORT].rstrip()}…"
    return element("details", element("summary", short), element("div", whole, class_="whole"))
