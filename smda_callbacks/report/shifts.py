"""How the policy's coefficients shifted over a run, feature by feature, and what of it is above noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.pathways import State
from smda_callbacks.maths.uncertainty import above_floor, is_reliable, split_half_reliability
from smda_callbacks.records import PATHWAYS, Array, WindowRecord
from smda_callbacks.report.data import TIMES, RunData, behaviour_floors, coef_of, refuse_audit
from smda_callbacks.report.markup import token


@dataclass(frozen=True)
class FeatureShift:
    """What a run did to one feature's coefficient: ``shifts`` over PATHWAYS sum to ``end - start``.

    ``above``: part -> whether the shift is above its noise floor, and its part reliable over the run (see
    :func:`run_reliability`); empty where the floor was not measured.
    """

    place: int
    feature: int
    start: float
    end: float
    shifts: Mapping[str, float]
    above: Mapping[str, bool]

    @property
    def total(self) -> float:
        return self.end - self.start

    @property
    def any_above(self) -> bool:
        """Above noise in some part, or not known to be below it."""
        return not self.above or any(self.above.values())


def cumulative_shifts(data: RunData) -> dict[str, Array]:
    """Part of PATHWAYS -> shift since the start, ``[record, feature, behaviour]``; zero at the baseline.

    Raises ValueError for an audit.
    """
    refuse_audit(data)
    zero = np.zeros_like(data.policy.coef)
    return {part: np.cumsum([zero, *(window.shift[part] for window in data.ok)], axis=0) for part in PATHWAYS}


def shift_floors(data: RunData) -> dict[str, Array] | None:
    """Part -> noise floor of :func:`cumulative_shifts`, same shape; None where the noise was not measured."""
    floors = data.floors
    return None if floors is None else {part: floors[part] for part in PATHWAYS}


def norms(values: Array, behaviour: int) -> Array:
    """L2 norm over features of ``[record, feature, behaviour]``: ``[record]``."""
    result: Array = np.linalg.norm(values[:, :, behaviour], axis=1)
    return result


def run_reliability(data: RunData) -> dict[str, float | None]:
    """Part -> split-half reliability of the shift from the start of the run to its end; empty before the first window.

    Not the windows' own: what adds up over a run may be far more reliable than a step of it.
    """
    if len(data.records) < 2:
        return {}
    before, after = (_state(data.records[place]) for place in (0, -1))
    policy = data.policy
    return split_half_reliability(before, after, scale=policy.scale, lam=policy.lam, groups=data.store.groups)


def unreliable_parts(data: RunData) -> list[str]:
    """The parts whose shift over the run is not to be read feature by feature."""
    return [part for part, value in run_reliability(data).items() if not is_reliable(value)]


def _state(record: WindowRecord) -> State:
    assert record.snapshot is not None  # records of a run carry one
    return State(record.snapshot.pre, record.snapshot.gate, record.snapshot.y)


def feature_shifts(data: RunData, behaviour: int) -> list[FeatureShift]:
    """All features, those above noise first, by the size of the coefficient's change."""
    shifts, floors = cumulative_shifts(data), shift_floors(data)
    start, end, unreliable = coef_of(data.records[0]), coef_of(data.records[-1]), unreliable_parts(data)
    above = {
        part: above_floor(shifts[part][-1], floor[-1], TIMES) & (len(data.ok) > 0) & (part not in unreliable)
        for part, floor in (floors or {}).items()
    }
    found = [
        FeatureShift(
            j,
            int(feature),
            float(start[j, behaviour]),
            float(end[j, behaviour]),
            {part: float(values[-1, j, behaviour]) for part, values in shifts.items()},
            {part: bool(values[j, behaviour]) for part, values in above.items()},
        )
        for j, feature in enumerate(data.policy.features)
    ]
    return sorted(found, key=lambda each: (not each.any_above, -abs(each.total)))


def categories_above(data: RunData, behaviour: int) -> NDArray[np.bool_]:
    """Which categories' means changed by more than TIMES their noise floor since the start, ``[category]``.

    All where the floor was not measured: nothing is known against them.
    """
    floors = behaviour_floors(data)
    if floors is None:
        return np.ones(len(data.categories), dtype=bool)
    return above_floor(data.means[-1, :, behaviour] - data.means[0, :, behaviour], floors[-1, :, behaviour], TIMES)


def feature_name(data: RunData, feature: int) -> str:
    """A short name of a feature for axes and tables: its SAE index, then its label or the tokens that it promotes."""
    known = data.labels.get(feature)
    if known is None:
        return str(feature)
    text = known.label or " ".join(token(each) for each in known.promoted[:2])
    return f"{feature} {shortened(' '.join(text.split()), 26)}".strip()


def shortened(text: str, longest: int) -> str:
    """``text``, cut to ``longest`` characters where it is longer."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
