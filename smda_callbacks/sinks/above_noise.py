"""What of a run so far is above its noise floor, from running sums: what trackers may show plainly.

The rule of the report: more than twice the floor of all windows together, and, of a shift read feature by feature, a
part that comes out alike on two halves of the probes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.pathways import State
from smda_callbacks.maths.uncertainty import above_floor, is_reliable, split_half_reliability
from smda_callbacks.records import PATHWAYS, RunStart, WindowRecord
from smda_callbacks.sinks.metric_values import Progress, category_means, groups_of_probes
from smda_callbacks.sinks.metric_values import Reading as Values
from smda_callbacks.sinks.noise_in_force import MEANS


def features_above(start: RunStart, progress: Progress) -> dict[str, NDArray[np.bool_]] | None:
    """Part of PATHWAYS -> whether its shift since the start is above noise, ``[feature, behaviour]``.

    None where the noise was not measured.
    """
    floors = progress.floors
    if floors is None:
        return None
    reliability = _reliability(start, progress.last)
    return {
        part: above_floor(progress.total[part], floors[part]) & is_reliable(reliability.get(part)) for part in PATHWAYS
    }


def categories_above(start: RunStart, progress: Progress) -> NDArray[np.bool_] | None:
    """Whether a category's mean changed by more than its noise, ``[behaviour, category]``; None if not known."""
    floors, now = progress.floors, category_means(Values(progress.last, start))
    before = category_means(Values(start.baseline, start))
    if floors is None or now is None or before is None:
        return None
    return above_floor(now - before, floors[MEANS].T)


def _reliability(start: RunStart, last: WindowRecord) -> dict[str, float | None]:
    """Of the shift from the start to ``last``; empty where nothing has been read since."""
    if last.snapshot is None or start.baseline.snapshot is None or last is start.baseline:
        return {}
    states = (State(each.pre, each.gate, each.y) for each in (start.baseline.snapshot, last.snapshot))
    policy = start.policy
    return split_half_reliability(*states, scale=policy.scale, lam=policy.lam, groups=groups_of_probes(start))
