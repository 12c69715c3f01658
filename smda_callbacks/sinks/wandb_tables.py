"""Tables of a run at one moment, as plain columns and rows, ready for a tracker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import PATHWAYS, ROWS, Array, RunStart, WindowRecord
from smda_callbacks.sinks.above_noise import categories_above, features_above
from smda_callbacks.sinks.metric_values import Progress, Reading, categories, category_means
from smda_callbacks.sinks.noise_in_force import floors_at
from smda_callbacks.sinks.wandb_private import LogText, shown_text

MAX_ROWS = 2000  # W&B keeps 10,000 rows of a table; the run store has them all
MAX_BARS = 20

#: How the column of texts is called, if there is one.
TEXT_COLUMN: Mapping[LogText, tuple[str, ...]] = {"none": (), "hash": ("text_sha256",), "full": ("text",)}


@dataclass(frozen=True)
class Table:
    """``data`` has one list per row in the order of ``columns``: text, numbers, None for what is not known."""

    columns: tuple[str, ...]
    data: tuple[tuple[Any, ...], ...]


def categories_table(start: RunStart, progress: Progress) -> Table:
    """One row per category and behaviour: mean at the start and now, and the last window's account.

    ``above_noise``: whether the change is more than twice its noise floor.
    """
    names, above = categories(start.probes), categories_above(start, progress)
    before, now = _means(start, start.baseline), _means(start, progress.last)
    rows = []
    for c, name in enumerate(names):
        members = [probe for probe in start.probes if probe.category == name]
        for m, behaviour in enumerate(start.policy.behaviours):
            account = [_at(progress.last.account.get(row), c, m) for row in ROWS]
            means = [finite(before[m, c]), finite(now[m, c]), finite(now[m, c] - before[m, c])]
            noticed = None if above is None else bool(above[m, c])
            expected = "/".join(sorted({probe.expected for probe in members}))
            rows.append((name, expected, len(members), behaviour, *means, noticed, *account))
    head = ("category", "expected", "probes", "behaviour", "mean_start", "mean", "change", "above_noise")
    return Table((*head, *(f"window_{row}" for row in ROWS)), tuple(rows))


def features_table(start: RunStart, progress: Progress) -> Table:
    """One row per feature and behaviour, by the change of the coefficient since the start, largest first.

    ``run_above_noise``: the parts whose shift since the start is above noise (:mod:`smda_callbacks.sinks.above_noise`).
    """
    policy, last, run = start.policy, progress.last, features_above(start, progress)
    above = _above_floor(progress)
    words = {label.feature: label for label in policy.labels}
    rows = []
    for j, m in _largest_first(_change(start, last)):
        label = words.get(int(policy.features[j]))
        parts = [_at(progress.total[part], j, m) for part in PATHWAYS]
        window = [_at(last.shift.get(part), j, m) for part in PATHWAYS]
        coefs = [_at(start.baseline.coef, j, m), _at(last.coef, j, m)]
        noticed = None if above is None else bool(above[j, m])
        strong = None if run is None else ", ".join(part for part in PATHWAYS if run[part][j, m])
        known = (label.label or "", ", ".join(label.promoted)) if label else ("", "")
        name = policy.behaviours[m]
        rows.append((str(policy.features[j]), name, *coefs, *parts, *window, noticed, strong, *known))
    head = ("feature", "behaviour", "coef_start", "coef")
    tail = ("window_above_floor", "run_above_noise", "label", "promoted")
    whole, recent = (f"run_{part}" for part in PATHWAYS), (f"window_{part}" for part in PATHWAYS)
    return Table((*head, *whole, *recent, *tail), tuple(rows))


def probes_table(start: RunStart, progress: Progress, log_text: LogText) -> Table:
    """One row per probe and behaviour. The text is left out, or its hash, or itself: see :func:`shown_text`."""
    rows = []
    for i, probe in enumerate(start.probes):
        for m, behaviour in enumerate(start.policy.behaviours):
            before, now = _reading(start.baseline, i, m), _reading(progress.last, i, m)
            change = now - before if now is not None and before is not None else None
            text = () if log_text == "none" else (shown_text(probe.text, log_text),)
            rows.append((probe.id, probe.category, probe.expected, behaviour, before, now, change, *text))
    head = ("probe", "category", "expected", "behaviour", "start", "now", "change")
    return Table((*head, *TEXT_COLUMN[log_text]), tuple(rows))


def gaps_table(gaps: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of the gap table; the features that pull away from what is expected become text."""
    if not gaps:
        return Table(("category",), ())
    columns = tuple(gaps[0])
    return Table(columns, tuple(tuple(_cell(row.get(name)) for name in columns) for row in gaps))


def feature_bars(start: RunStart, progress: Progress) -> Table:
    """The largest magnitude shifts since the start, first behaviour; those that are not above noise left out."""
    shift, above = progress.total[PATHWAYS[0]][:, :1], features_above(start, progress)
    strong = np.ones(len(shift), dtype=bool) if above is None else above[PATHWAYS[0]][:, 0]
    chosen = [j for j, _ in _largest_first(shift) if strong[j]][:MAX_BARS]
    return Table(("feature", "shift"), tuple((str(start.policy.features[j]), _at(shift, j, 0)) for j in chosen))


def category_bars(start: RunStart, progress: Progress) -> Table:
    """Change of every category since the start, first behaviour; those that are not above noise left out."""
    change = _means(start, progress.last)[0] - _means(start, start.baseline)[0]
    above = categories_above(start, progress)
    strong = np.ones(len(change), dtype=bool) if above is None else above[0]
    rows = zip(categories(start.probes), change, strong, strict=True)
    return Table(("category", "change"), tuple((name, finite(value)) for name, value, known in rows if known))


def _means(start: RunStart, window: WindowRecord) -> Array:
    """``[behaviour, category]``; NaN without a snapshot."""
    means = category_means(Reading(window, start))
    return np.full((len(start.policy.behaviours), len(categories(start.probes))), np.nan) if means is None else means


def _change(start: RunStart, last: WindowRecord) -> Array:
    now, before = last.coef, start.baseline.coef
    return np.zeros_like(start.policy.coef) if now is None or before is None else now - before


def _above_floor(progress: Progress) -> Array | None:
    """Whether any part of the last window's shift is above its floor, ``[feature, behaviour]``; None if not known."""
    shift, floors = progress.last.shift, floors_at(progress.noise, progress.last.update_rms)
    if floors is None or not shift:
        return None
    found: Array = np.any([above_floor(shift[part], floors[part]) for part in PATHWAYS], axis=0)
    return found


def _largest_first(values: Array) -> list[tuple[int, int]]:
    """Places (feature, behaviour) by absolute value, largest first, at most MAX_ROWS."""
    order = np.argsort(-np.abs(values), axis=None, kind="stable")[:MAX_ROWS]
    return [divmod(int(place), values.shape[1]) for place in order]


def _reading(window: WindowRecord, i: int, m: int) -> float | None:
    return None if window.snapshot is None else finite(window.snapshot.y[i, m])


def _at(array: Array | None, *place: int) -> float | None:
    return None if array is None else finite(array[place])


def finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return ", ".join(f"{feature}: {share:+.3g}" for feature, share in value)
    if isinstance(value, float | np.floating):
        return finite(value)
    return value.item() if isinstance(value, np.generic) else value
