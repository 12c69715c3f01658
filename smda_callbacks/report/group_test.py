"""Whether groups of training pairs differ in what they did: a permutation test for each of many numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smda_callbacks.records import Array, Pair

#: Values that a column may have to make groups of, and columns that are preferred.
FEWEST, MOST, PREFERRED = 2, 6, ("kind", "category")

#: Random relabellings, and pairs beyond which a random sample is tested: the work is their product.
RESAMPLES, MOST_PAIRS = 9999, 1000

_BATCH = 4_000_000  # numbers that are relabelled at once


@dataclass(frozen=True)
class Groups:
    """Groups of pairs by a column of the data set; ``names`` in the order of first appearance."""

    column: str
    names: tuple[str, ...]
    members: tuple[NDArray[np.int64], ...]  # rows of the pair table, per group
    left_out: int  # pairs without a value, or with one that a single pair has


@dataclass(frozen=True)
class GroupTest:
    """Outcome for every number that was tested.

    ``statistic``: spread between the groups' means, Σ n (mean of the group − mean of all)².
    ``p``: share of relabellings of the pairs that spread them as far. ``p_holm``: corrected for the number of tests.
    """

    statistic: Array  # [test]
    p: Array  # [test]
    p_holm: Array  # [test]
    pairs: int  # that were tested


def groups_of(pairs: Sequence[Pair], rows: Sequence[int]) -> Groups | None:
    """Groups of the pairs in ``rows`` by the column ``kind``, else ``category``, else the first that makes groups.

    A column makes groups where it has 2 to 6 values, and two or more of them have two or more pairs. None if none does.
    """
    columns = dict.fromkeys([*PREFERRED, *(name for row in rows for name in pairs[row].columns)])
    for column in columns:
        found: dict[str, list[int]] = {}
        for row in rows:
            value = pairs[row].columns.get(column)
            if value is not None:
                found.setdefault(value, []).append(row)
        enough = {name: members for name, members in found.items() if len(members) > 1}
        if FEWEST <= len(found) <= MOST and len(enough) >= FEWEST:
            members = tuple(np.array(each, dtype=np.int64) for each in enough.values())
            return Groups(column, tuple(enough), members, len(rows) - sum(map(len, members)))
    return None


def compare_groups(
    values: ArrayLike, members: Sequence[NDArray[np.int64]], *, resamples: int = RESAMPLES, seed: int = 0
) -> GroupTest:
    """Test for each column of ``values`` ``[pair, test]`` whether its mean differs between groups of pairs.

    ``members``: rows of each group. With ``scipy.stats.permutation_test`` (independent samples, exact where there are
    few relabellings); all tests share their relabellings. More than MOST_PAIRS pairs: a random sample of them, each
    group in proportion. Raises ValueError for fewer than two groups, a group of one pair, or values not finite.
    """
    from scipy.stats import permutation_test  # a second to load, and few reports need it

    table = np.asarray(values, dtype=np.float64)
    if len(members) < FEWEST or min(map(len, members)) < 2 or not np.isfinite(table).all():
        raise ValueError(
            f"got {len(members)} groups of {', '.join(str(len(each)) for each in members)} pairs; at least two groups "
            "of two pairs and finite values are needed. Next step: leave the others out."
        )
    rng = np.random.default_rng(seed)
    samples = [table[each].T for each in _sampled(members, rng)]
    pairs = sum(sample.shape[1] for sample in samples)
    if not table.shape[1]:
        none = np.zeros(0)
        return GroupTest(none, none, none, pairs)
    found = permutation_test(
        samples,
        _spread,
        permutation_type="independent",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BATCH // (pairs * table.shape[1])),
        alternative="greater",
        axis=-1,
        random_state=rng,
    )
    p = np.asarray(found.pvalue, dtype=np.float64)
    return GroupTest(np.asarray(found.statistic, dtype=np.float64), p, holm(p), pairs)


def holm(p: ArrayLike) -> Array:
    """Holm's correction for many tests: the k-th smallest of n times n − k + 1, never falling, at most 1."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)) if len(values) else values
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def _sampled(members: Sequence[NDArray[np.int64]], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    total = sum(map(len, members))
    if total <= MOST_PAIRS:
        return list(members)
    sizes = [max(2, round(len(each) * MOST_PAIRS / total)) for each in members]
    return [rng.choice(each, size=size, replace=False) for each, size in zip(members, sizes, strict=True)]


def _spread(*samples: Array, axis: int) -> Any:
    """Spread between means; of relabelled samples the mean of all is always the same."""
    counts = [sample.shape[axis] for sample in samples]
    sums = [sample.sum(axis=axis) for sample in samples]
    mean = sum(sums) / sum(counts)
    return sum(count * np.square(each / count - mean) for count, each in zip(counts, sums, strict=True))
