"""The arrays behind the report's figures and tables, computed from a run store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from smda_callbacks.maths.account import mean_by_group
from smda_callbacks.maths.gaps import gap_table
from smda_callbacks.records import (
    FEATURE_ROWS,
    ROWS,
    Alert,
    Array,
    FeatureLabel,
    NoiseFloor,
    PolicyRecord,
    Probe,
    RunEnd,
    WindowRecord,
)
from smda_callbacks.report.rescored import with_influence
from smda_callbacks.sinks.attribution import is_audit
from smda_callbacks.sinks.noise_in_force import MEANS, accumulated_floors, known
from smda_callbacks.sinks.pair_table import PairTable, pair_table
from smda_callbacks.sinks.store_reader import RunStore

#: A shift counts as above its noise floor when it is more than so many times as large.
TIMES = 2.0


@dataclass(frozen=True)
class RunData:
    """A run as it was at one moment: the store is read once, so that all numbers of a report belong together."""

    store: RunStore
    windows: tuple[WindowRecord, ...]
    alerts: tuple[Alert, ...]
    end: RunEnd | None

    @classmethod
    def read(cls, store: RunStore) -> RunData:
        """Read all windows of ``store``. Raises StoreError where a file of it is damaged."""
        end = store.end  # first: what is written after it was read is left for the next report
        windows = tuple(store.windows())
        last = windows[-1].step if windows else store.baseline.step
        alerts = tuple(alert for alert in store.alerts() if alert.step <= last or end is not None)
        return cls(store, windows, alerts, end)

    @property
    def policy(self) -> PolicyRecord:
        return self.store.policy

    @property
    def probes(self) -> tuple[Probe, ...]:
        return self.store.probes

    @property
    def categories(self) -> tuple[str, ...]:
        return self.store.categories

    @property
    def behaviours(self) -> tuple[str, ...]:
        return self.policy.behaviours

    @property
    def audit(self) -> bool:
        """Whether every window is one pair's change from the baseline: then nothing may be summed over windows."""
        return is_audit(self.store.manifest)

    @cached_property
    def pairs(self) -> PairTable | None:
        """What the training pairs did over the run; None where no window was attributed."""
        return with_influence(pair_table(self.store.start, self.windows), self.store.path)

    @property
    def unit(self) -> str:
        """Unit of the behaviours: ``probability`` or ``logit``."""
        return self.policy.target

    @cached_property
    def noise(self) -> NoiseFloor | None:
        """The noise floor around the start, if it was measured with updates that moved anything."""
        return known(self.store.noise)

    @cached_property
    def renewed(self) -> list[int]:
        """Steps of the windows at whose end the noise floor was measured again."""
        return [window.step for window in self.ok if window.noise is not None]

    @cached_property
    def ok(self) -> tuple[WindowRecord, ...]:
        """The windows that were booked."""
        return tuple(window for window in self.windows if window.status == "ok")

    @cached_property
    def records(self) -> tuple[WindowRecord, ...]:
        """The baseline and the booked windows: the axis ``record`` of the arrays below."""
        return (self.store.baseline, *self.ok)

    @cached_property
    def steps(self) -> list[int]:
        """Step of every record."""
        return [record.step for record in self.records]

    @cached_property
    def expected(self) -> dict[str, str]:
        """Category -> ``refuse`` or ``comply``."""
        return {probe.category: probe.expected for probe in self.probes}

    @cached_property
    def labels(self) -> dict[int, FeatureLabel]:
        """SAE index -> what is known of the feature."""
        return {label.feature: label for label in self.policy.labels}

    @cached_property
    def means(self) -> Array:
        """Mean behaviour, ``[record, category, behaviour]``, in the policy's units."""
        return np.array([mean_by_group(_y(record), self.store.groups) for record in self.records])

    @cached_property
    def group_means(self) -> dict[str, Array]:
        """``refuse``, ``comply`` (those that occur) -> mean behaviour over its probes, ``[record, behaviour]``."""
        members = {
            group: np.array([probe.expected == group for probe in self.probes]) for group in ("refuse", "comply")
        }
        return {
            group: np.array([_y(record)[rows].mean(axis=0) for record in self.records])
            for group, rows in members.items()
            if rows.any()
        }

    @cached_property
    def floors(self) -> dict[str, Array] | None:
        """Noise floors of the changes since the start, ``[record, ...]`` each: see :func:`accumulated_floors`.

        Raises ValueError for an audit whose noise was measured.
        """
        if self.noise is not None:
            refuse_audit(self)
        return accumulated_floors(self.noise, self.ok)

    @cached_property
    def account(self) -> RunAccount:
        """The account of the whole run."""
        return run_account(self)


@dataclass(frozen=True)
class RunAccount:
    """The account of a run: the sums of its windows' accounts, in behaviour units.

    ``rows``: row of ROWS -> ``[category, behaviour]``; they sum to the change of the means since the start.
    ``features``: row of FEATURE_ROWS -> ``[category, feature, behaviour]``; they sum to their rows.
    """

    rows: Mapping[str, Array]
    features: Mapping[str, Array]

    @property
    def by_feature(self) -> Array:
        """All rows of a feature together, ``[category, feature, behaviour]``."""
        total: Array = np.sum([self.features[row] for row in FEATURE_ROWS], axis=0)
        return total


def run_account(data: RunData) -> RunAccount:
    """Sum the accounts of all booked windows; zeros before the first. Raises ValueError for an audit."""
    refuse_audit(data)
    categories, (features, behaviours) = len(data.categories), data.policy.coef.shape
    rows = {row: np.zeros((categories, behaviours)) for row in ROWS}
    by_feature = {row: np.zeros((categories, features, behaviours)) for row in FEATURE_ROWS}
    for window in data.ok:
        for row in ROWS:
            rows[row] = rows[row] + window.account[row]
        for row in FEATURE_ROWS:
            by_feature[row] = by_feature[row] + window.feature_account[row]
    return RunAccount(rows, by_feature)


def behaviour_floors(data: RunData) -> Array | None:
    """Noise floor of the change of :attr:`RunData.means` since the start, ``[record, category, behaviour]``."""
    return None if data.floors is None else data.floors[MEANS]


def gaps_now(data: RunData) -> list[Mapping[str, Any]]:
    """The gap table at the last booked record, as rows; refusal is the first behaviour. An audit has but the start."""
    if data.audit:
        return list(data.store.gaps_start)
    if data.end is not None:
        return list(data.end.gaps)
    record = data.records[-1]
    assert record.snapshot is not None
    rows = gap_table(
        record.snapshot.y,
        record.snapshot.x,
        scale=data.policy.scale,
        coef=coef_of(record),
        intercept=np.asarray(record.intercept),
        groups=data.store.groups,
        categories=data.categories,
        expected=[data.expected[name] for name in data.categories],
        features=data.policy.features,
        target=data.policy.target,
    )
    return [asdict(row) for row in rows]


def missed(data: RunData) -> tuple[list[int], list[int]]:
    """Steps of the windows whose change the SAE was checked on, and of those where it missed more than all of it.

    At fixed gates: what the magnitude pathway rests on.
    """
    checked = [
        (window.step, window.health.delta_fvu_magnitude)
        for window in data.ok
        if window.health is not None and window.health.delta_fvu_magnitude is not None
    ]
    return [step for step, _ in checked], [step for step, value in checked if value > 1]


def refuse_audit(data: RunData) -> None:
    """Raise ValueError for an audit: its windows all start from the baseline, and their sum is no change of a model."""
    if data.audit:
        raise ValueError(
            "the run is an audit: every window is one pair's change from the same start, so that their sum over "
            "windows means nothing. Next step: read its pairs, RunData.pairs."
        )


def _y(record: WindowRecord) -> Array:
    if record.snapshot is None:
        raise ValueError(f"the record of step {record.step} is ok but has no snapshot; ok records carry one.")
    return record.snapshot.y


def coef_of(record: WindowRecord) -> Array:
    """Coefficients of an ok record, ``[feature, behaviour]``."""
    if record.coef is None:
        raise ValueError(f"the record of step {record.step} is ok but has no coefficients; ok records carry them.")
    return record.coef
