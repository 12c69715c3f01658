"""From two snapshots to the record of a window. Arrays in, record out: the same for a live run and a recomputation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from smda_callbacks.maths.account import account
from smda_callbacks.maths.gaps import gap_table
from smda_callbacks.maths.pathways import State, first_order_error, first_order_shift, split_shift
from smda_callbacks.maths.ridge import diagnose, fit_ridge
from smda_callbacks.maths.uncertainty import split_half_reliability
from smda_callbacks.records import Array, PolicyRecord, Probe, Snapshot


@dataclass(frozen=True)
class Booked:
    """What one window moved; the fields are those of :class:`smda_callbacks.records.WindowRecord`."""

    coef: Array
    intercept: Array
    r2: tuple[float, ...]
    r2_loo: tuple[float, ...]
    shift: Mapping[str, Array]
    account: Mapping[str, Array]
    feature_account: Mapping[str, Array]
    first_order_error: float | None
    reliability: Mapping[str, float | None]

    def fields(self) -> dict[str, Any]:
        """As keyword arguments of a WindowRecord."""
        return dict(vars(self))


def refit(snapshot: Snapshot, policy: PolicyRecord) -> dict[str, Any]:
    """The policy refitted on a snapshot at the fixed support, scale and λ: coefficients and both R²."""
    fit = fit_ridge(snapshot.x, snapshot.y, policy.lam, scale=policy.scale)
    quality = diagnose(snapshot.x, snapshot.y, fit, scale=policy.scale)
    return {
        "coef": fit.coef,
        "intercept": fit.intercept,
        "r2": tuple(quality.r2.tolist()),
        "r2_loo": tuple(quality.r2_loo.tolist()),
    }


def book_window(
    before: Snapshot, after: Snapshot, policy: PolicyRecord, groups: np.ndarray, *, seed: int = 0
) -> Booked:
    """Split the shift between two snapshots over pathways, categories and features (SMDA, arXiv 2606.29171).

    Args:
        before, after: snapshots of the policy's features.
        groups: category number of each probe, ``[probe]``.
        seed: of the halves that the reliability is computed from.
    """
    start, end = (State(each.pre, each.gate, each.y) for each in (before, after))
    scale, lam = policy.scale, policy.lam
    shift = split_shift(start, end, scale=scale, lam=lam)
    first = first_order_shift(start, end, scale=scale, lam=lam)
    books = account(start, end, scale=scale, lam=lam, groups=groups, origin=policy.origin)
    return Booked(
        **refit(after, policy),
        shift=shift.as_dict(),
        account=books.rows,
        feature_account=books.features,
        first_order_error=first_order_error(shift, first),
        reliability=split_half_reliability(start, end, scale=scale, lam=lam, groups=groups, seed=seed),
    )


def gaps_of(
    snapshot: Snapshot, policy: PolicyRecord, probes: tuple[Probe, ...], fit: Mapping[str, Any]
) -> tuple[dict[str, Any], ...]:
    """The gap table at a snapshot, as JSON rows, worst category first; refusal is the first behaviour."""
    categories = list(dict.fromkeys(probe.category for probe in probes))
    expected = {probe.category: probe.expected for probe in probes}
    rows = gap_table(
        snapshot.y,
        snapshot.x,
        scale=policy.scale,
        coef=fit["coef"],
        intercept=fit["intercept"],
        groups=np.array([categories.index(probe.category) for probe in probes]),
        categories=categories,
        expected=[expected[name] for name in categories],
        features=policy.features,
        target=policy.target,
    )
    return tuple(dict(vars(row)) for row in rows)
