"""How each metric is computed from the records; the names are in :mod:`smda_callbacks.sinks.metrics`.

Every function takes a :class:`Reading` and returns an array over the axes of the metric's name, in their order, or None
where there is nothing to report. An entry that is NaN is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.account import mean_by_group
from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import PATHWAYS, ROWS, Array, NoiseFloor, Probe, RunStart, WindowRecord
from smda_callbacks.sinks.noise_in_force import MEANS, floors_at, in_force, known
from smda_callbacks.sinks.pair_table import PairTable, table_of
from smda_callbacks.sinks.pair_totals import PairTotals

GROUPS = ("refuse", "comply")


@dataclass(frozen=True)
class Progress:
    """What a run has come to: its last ok record, and sums since the start.

    ``total``: shifts, part of PATHWAYS -> ``[feature, behaviour]``, coefficient units. ``pairs``: what pairs did; None
    where nothing is attributed to them. ``noise``: the floor in force; ``squares``: of the windows' floors, summed, by
    the names of :func:`~smda_callbacks.sinks.noise_in_force.floors_at`. Both None where it was not measured.
    """

    last: WindowRecord
    total: Mapping[str, Array]
    pairs: PairTotals | None = None
    noise: NoiseFloor | None = None
    squares: Mapping[str, Array] | None = None

    @classmethod
    def at(cls, start: RunStart) -> Progress:
        """Before the first window: the baseline, and sums of zero."""
        zero = {part: np.zeros_like(start.policy.coef) for part in PATHWAYS}
        floors = floors_at(start.noise, 0.0)
        squares = None if floors is None else {name: np.zeros_like(each) for name, each in floors.items()}
        return cls(start.baseline, zero, PairTotals.at(start), known(start.noise), squares)

    def after(self, window: WindowRecord) -> Progress:
        """After one more window; one that is not ok moves nothing, because the next one spans it."""
        pairs = None if self.pairs is None else self.pairs.after(window)
        if window.status != "ok":
            return replace(self, pairs=pairs)
        total = {part: total + window.shift.get(part, 0.0) for part, total in self.total.items()}
        noise = in_force(self.noise, window)
        return Progress(window, total, pairs, noise, self._squares_after(window, noise))

    def _squares_after(self, window: WindowRecord, noise: NoiseFloor | None) -> Mapping[str, Array] | None:
        floors = (
            floors_at(noise, window.update_rms) if window.shift else None
        )  # the baseline has no shift, and no noise
        if self.squares is None or floors is None:
            return self.squares
        return {name: total + np.square(floors[name]) for name, total in self.squares.items()}

    @cached_property
    def floors(self) -> Mapping[str, Array] | None:
        """Noise floors of the changes since the start: the windows' floors as independent noise, each with its own.

        By the names of :func:`~smda_callbacks.sinks.noise_in_force.floors_at`; None where it was not measured.
        """
        return None if self.squares is None else {name: np.sqrt(each) for name, each in self.squares.items()}

    @cached_property
    def pair_table(self) -> PairTable | None:
        """What the run's pairs did, made once for all that show it; None where nothing was attributed so far."""
        return None if self.pairs is None else table_of(self.pairs)


def progress_of(start: RunStart, windows: Iterable[WindowRecord]) -> Progress:
    """What a run has come to after ``windows``, in order."""
    return reduce(Progress.after, windows, Progress.at(start))


@dataclass(frozen=True)
class Reading:
    """What a metric is computed from.

    ``total``: see :class:`Progress`, up to this window; None if not known. ``pairs``: what the run's pairs did, for its
    summary only. ``noise``: the floor in force at the window; None where it was not measured.
    """

    window: WindowRecord
    start: RunStart
    total: Mapping[str, Array] | None = None
    pairs: PairTable | None = None
    noise: NoiseFloor | None = None


def categories(probes: Iterable[Probe]) -> list[str]:
    """Category names in the order of first appearance."""
    return list(dict.fromkeys(probe.category for probe in probes))


def groups(probes: Iterable[Probe]) -> list[str]:
    """The groups that occur: ``refuse``, ``comply``."""
    found = {probe.expected for probe in probes}
    return [group for group in GROUPS if group in found]


def numbers(labels: Iterable[str], names: list[str]) -> NDArray[np.int64]:
    """The place of every label in ``names``."""
    return np.array([names.index(label) for label in labels], dtype=np.int64)


def groups_of_probes(start: RunStart) -> NDArray[np.int64]:
    """Category number of every probe, ``[probe]``."""
    return numbers((probe.category for probe in start.probes), categories(start.probes))


def category_means(r: Reading) -> Array | None:
    """``[behaviour, category]``"""
    if r.window.snapshot is None:
        return None
    return mean_by_group(r.window.snapshot.y, groups_of_probes(r.start)).T


def category_changes(r: Reading) -> Array | None:
    """``[behaviour, category]``, since the baseline"""
    now, before = category_means(r), category_means(Reading(r.start.baseline, r.start))
    return None if now is None or before is None else now - before


def group_means(r: Reading) -> Array | None:
    """``[behaviour, group]``"""
    if r.window.snapshot is None:
        return None
    names = groups(r.start.probes)
    return mean_by_group(r.window.snapshot.y, numbers((probe.expected for probe in r.start.probes), names)).T


def group_account(r: Reading) -> Array | None:
    """``[behaviour, group, row]``: the account of the group's mean, categories weighted by their probes."""
    if not r.window.account:
        return None
    rows = np.array([r.window.account[row] for row in ROWS])  # [row, category, behaviour]
    result: Array = np.einsum("gc,rcb->bgr", group_weights(r.start), rows)
    return result


def group_weights(start: RunStart) -> Array:
    """``[group, category]``: share of the group's probes that are in the category."""
    rows, columns = groups(start.probes), categories(start.probes)
    counts = np.zeros((len(rows), len(columns)))
    for probe in start.probes:
        counts[rows.index(probe.expected), columns.index(probe.category)] += 1
    weights: Array = counts / counts.sum(axis=1, keepdims=True)
    return weights


def categories_are_pure(start: RunStart) -> bool:
    """Whether no category has probes of both groups: else a group's account does not follow from the categories'."""
    return bool(((group_weights(start) > 0).sum(axis=0) == 1).all())


def worst_drop(r: Reading) -> Array | None:
    """``[behaviour]``: largest fall of a category to refuse since the baseline; negative if all rose"""
    return _worst(r, "refuse", -1.0)


def worst_rise(r: Reading) -> Array | None:
    """``[behaviour]``: largest rise of a category to comply with since the baseline; negative if all fell"""
    return _worst(r, "comply", 1.0)


def _worst(r: Reading, group: str, sign: float) -> Array | None:
    changes, names = category_changes(r), groups(r.start.probes)
    if changes is None or group not in names:
        return None
    members = group_weights(r.start)[names.index(group)] > 0
    worst: Array = (sign * changes[:, members]).max(axis=1)
    return worst


def r2(r: Reading) -> Array | None:
    """``[behaviour]``"""
    return np.array(r.window.r2) if r.window.r2 else None


def r2_loo(r: Reading) -> Array | None:
    """``[behaviour]``"""
    return np.array(r.window.r2_loo) if r.window.r2_loo else None


def shift_norms(r: Reading) -> Array | None:
    """``[part, behaviour]``"""
    return _norms(r.window.shift)


def total_norms(r: Reading) -> Array | None:
    """``[part, behaviour]``, of the shifts summed since the baseline"""
    return _norms(r.total)


def _norms(shift: Mapping[str, Array] | None) -> Array | None:
    if not shift:
        return None
    norms: Array = np.linalg.norm([shift[part] for part in PATHWAYS], axis=1)
    return norms


def shift_norm(r: Reading) -> Array | None:
    """``[behaviour]``, of the sum of the parts"""
    return np.linalg.norm(sum(r.window.shift[part] for part in PATHWAYS), axis=0) if r.window.shift else None


def coef_norm(r: Reading) -> Array | None:
    """``[behaviour]``, of the coefficients' change since the baseline"""
    now, before = r.window.coef, r.start.baseline.coef
    return None if now is None or before is None else np.linalg.norm(now - before, axis=0)


def reliability(r: Reading) -> Array | None:
    """``[part]``; NaN where it could not be computed"""
    return np.array([r.window.reliability.get(part) for part in PATHWAYS], dtype=float)


def features_above_floor(r: Reading) -> Array | None:
    """``[part, behaviour]``: share of the features"""
    floors, shift = floors_at(r.noise, r.window.update_rms), r.window.shift
    if floors is None or not shift:
        return None
    return np.array([above_floor(shift[part], floors[part]).mean(axis=0) for part in PATHWAYS])


def categories_above_floor(r: Reading) -> Array | None:
    """``[behaviour]``: share of the categories"""
    floors, account = floors_at(r.noise, r.window.update_rms), r.window.account
    if floors is None or not account:
        return None
    share: Array = above_floor(sum(account[row] for row in ROWS), floors[MEANS]).mean(axis=0)
    return share
