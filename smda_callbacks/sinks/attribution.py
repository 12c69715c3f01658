"""What a run attributes to its pairs, and what every window's change starts from: read off the manifest and records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.functionals import FunctionalSet, functional_set, measured
from smda_callbacks.maths.pathways import State
from smda_callbacks.records import Array, PolicyRecord, RunStart, WindowRecord


def is_audit(manifest: Mapping[str, Any]) -> bool:
    """Whether every window is one pair's change from the baseline, rather than a stretch of training."""
    return manifest.get("kind") == "audit"


def chained(start: RunStart, windows: Iterable[WindowRecord]) -> Iterator[tuple[WindowRecord, WindowRecord]]:
    """Every ok window behind the record that its change starts from: the last ok one; in an audit the baseline."""
    before, audit = start.baseline, is_audit(start.manifest)
    for window in windows:
        if window.status == "ok":
            yield before, window
            before = before if audit else window


def is_attributed(manifest: Mapping[str, Any]) -> bool:
    """Whether the run was to attribute its change to pairs."""
    attribution = manifest.get("attribution") or {}
    return attribution.get("engine", "off") != "off" and bool(attribution.get("functionals"))


@dataclass(frozen=True)
class Functionals:
    """The functionals that a run attributes, in the order of its manifest: some or all of a set."""

    names: tuple[str, ...]
    whole: FunctionalSet
    places: NDArray[np.int64]  # [functional], into whole.names
    policy: PolicyRecord

    def moved(self, before: WindowRecord, after: WindowRecord) -> Array:
        """What is measured between two ok records, ``[functional]``."""
        values = measured(self.whole, state_of(before), state_of(after), scale=self.policy.scale, lam=self.policy.lam)
        return values[self.places]


def functionals_of(start: RunStart) -> Functionals | None:
    """The functionals that a run attributes, made again from its policy and probes; None where it attributes nothing.

    Raises ValueError where the manifest names one that does not follow from them.
    """
    if not is_attributed(start.manifest):
        return None
    names, policy = tuple(start.manifest["attribution"]["functionals"]), start.policy
    expected = {probe.category: probe.expected for probe in start.probes}
    categories, features = list(expected), policy.features.tolist()
    whole = functional_set(
        behaviours=policy.behaviours,
        categories=categories,
        refuse=[expected[name] == "refuse" for name in categories],
        groups=np.array([categories.index(probe.category) for probe in start.probes], dtype=np.int64),
        features=policy.features,
        attributed=[features.index(feature) for feature in attributed_features(names, policy.features).tolist()],
        target=policy.target,
        gating=any(name.startswith("feature:") and name.split(":")[2] == "gating" for name in names),
    )
    places = {name: place for place, name in enumerate(whole.names)}
    unknown = [name for name in names if name not in places]
    if unknown:
        raise ValueError(
            f"the manifest's functional {unknown[0]!r} does not follow from the run's policy and probes. The store was "
            "changed, or written by another version. Next step: restore it, or read it with that version."
        )
    return Functionals(names, whole, np.array([places[name] for name in names], dtype=np.int64), policy)


def attributed_features(names: Sequence[str], features: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the policy's ``features`` that have functionals among ``names``, in the order of the names."""
    named = dict.fromkeys(name.split(":")[1] for name in names if name.startswith("feature:"))
    known = {str(feature): feature for feature in features.tolist()}
    return np.array([known[each] for each in named if each in known], dtype=np.int64)


def state_of(record: WindowRecord) -> State:
    """The snapshot of an ok record. Raises ValueError where it has none."""
    if record.snapshot is None:
        raise ValueError(f"the record of step {record.step} is ok but has no snapshot; ok records carry one.")
    return State(record.snapshot.pre, record.snapshot.gate, record.snapshot.y)


def undescribed(windows: Iterable[WindowRecord]) -> list[int]:
    """Ids of pairs that are in a book but that no window describes; there are none in a whole store."""
    records = list(windows)
    seen = {pair.id for window in records for pair in window.pairs_seen}
    booked = {int(each) for window in records if window.pairs for each in (*window.pairs.ids, *window.pairs.later_ids)}
    return sorted(booked - seen)
