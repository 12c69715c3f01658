"""How much of a shift is noise: floors measured from random updates, and reliability between halves of the probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smda_callbacks.maths.account import check_groups
from smda_callbacks.maths.pathways import State, check_states, split_shift

Array = NDArray[np.float64]
Index = NDArray[np.int64]

#: Split-half reliability below which a part of a shift is not read feature by feature. At 1/3 the reliability of all
#: probes is 1/2 (Spearman-Brown): as much signal as noise, and the sign of a normal shift right three times in four.
LEAST_RELIABILITY = 1 / 3

#: A spread below this, relative to the largest behaviour, is rounding and not a shift.
ROUNDING = 1e-12


def rms_floor(draws: Sequence[Mapping[str, ArrayLike]]) -> dict[str, Array]:
    """Root mean square over random draws, per part and element.

    ``draws``: one mapping part -> shift (any shape, the same in every draw) per random update. The root mean square
    about zero, not the standard deviation: a random update has no wanted direction, so all of its shift is noise.
    Raises ValueError without draws, or when draws differ in parts or shapes.
    """
    if not draws:
        raise ValueError("there are no draws; at least one random update is needed. Measure the floor with draws >= 1.")
    parts = list(draws[0])
    for number, draw in enumerate(draws):
        if set(draw) != set(parts):
            raise ValueError(
                f"draw {number} has the parts {sorted(draw)}, draw 0 has {sorted(parts)}; all draws need the same. "
                "Measure every draw in the same way."
            )
    return {part: _root_mean_square([draw[part] for draw in draws], part) for part in parts}


def step_floor(random: ArrayLike, rounding: ArrayLike, relative_size: float) -> Array:
    """Noise floor of one step: ``sqrt(rounding² + (relative_size · random)²)``, element by element.

    ``random``: floor of an update of reference size. ``rounding``: floor of a vanishing update, what rounding alone
    does. ``relative_size``: root mean square update of this step over that of the reference. The two sources are
    independent, so they add in quadrature. Raises ValueError for shapes that differ or a negative or NaN size.
    """
    first, second = _same_shape(random, rounding, "random", "rounding")
    if not (np.isfinite(relative_size) and relative_size >= 0):
        raise ValueError(
            f"relative_size is {relative_size!r}; a finite number of at least 0 is needed. "
            "Divide the step's root mean square update by that of the random draws."
        )
    floor: Array = np.hypot(second, relative_size * first)
    return floor


def total_floor(floors: Sequence[ArrayLike]) -> Array:
    """Noise floor of a sum of shifts with independent noise: root of the sum of squares, element by element.

    Raises ValueError without floors, or when their shapes differ.
    """
    if not floors:
        raise ValueError("there are no floors; at least one is needed. Pass the floor of every step in the sum.")
    total: Array = _root_mean_square(floors, "floor") * np.sqrt(len(floors))
    return total


def above_floor(shift: ArrayLike, floor: ArrayLike, times: float = 2.0) -> NDArray[np.bool_]:
    """Where ``|shift| > times · floor``; same shape as ``shift``. A shift of zero is never above.

    Raises ValueError for shapes that differ, a negative floor, or ``times`` that is not positive.
    """
    values, limit = _same_shape(shift, floor, "shift", "floor")
    if limit.size and limit.min() < 0:
        raise ValueError(f"floor holds {limit.min():g}; a floor is at least 0. Pass the output of step_floor.")
    if not times > 0:
        raise ValueError(f"times is {times!r}; a number above 0 is needed. The default is 2.")
    above: NDArray[np.bool_] = np.abs(values) > times * limit
    return above


def times_for(tests: int, times: float = 2.0) -> float:
    """Limit, in floors, that the largest of ``tests`` noises exceeds no more often than a single one exceeds ``times``.

    Bonferroni: the two-sided tail beyond ``times``, divided by ``tests``. Raises ValueError for no tests, or ``times``
    that is not positive.
    """
    if not times > 0:
        raise ValueError(f"times is {times!r}; a number above 0 is needed. The default is 2.")
    if tests < 1:
        raise ValueError(f"tests is {tests!r}; at least one is needed. Pass of how many the largest is picked.")
    normal = NormalDist()
    return times if tests == 1 else -normal.inv_cdf(normal.cdf(-times) / tests)


def halves(groups: ArrayLike, seed: int) -> tuple[Index, Index]:
    """Two disjoint halves of the probes, drawn at random within each category; sorted index arrays.

    A category of odd size gives its extra probe to the smaller half so far, so the halves differ by at most one probe
    overall and in each category. The same seed gives the same halves. Raises as
    :func:`~smda_callbacks.maths.account.check_groups`, and ValueError for fewer than four probes.
    """
    numbers = check_groups(groups, np.size(groups))
    if len(numbers) < 4:
        raise ValueError(f"{len(numbers)} probes cannot be halved; at least 4 are needed. Add probes.")
    rng = np.random.default_rng(seed)
    sides: tuple[list[int], list[int]] = ([], [])
    for number in range(int(numbers.max()) + 1):
        members = rng.permutation(np.flatnonzero(numbers == number)).tolist()
        small, large = sorted(sides, key=len)
        cut = (len(members) + 1) // 2
        small.extend(members[:cut])
        large.extend(members[cut:])
    return np.array(sorted(sides[0]), dtype=np.int64), np.array(sorted(sides[1]), dtype=np.int64)


def split_half_reliability(
    before: State, after: State, *, scale: Array, lam: float, groups: ArrayLike, seed: int = 0
) -> dict[str, float | None]:
    """Correlation over features of each part of the shift between two halves of the probes.

    Each half is split on its own with ``lam / 2``: the penalty stands against a sum of squares over half the probes.
    Pearson correlation per behaviour, averaged over the behaviours for which both halves vary over features (beyond
    rounding); None where there is none. It is the reliability of *half* the probes; that of all is higher
    (Spearman-Brown, 2r / (1 + r)). Arguments and errors as in :func:`~smda_callbacks.maths.account.account`.
    """
    check_states(before, after)
    numbers = check_groups(groups, len(before.y))
    parts = [
        split_shift(_take(before, index), _take(after, index), scale=scale, lam=lam / 2).as_dict()
        for index in halves(numbers, seed)
    ]
    tiny = ROUNDING * np.maximum(np.abs(before.y), np.abs(after.y)).max(axis=0)  # [behaviour]
    return {part: _mean_correlation(values, parts[1][part], tiny) for part, values in parts[0].items()}


def is_reliable(reliability: float | None) -> bool:
    """Whether a split-half reliability is LEAST_RELIABILITY or more; what is not known is not held against a shift."""
    return reliability is None or reliability >= LEAST_RELIABILITY


def _mean_correlation(first: Array, second: Array, tiny: Array) -> float | None:
    """Mean over behaviours of the Pearson correlation over features; None if no behaviour varies in both halves."""
    found = []
    for m in range(first.shape[1]):
        a, b = first[:, m] - first[:, m].mean(), second[:, m] - second[:, m].mean()
        if min(np.abs(a).max(), np.abs(b).max()) > tiny[m]:
            found.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    return float(np.mean(found)) if found else None


def _take(state: State, index: Index) -> State:
    return State(state.pre[index], state.gate[index], state.y[index])


def _root_mean_square(values: Sequence[ArrayLike], name: str) -> Array:
    arrays = [np.asarray(value, dtype=np.float64) for value in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(
            f"{name} has the shapes {sorted(shapes)}; all must be the same. Use one support and one probe set."
        )
    root: Array = np.sqrt(np.mean(np.square(arrays), axis=0))
    return root


def _same_shape(first: ArrayLike, second: ArrayLike, name: str, other: str) -> tuple[Array, Array]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"{name} has shape {a.shape} but {other} has {b.shape}; they must be the same. Take both for the same part."
        )
    return a, b
