"""Figures of the evidence on retraining: LDS, its intervals, and which targets are worth asking about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]

#: A target whose outcomes vary less over subsets than this share of what its group's typical target varies is left out.
LEAST_SPREAD = 0.02

#: Names of target groups, and what is in them.
GROUPS = {
    "refusal": "mean refusal of each category",
    "refusal, both sides": "mean refusal over all harmful and all harmless probes",
    "policy x": "ΔX part (magnitude) of each coefficient's shift",
    "policy y": "ΔY part of each coefficient's shift",
    "coefficient": "shift of each coefficient, gating included",
    "coefficient, gates held": "the same in trainings whose gates are put as they end with all pairs",
}


def spearman(first: Array, second: Array) -> Array:
    """Rank correlation of columns, ``[column]``; 0 where either does not vary: it says nothing."""
    a, b = (rankdata(each, axis=0) for each in (first, second))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    found: Array = np.divide((a * b).sum(axis=0), size, out=np.zeros_like(size), where=size > 0)
    return found


@dataclass(frozen=True)
class Fidelity:
    """``lds``: mean Spearman over targets and orders; ``low``, ``high``: 95 % of a bootstrap of both."""

    lds: float
    low: float
    high: float
    per_order: tuple[float, ...]
    targets: int


def fidelity(
    predicted: Sequence[Array], actual: Sequence[Array], *, draws: int = 1000, seed: int = 0
) -> Fidelity | None:
    """LDS of predictions ``[subset, target]`` per order. None where no target is asked about, or not all are answered.

    Every draw takes subsets (in every order) and targets (the same in all) with replacement. Targets whose outcomes
    hardly vary in an order have been left out before.
    """
    if not predicted or predicted[0].shape[1] == 0 or any(np.isnan(each).any() for each in predicted):
        return None
    per_order = [float(spearman(p, a).mean()) for p, a in zip(predicted, actual, strict=True)]
    rng = np.random.default_rng(seed)
    drawn = np.zeros((draws, len(predicted)))
    for draw in range(draws):
        targets = rng.integers(predicted[0].shape[1], size=predicted[0].shape[1])
        for k, (p, a) in enumerate(zip(predicted, actual, strict=True)):
            subsets = rng.integers(len(p), size=len(p))
            drawn[draw, k] = spearman(p[subsets], a[subsets])[targets].mean()
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return Fidelity(float(np.mean(per_order)), float(low), float(high), tuple(per_order), predicted[0].shape[1])


# Groups of targets ----------------------------------------------------------------------------------------------------


def columns_of(group: str, names: Sequence[str]) -> list[list[int]]:
    """Per target of a group the columns of ``names`` that it is the sum of; empty lists where there are none."""
    at = {name: k for k, name in enumerate(names)}
    features = list(dict.fromkeys(name.rsplit(":", 1)[0] for name in names if name.startswith("feature:")))
    features = [each for each in features if each.count(":") == 1]
    if group.startswith("refusal"):
        sides = ("refusal:harmful", "refusal:harmless")
        return [
            [k]
            for name, k in at.items()
            if name.startswith("refusal:") and not name.endswith(":logit")
            if (name in sides) == (group == "refusal, both sides")
        ]
    if group in ("policy x", "policy y"):
        return [[at[f"{each}:{group[-1]}"]] for each in features]
    held = ":held" if group == "coefficient, gates held" else ""
    return [[at[f"{each}:{part}{held}"] for part in ("x", "y", "gating")] for each in features]


def in_group(values: Array, group: str, names: Sequence[str], *, predicted: bool = False) -> Array:
    """Values ``[row, target of the group]`` of ``values [row, name]``.

    A prediction of a coefficient may lack its gating part, which then counts as 0; predictions know no held gates.
    """
    wanted = group.removesuffix(", gates held") if predicted else group
    found = []
    for columns in columns_of(wanted, names):
        parts = values[:, columns]
        if predicted and len(columns) == 3:
            parts = np.concatenate([parts[:, :2], np.nan_to_num(parts[:, 2:])], axis=1)
        found.append(parts.sum(axis=1))
    return np.array(found).T if found else np.zeros((len(values), 0))


def varying(actual: Sequence[Array]) -> Array:
    """Which targets vary enough in every order: their spread is not below LEAST_SPREAD of the group's median."""
    spread = np.array([each.std(axis=0) for each in actual])  # [order, target]
    if spread.shape[1] == 0:
        return np.zeros(0, dtype=bool)
    kept: Array = (spread > LEAST_SPREAD * np.median(spread, axis=1, keepdims=True)).all(axis=0)
    return kept


def nested(results: Mapping[tuple[str, str, str], Fidelity | None]) -> dict[str, dict[str, dict[str, object]]]:
    """``(method, group, drop)`` -> figures, as nested dictionaries for JSON; those that are None are left out."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    for (method, group, drop), value in results.items():
        if value is not None:
            found.setdefault(method, {}).setdefault(group, {})[drop] = {
                "lds": value.lds,
                "low": value.low,
                "high": value.high,
                "per_order": list(value.per_order),
                "targets": value.targets,
            }
    return found
