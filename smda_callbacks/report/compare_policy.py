"""How the policies of runs came apart, feature by feature and pathway by pathway, beside the noise floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smda_callbacks.maths.uncertainty import total_floor
from smda_callbacks.records import PATHWAYS, Array
from smda_callbacks.report.compare_runs import ComparedRun
from smda_callbacks.report.compare_series import Apart, apart_by
from smda_callbacks.report.data import coef_of
from smda_callbacks.report.shifts import feature_name

#: A pathway, or all of them together.
TOTAL = "total"


@dataclass(frozen=True)
class FeatureApart:
    """One feature's coefficient in all runs; None where a run's policy does not hold the feature.

    ``start``, ``end``: run -> coefficient. ``shift``: run -> part of PATHWAYS, or ``total`` -> shift over the run.
    ``apart``: run -> part or ``total`` -> how far its shift is from the reference's.
    """

    feature: int
    behaviour: str
    title: str  # its number and what is known of it
    start: Mapping[str, float | None]
    end: Mapping[str, float | None]
    shift: Mapping[str, Mapping[str, float] | None]
    apart: Mapping[str, Mapping[str, Apart] | None]

    @property
    def largest(self) -> float:
        """Size of the largest difference in the whole shift; below 0 where there is none."""
        found = [each[TOTAL].difference for each in self.apart.values() if each is not None]
        return max(map(abs, found), default=-1.0)

    @property
    def any_above(self) -> bool:
        """Whether some run's difference is above its noise, or not known to be below, in some pathway."""
        found = [one for each in self.apart.values() if each is not None for one in each.values()]
        return any(each.above_noise is not False for each in found)


@dataclass(frozen=True)
class PathwayApart:
    """L2 norms over the features that both policies hold, in coefficient units.

    ``norm``: run -> norm of its shift. ``apart``: run -> norm of the difference to the reference's, and of its floor.
    """

    part: str
    behaviour: str
    norm: Mapping[str, float]
    apart: Mapping[str, Apart]


def feature_differences(runs: Sequence[ComparedRun], behaviour: str, step: int | None = None) -> list[FeatureApart]:
    """All features of the runs' policies, those above the noise first, by the difference in the whole shift.

    Features are the same where their SAE index is; the first run is the reference. ``step``: up to which shifts count,
    a step that all runs were read at; the end of each run if None. All runs need a store.
    """
    known = [_Coefficients(run, behaviour, step) for run in runs]
    features = dict.fromkeys(feature for each in known for feature in each.places)
    found = [_feature(known, feature, behaviour) for feature in features]
    return sorted(found, key=lambda each: (not each.any_above, -each.largest))


def pathway_differences(runs: Sequence[ComparedRun], behaviour: str) -> list[PathwayApart]:
    """The same over all features at once, for every part of PATHWAYS and for their sum."""
    known = [_Coefficients(run, behaviour, None) for run in runs]
    reference, found = known[0], []
    for part in (*PATHWAYS, TOTAL):
        apart = {}
        for other in known[1:]:
            shared = [each for each in reference.places if each in other.places]
            values = [[each.shift(feature)[part] for feature in shared] for each in (reference, other)]
            floors = [_norm([each.floor(feature, part) for feature in shared]) for each in (reference, other)]
            difference = _norm(np.subtract(values[1], values[0]).tolist())
            assert difference is not None
            apart[other.name] = apart_by(difference, floors)
        norms = {each.name: _norm([each.shift(feature)[part] for feature in each.places]) for each in known}
        found.append(PathwayApart(part, behaviour, {name: norm or 0.0 for name, norm in norms.items()}, apart))
    return found


class _Coefficients:
    """What a run did to the coefficients of one behaviour, up to a step."""

    def __init__(self, run: ComparedRun, behaviour: str, step: int | None) -> None:
        data = run.data
        assert data is not None
        at, m = (-1 if step is None else data.steps.index(step)), data.behaviours.index(behaviour)
        self.name, self.data = run.name, data
        self.places = {int(feature): place for place, feature in enumerate(data.policy.features)}
        self.start: Array = coef_of(data.records[0])[:, m]
        self.end: Array = coef_of(data.records[at])[:, m]
        self.shifts = {part: values[at, :, m] for part, values in run.shifts.items()}
        self.floors = None if run.floors is None else {part: each[at, :, m] for part, each in run.floors.items()}

    def shift(self, feature: int) -> dict[str, float]:
        place = self.places[feature]
        parts = {part: float(values[place]) for part, values in self.shifts.items()}
        return {**parts, TOTAL: float(self.end[place] - self.start[place])}

    def floor(self, feature: int, part: str) -> float | None:
        """The floor of a part; that of the total is as if the parts were independent, which they are not quite."""
        if self.floors is None:
            return None
        place = self.places[feature]
        if part == TOTAL:
            return float(total_floor([each[place] for each in self.floors.values()]))
        return float(self.floors[part][place])


def _feature(known: Sequence[_Coefficients], feature: int, behaviour: str) -> FeatureApart:
    holds = [each for each in known if feature in each.places]
    shift = {each.name: each.shift(feature) if each in holds else None for each in known}
    reference = known[0]
    apart: dict[str, Mapping[str, Apart] | None] = {}
    for other in known[1:]:
        before, after = shift[reference.name], shift[other.name]
        if before is None or after is None:
            apart[other.name] = None
            continue
        apart[other.name] = {
            part: apart_by(after[part] - before[part], [each.floor(feature, part) for each in (reference, other)])
            for part in after
        }
    return FeatureApart(
        feature,
        behaviour,
        feature_name(holds[0].data, feature),
        {each.name: _at(each.start, each, feature) for each in known},
        {each.name: _at(each.end, each, feature) for each in known},
        shift,
        apart,
    )


def _at(values: Array, of: _Coefficients, feature: int) -> float | None:
    return float(values[of.places[feature]]) if feature in of.places else None


def _norm(values: Sequence[float | None]) -> float | None:
    return None if any(each is None for each in values) else float(np.linalg.norm(np.array(values, dtype=float)))
