"""A category's change over the run as bars from its start to its end: by feature, or by row of the account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from smda_callbacks.records import FEATURE_ROWS, ROWS
from smda_callbacks.report.data import RunData
from smda_callbacks.report.figures import ROW_NAMES
from smda_callbacks.report.shifts import feature_name

Kind = Literal["start", "end", "feature", "others", "row", "intercept", "residual"]


@dataclass(frozen=True)
class Bar:
    """One bar: ``value`` is a mean for ``start`` and ``end``, else a change; start and all changes sum to the end."""

    label: str
    value: float
    kind: Kind


def bars_by_feature(data: RunData, category: int, behaviour: int, top: int = 10) -> list[Bar]:
    """The ``top`` features with the largest contributions (their five rows together), then all the rest."""
    by_feature = data.account.by_feature[category, :, behaviour]
    order = np.argsort(-np.abs(by_feature), kind="stable")
    shown, rest = order[:top], order[top:]
    inner = [
        Bar(feature_name(data, int(data.policy.features[j])), float(by_feature[j]), "feature")
        for j in shown
        if by_feature[j] != 0
    ]
    if rest.size:
        plural = "s" if rest.size > 1 else ""
        inner.append(Bar(f"{rest.size} other feature{plural}", float(by_feature[rest].sum()), "others"))
    return _between(data, category, behaviour, [*inner, *_tail(data, category, behaviour)])


def bars_by_row(data: RunData, category: int, behaviour: int) -> list[Bar]:
    """One bar for each row of the account."""
    rows = data.account.rows
    inner = [Bar(ROW_NAMES[row], float(rows[row][category, behaviour]), "row") for row in FEATURE_ROWS]
    return _between(data, category, behaviour, [*inner, *_tail(data, category, behaviour)])


def most_changed(data: RunData, behaviour: int) -> int:
    """Number of the category whose mean changed most over the run."""
    return int(np.argmax(np.abs(data.means[-1, :, behaviour] - data.means[0, :, behaviour])))


def _tail(data: RunData, category: int, behaviour: int) -> list[Bar]:
    intercept, residual = (float(data.account.rows[row][category, behaviour]) for row in ROWS[5:])
    return [Bar(ROW_NAMES["intercept"], intercept, "intercept"), Bar(ROW_NAMES["residual"], residual, "residual")]


def _between(data: RunData, category: int, behaviour: int, inner: list[Bar]) -> list[Bar]:
    start, end = (float(data.means[record, category, behaviour]) for record in (0, -1))
    return [
        Bar(f"start, step {data.steps[0]}", start, "start"),
        *inner,
        Bar(f"end, step {data.steps[-1]}", end, "end"),
    ]
