"""What of a run so far is above its noise floor, from running sums: what trackers may show plainly.

The rule of the report: more than twice the floor of all windows together, and, of a shift read feature by feature, a
part that comes out alike on two halves of the probes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.pathways import State
from smda_callbacks.maths.uncertainty import above_floor, is_reliable, split_half_reliability
from smda_callbacks.records import PATHWAYS, Array, NoiseFloor, RunStart, WindowRecord
from smda_callbacks.sinks.metric_values import Progress, category_means, groups_of_probes
from smda_callbacks.sinks.metric_values import Reading as Values


def features_above(start: RunStart, progress: Progress) -> dict[str, NDArray[np.bool_]] | None:
    """Part of PATHWAYS -> whether its shift since the start is above noise, ``[feature, behaviour]``.

    None where the noise was not measured.
    """
    noise = known_noise(start)
    if noise is None:
        return None
    reliability = _reliability(start, progress.last)
    return {
        part: above_floor(progress.total[part], run_floor(progress, noise, noise.random[part], noise.rounding[part]))
        & is_reliable(reliability.get(part))
        for part in PATHWAYS
    }


def categories_above(start: RunStart, progress: Progress) -> NDArray[np.bool_] | None:
    """Whether a category's mean changed by more than its noise, ``[behaviour, category]``; None if not known."""
    noise, now = known_noise(start), category_means(Values(progress.last, start))
    before = category_means(Values(start.baseline, start))
    if noise is None or now is None or before is None:
        return None
    return above_floor(now - before, run_floor(progress, noise, noise.behaviour_random, noise.behaviour_rounding).T)


def known_noise(start: RunStart) -> NoiseFloor | None:
    """The noise floor, if it was measured with updates that moved anything."""
    return start.noise if start.noise is not None and start.noise.update_rms > 0 else None


def run_floor(progress: Progress, noise: NoiseFloor, random: Array, rounding: Array) -> Array:
    """Floor of a change since the start: the windows' floors as independent noise, of their sizes."""
    floor: Array = np.sqrt(progress.windows * rounding**2 + progress.squares * (random / noise.update_rms) ** 2)
    return floor


def _reliability(start: RunStart, last: WindowRecord) -> dict[str, float | None]:
    """Of the shift from the start to ``last``; empty where nothing has been read since."""
    if last.snapshot is None or start.baseline.snapshot is None or last is start.baseline:
        return {}
    states = (State(each.pre, each.gate, each.y) for each in (start.baseline.snapshot, last.snapshot))
    policy = start.policy
    return split_half_reliability(*states, scale=policy.scale, lam=policy.lam, groups=groups_of_probes(start))
