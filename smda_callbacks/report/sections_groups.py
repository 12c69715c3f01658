"""The sections on groups of training pairs, and on pairs that move what they do not intend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.interference import against_swaps, interference, interference_matrix
from smda_callbacks.maths.uncertainty import times_for
from smda_callbacks.records import Array
from smda_callbacks.report import figures as f
from smda_callbacks.report import figures_pairs
from smda_callbacks.report import texts_pairs as texts
from smda_callbacks.report.data import TIMES, RunData
from smda_callbacks.report.figures_policy import COEF_UNIT
from smda_callbacks.report.group_shifts import LEVEL, GroupShifts, by_difference, group_bars, group_shifts
from smda_callbacks.report.group_test import RESAMPLES
from smda_callbacks.report.markup import NONE, Html, count, element, join, number, percent, table
from smda_callbacks.report.pair_ranking import MOST_COLUMNS, aligned, plus
from smda_callbacks.report.pairs_data import MOST_FEATURES, PairData, data_columns, need_pairs, pair_name
from smda_callbacks.report.section import Page, feature_warning, say
from smda_callbacks.report.shifts import feature_name
from smda_callbacks.sinks.pair_table import moved_coefficients

#: Features in the bar chart of groups; rows of tables shown at once, and at all.
CHARTED, SHOWN, LISTED = 12, 12, 100


def groups_section(page: Page) -> Html:
    """Groups of pairs side by side, with a test of whether they differ."""
    return join([feature_warning(page.data), page.for_behaviours(_groups_of)])


def _groups_of(page: Page, m: int) -> Html:
    data, pairs = page.data, need_pairs(page.data)
    found = group_shifts(pairs, m)
    if found is None:
        return say(texts.NO_GROUPS if pairs.parts(m, pairs.table.effect) else texts.NO_FEATURES)
    groups = found.groups
    left = f"Left out: {count(groups.left_out, 'pair')} without a group of two or more." if groups.left_out else ""
    pale = texts.UNFLOORED if found.floor is None else texts.GROUPS_PALE
    order = by_difference(found)
    unit = f"{data.unit} {COEF_UNIT}"
    chart = group_bars(data, found, order[:CHARTED])
    return join([
        say(texts.GROUPS, column=groups.column, left=left, noise=pale),
        page.figure(f"groups-{m}", chart, texts.GROUPS_CAPTION.format(unit=unit)),
        element("p", tested_sentence(data, found)),
        _group_table(data, found, order),
    ])  # fmt: skip


def tested_sentence(data: RunData, found: GroupShifts) -> str:
    """What the test did, how many tests there were, and how many found a difference."""
    tests = found.tests
    return texts.GROUPS_TEST.format(
        resamples=RESAMPLES, pairs=tests.pairs, tests=len(tests.p), level=LEVEL,
        different=int((tests.p_holm < LEVEL).sum()), caveat="" if data.audit else texts.GROUPS_CAVEAT,
    )  # fmt: skip


def _group_table(data: RunData, found: GroupShifts, order: list[int]) -> Html:
    rows = [(part, j) for j in order for part in found.mean]
    rows.sort(key=lambda row: float(found.p_holm(row[0])[row[1]]) >= LEVEL)  # stable: the others keep their order
    listed = rows[: LISTED + SHOWN]
    head = ["feature", "pathway", *found.groups.names, "p", "p corrected", "differ"]
    numeric = {*found.groups.names, "p", "p corrected"}
    first = table(head, [_group_row(data, found, *row) for row in listed[:SHOWN]], numeric)
    if len(listed) <= SHOWN:
        return first
    title = f"{count(len(rows) - SHOWN, 'further row')}" + (f"; {LISTED} are listed" if len(listed) < len(rows) else "")
    others = table(head, [_group_row(data, found, *row) for row in listed[SHOWN:]], numeric)
    return join([first, element("details", element("summary", title), others)])


def _group_row(data: RunData, found: GroupShifts, part: str, j: int) -> Html:
    p, corrected = float(found.p(part)[j]), float(found.p_holm(part)[j])
    whole = np.concatenate([found.mean[part][:, j], [np.abs(found.mean[part]).max()]])
    cells = [
        element("td", text, class_="number" if above else "number weak")
        for text, above in zip(aligned(whole)[:-1], found.above(part)[:, j], strict=True)
    ]
    differ = element("b", "● differ") if corrected < LEVEL else NONE
    return element(
        "tr",
        element("th", feature_name(data, int(found.features[j])), scope="row"),
        element("td", f.PART_NAMES[part], class_="tight"),
        *cells,
        *(element("td", number(each, 2), class_="number") for each in (p, corrected)),
        element("td", differ, class_="tight"),
    )


@dataclass(frozen=True)
class Interfering:
    """What pairs did beside what they intend, first behaviour; positions in the attributed features."""

    shift: Array  # [pair, feature] effect on the coefficient, by magnitude and by outputs
    floor: Array | None  # [pair, feature] inf where not known
    intended: NDArray[np.int64]  # [pair, k], -1 where fewer
    largest: NDArray[np.int64]  # [pair] -1 where it moves nothing
    above: NDArray[np.bool_]  # [pair] its largest effect is above noise; where that is not known, it is not zero


def interfering(data: RunData, pairs: PairData) -> Interfering | None:
    """Interference as the pair table has it, with what it is made of; None where no feature is attributed."""
    if not len(pairs.table.features):
        return None
    moved = moved_coefficients(pairs.table, data.policy.features)
    shift, floor, intended = moved.shift, moved.floor, moved.intended
    largest = interference(shift, intended, floor).largest
    size = np.abs(shift[np.arange(len(shift)), largest])
    limit = 0.0 if floor is None else times_for(shift.shape[1], TIMES) * floor[np.arange(len(shift)), largest]
    return Interfering(shift, floor, intended, largest, (largest >= 0) & (size > limit))


def interference_section(page: Page) -> Html:
    """Pairs whose effect falls on features that they do not intend, and where it goes."""
    data, pairs = page.data, need_pairs(page.data)
    found = interfering(data, pairs)
    if found is None:
        return say(texts.NO_FEATURES)
    limit = texts.INTERFERENCE_UNKNOWN if found.floor is None else texts.INTERFERENCE_LIMIT
    return join([
        element("p", flagged_sentence(pairs, found), class_="lead"),
        feature_warning(data),
        say(texts.INTERFERENCE, limit=limit),
        _interfering_table(data, pairs, found),
        element("h3", "From intended features to moved ones"),
        _matrix(page, pairs, found),
    ])  # fmt: skip


def flagged_sentence(pairs: PairData, found: Interfering) -> str:
    """How many pairs are flagged, of how many that can be judged."""
    judged = ~np.isnan(pairs.table.interference)
    usual = pairs.table.interference[judged & found.above]
    text = f"{int(pairs.table.flagged.sum()):,} of {count(int(judged.sum()), 'pair')} with known intention flagged."
    if found.floor is not None:
        text += f" {int((judged & found.above).sum()):,} of them have a largest effect above noise"
        text += f"; their interference is {percent(float(np.median(usual)))} in the median." if len(usual) else "."
        chance = against_swaps(found.shift[judged & found.above], found.intended[judged & found.above])
        if chance is not None:
            text += (
                f" If these pairs swap intentions at random it is {percent(chance.swapped)} (permutation test, "
                f"p = {number(chance.p, 2)} of being so low by chance)."
            )
    return text


def _interfering_table(data: RunData, pairs: PairData, found: Interfering) -> Html:
    """Flagged pairs first, then those with a largest effect above noise, by interference; the others greyed."""
    part = np.nan_to_num(pairs.table.interference, nan=-1.0)
    order = [int(row) for row in np.lexsort((-part, ~found.above, ~pairs.table.flagged)) if part[row] >= 0]
    listed = order[: SHOWN + LISTED]
    columns = data_columns(pairs.table)[: MOST_COLUMNS - 1]
    head = ["pair", *columns, "intended", "largest effect on", "effect", "× floor", "interference", "flag"]
    numeric = {"effect", "× floor", "interference"}
    rows = [_interfering_row(data, pairs, found, row, columns) for row in listed]
    if len(rows) <= SHOWN:
        return table(head, rows, numeric)
    title = count(len(order) - SHOWN, "further pair") + (f"; {LISTED} are listed" if len(listed) < len(order) else "")
    return join([
        table(head, rows[:SHOWN], numeric),
        element("details", element("summary", title), table(head, rows[SHOWN:], numeric)),
    ])  # fmt: skip


def _interfering_row(data: RunData, pairs: PairData, found: Interfering, row: int, columns: list[str]) -> Html:
    pair, at = pairs.table.pairs[row], int(found.largest[row])
    effect = float(found.shift[row, at])
    times = NONE
    if found.floor is not None and np.isfinite(found.floor[row, at]):
        times = number(abs(effect) / found.floor[row, at] if found.floor[row, at] > 0 else float("inf"), 2)
    intended = [feature_name(data, int(pairs.table.features[each])) for each in found.intended[row] if each >= 0]
    return element(
        "tr",
        element("th", pair_name(pair), scope="row", class_="tight"),
        *(element("td", pair.columns.get(name, NONE)) for name in columns),
        element("td", *(element("div", each) for each in intended)),
        element("td", feature_name(data, int(pairs.table.features[at]))),
        element("td", plus(effect), class_="number"),
        element("td", times, class_="number"),
        element("td", percent(float(pairs.table.interference[row])), class_="number"),
        element("td", element("b", "⚑ unintended") if pairs.table.flagged[row] else NONE, class_="tight"),
        class_=None if found.above[row] else "weak",
    )


def matrix_of(found: Interfering) -> tuple[Array, int]:
    """Matrix ``[feature, feature]`` over the pairs with some effect above noise and known intention; how many."""
    floor = np.zeros_like(found.shift) if found.floor is None else found.floor
    rows = (np.abs(found.shift) > TIMES * floor).any(axis=1) & (found.intended >= 0).any(axis=1)
    return interference_matrix(found.shift[rows], found.intended[rows]), int(rows.sum())


def _matrix(page: Page, pairs: PairData, found: Interfering) -> Html:
    matrix, used = matrix_of(found)
    known = np.flatnonzero(~np.isnan(matrix[:, :1]).ravel())
    if not used:
        return say("No pair with a known intention has an effect above noise: there is nothing to show.")
    moved = np.nansum(matrix, axis=0)
    moved[known] += 1.0  # intended features stay, so that what is beside them can be seen
    columns = np.sort(np.argsort(-moved, kind="stable")[:MOST_FEATURES])
    rows = known[:MOST_FEATURES]
    text = texts.MATRIX_UNFLOORED if found.floor is None else texts.MATRIX
    left = [count(len(matrix) - len(columns), "column"), count(len(known) - len(rows), "row")]
    omitted = [each for each in left if not each.startswith("0 ")]
    more = f" Left out, moved or intended less: {' and '.join(omitted)}." if omitted else ""
    features = pairs.table.features
    chart = figures_pairs.interference_map(
        page.data, matrix[rows][:, columns], features[rows].tolist(), features[columns].tolist()
    )
    return join([
        say(text + more, pairs=count(used, "pair")),
        page.figure("interference", chart, texts.MATRIX_CAPTION),
    ])  # fmt: skip
