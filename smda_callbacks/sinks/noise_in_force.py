"""Which noise floor holds at a window, and how large it is there: one answer for all that judge by it.

The floor of the start holds until a window brings one that was measured anew at its end; that one holds for the window
itself and for all later ones, until the next.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from smda_callbacks.maths.uncertainty import step_floor, total_floor
from smda_callbacks.records import PATHWAYS, Array, NoiseFloor, WindowRecord

#: What :func:`floors_at` calls the floors of the categories' means, beside the parts of PATHWAYS.
MEANS = "means"


def known(noise: NoiseFloor | None) -> NoiseFloor | None:
    """``noise``, if it was measured with updates that moved anything."""
    return noise if noise is not None and noise.update_rms > 0 else None


def in_force(noise: NoiseFloor | None, window: WindowRecord) -> NoiseFloor | None:
    """The floor that holds at ``window``, where ``noise`` held before it; None where it was not measured."""
    return known(window.noise) or known(noise)


def all_in_force(noise: NoiseFloor | None, windows: Iterable[WindowRecord]) -> list[NoiseFloor | None]:
    """The same for every one of ``windows``, in order; ``noise`` is the floor of the start."""
    held = []
    for window in windows:
        noise = in_force(noise, window)
        held.append(noise)
    return held


def floors_at(noise: NoiseFloor | None, update_rms: float) -> dict[str, Array] | None:
    """Floor of what an update of this size (root mean square change per trained weight) does.

    Part of PATHWAYS -> of the shift, ``[feature, behaviour]``; MEANS -> of the categories' means,
    ``[category, behaviour]``. None where the noise was not measured.
    """
    noise = known(noise)
    if noise is None:
        return None
    size = update_rms / noise.update_rms
    found = {part: step_floor(noise.random[part], noise.rounding[part], size) for part in PATHWAYS}
    return {**found, MEANS: step_floor(noise.behaviour_random, noise.behaviour_rounding, size)}


def accumulated_floors(noise: NoiseFloor | None, windows: Iterable[WindowRecord]) -> dict[str, Array] | None:
    """Floors of the changes since the start, by the names of :func:`floors_at`, ``[1 + window, ...]``; first zero.

    The windows' floors as independent noise, each the one in force at its window; ``noise`` is that of the start. None
    where it was not measured.
    """
    start, records = floors_at(noise, 0.0), list(windows)
    if start is None:
        return None
    found = {name: [np.zeros_like(each)] for name, each in start.items()}
    for window, held in zip(records, all_in_force(noise, records), strict=True):
        for name, floor in (floors_at(held, window.update_rms) or {}).items():
            found[name].append(total_floor([found[name][-1], floor]))
    return {name: np.array(sums) for name, sums in found.items()}
