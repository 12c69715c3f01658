"""What recipes/evidence_pathways.py computes, on arrays alone: figures of one policy over many training steps.

* reliability: Pearson correlation over features of ΔX between two halves of the probes, each half with λ / 2, mean
  over steps. It is the reliability of *half* the probes; :func:`spearman_brown` gives that of all.
* r: Pearson correlation, over steps × categories, of the row ΔX·β (what the moved features say under the mean
  coefficients) with the measured change of the behaviour.
* told apart: share of steps whose ΔX from one half of the probes is more like their own ΔX from the other half than
  like that of any other step. Chance is 1 / steps. Reliability alone rewards a policy of very few features, whose
  shifts all look alike; this does not.

The first behaviour is the one judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.account import account
from smda_callbacks.maths.pathways import State, split_shift
from smda_callbacks.maths.quality import cv_r2
from smda_callbacks.maths.ridge import diagnose, fit_ridge, lambda_grid, loo_path, predict
from smda_callbacks.maths.support import choose_support, feature_scale, strongest_keeping
from smda_callbacks.maths.uncertainty import halves

Array = NDArray[np.float64]
Index = NDArray[np.int64]
SELECTIONS = ("correlation", "variance")
RULES = ("error", "r2")


@dataclass(frozen=True)
class Choice:
    """How a policy is chosen.

    ``lam`` None: by leave-one-out, the strongest λ whose error is at most ``1 + tolerance`` times the lowest (``rule``
    "error"), or whose R² is at least ``1 - tolerance`` times the highest ("r2").
    """

    support: int = 64
    min_active: int = 8
    lam: float | None = None
    tolerance: float = 0.05
    rule: str = "error"
    selection: str = "correlation"

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS or self.rule not in RULES:
            raise ValueError(
                f"selection {self.selection!r} or rule {self.rule!r} is unknown. Allowed selections: "
                f"{', '.join(SELECTIONS)}; rules: {', '.join(RULES)}."
            )


@dataclass(frozen=True, eq=False)
class Policy:
    """Features (columns of x), their scale, and λ."""

    features: Index
    scale: Array
    lam: float


@dataclass(frozen=True)
class Figures:
    """One policy over many steps. ``r_low``, ``r_high``: 95% interval of ``r``, steps drawn with replacement."""

    reliability_plain: float
    reliability: float
    r_plain: float
    r: float
    r_low: float
    r_high: float
    told_apart: float


# Policies -------------------------------------------------------------------------------------------------------------


def choose(x: Array, y: Array, choice: Choice) -> Policy:
    """The policy that ``choice`` makes from ``x [probe, feature]`` and ``y [probe, behaviour]``."""
    select = choose_support if choice.selection == "correlation" else _most_varying
    features = select(x, y, size=choice.support, min_active=choice.min_active)
    scale = feature_scale(x[:, features])
    if choice.lam is not None:
        return Policy(features, scale, choice.lam)
    path = loo_path(x[:, features], y, lambda_grid(), scale=scale)
    error = (path.mse / y.var(axis=0)).mean(axis=1)
    pick = strongest_within if choice.rule == "error" else strongest_keeping
    return Policy(features, scale, pick(path.lams, error, choice.tolerance))


def strongest_within(lams: Array, error: Array, tolerance: float) -> float:
    """The rule that was tried and left: the largest λ whose error is within ``tolerance`` (relative) of the lowest."""
    return float(np.max(lams[error <= error.min() * (1 + tolerance)]))


def fit_quality(x: Array, y: Array, choice: Choice, groups: Index) -> tuple[float, float]:
    """(leave-one-out R² at the support and λ chosen, ten-fold R² with every choice made again in each fold)."""
    policy = choose(x, y, choice)
    columns = x[:, policy.features]
    fit = fit_ridge(columns, y, policy.lam, scale=policy.scale)
    loo = float(diagnose(columns, y, fit, scale=policy.scale).r2_loo[0])

    def fit_fold(train: Index) -> Callable[[Index], Array]:
        inner = choose(x[train], y[train], choice)
        inside = fit_ridge(x[train][:, inner.features], y[train], inner.lam, scale=inner.scale)
        return lambda rows: predict(x[rows][:, inner.features], inside, scale=inner.scale)

    return loo, float(cv_r2(y, fit_fold, groups=groups, folds=min(10, len(y)))[0])


def _most_varying(x: Array, y: Array, *, size: int, min_active: int) -> Index:
    """The ``size`` features of largest variance among those active often enough: a choice that does not look at y."""
    candidates = np.flatnonzero((x > 0).sum(axis=0) >= min_active)
    order = np.argsort(-x[:, candidates].var(axis=0), kind="stable")
    return np.sort(candidates[order[:size]]).astype(np.int64)


# Figures --------------------------------------------------------------------------------------------------------------


def figures(
    before: State, afters: Iterable[State], policy: Policy, groups: Index, *, seeds: Sequence[int] = (0,)
) -> Figures:
    """:class:`Figures` of ``policy`` over the steps ``before`` -> each of ``afters`` (states of the whole dictionary).

    ``groups [probe]``: category numbers. ``seeds``: of the halves; the mean over them is taken.
    """
    start = _part(before, slice(None), policy.features)
    ends = [_part(after, slice(None), policy.features) for after in afters]
    plain, magnitude, measured = np.array([_rows(start, end, policy, groups) for end in ends]).transpose(1, 0, 2)
    likeness = [_likeness(start, ends, policy, halves(groups, seed)) for seed in seeds]  # [seed][part][step, step]
    low, high = interval(magnitude, measured)
    return Figures(
        reliability_plain=float(np.mean([np.diag(parts[0]) for parts in likeness])),
        reliability=float(np.mean([np.diag(parts[1]) for parts in likeness])),
        r_plain=correlation(plain, measured),
        r=correlation(magnitude, measured),
        r_low=low,
        r_high=high,
        told_apart=float(np.mean([told_apart(parts[1]) for parts in likeness])),
    )


def interval(row: Array, measured: Array, *, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the correlation of two ``[step, category]`` arrays; whole steps are drawn."""
    draw = np.random.default_rng(seed).integers(len(row), size=(draws, len(row)))
    low, high = np.quantile([correlation(row[k], measured[k]) for k in draw], (0.025, 0.975))
    return float(low), float(high)


def told_apart(likeness: Array) -> float:
    """Share of rows and of columns of ``likeness [step, step]`` whose largest entry is on the diagonal."""
    own = np.arange(len(likeness))
    return float(np.mean([likeness.argmax(axis=axis) == own for axis in (0, 1)]))


def spearman_brown(half: float) -> float:
    """Reliability of all probes from that of half of them, 2r / (1 + r) (Spearman 1910; Brown 1910)."""
    return 2 * half / (1 + half)


def correlation(a: Array, b: Array) -> float:
    """Pearson correlation over all entries; 0 where one of the two does not vary: nothing moved, nothing is told."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norm if norm > 0 else 0.0


def recommend(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], *, reliability: float = 0.7, r: float = 0.8
) -> dict[str, Any] | None:
    """The setting (values of ``keys``) that meets both targets in all of its rows (SAE × step size), or None.

    Of several, the one with the highest mean told_apart; of those within 0.02 of it, the highest mean ten-fold R²; of
    equals the first.
    """
    settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        settings.setdefault(tuple(row[key] for key in keys), []).append(row)
    meeting = {
        setting: [float(np.mean([each[name] for each in group])) for name in ("told_apart", "r2_cv")]
        for setting, group in settings.items()
        if all(each["reliability"] >= reliability and each["r"] >= r for each in group)
    }
    if not meeting:
        return None
    most = max(apart for apart, _ in meeting.values())
    best = max((s for s in meeting if meeting[s][0] >= most - 0.02), key=lambda s: meeting[s][1])
    return dict(zip(keys, best, strict=True))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The plain ΔX against its magnitude part, in Markdown."""
    lines = [
        "| SAE | step size | λ | plain: delta-FVU, reliability, r | magnitude: delta-FVU, reliability (all probes), r "
        "[95%], told apart | R² loo, ten-fold |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = f"{row['delta_fvu_plain']:.2g}, {row['reliability_plain']:.2f}, {row['r_plain']:.2f}"
        whole = spearman_brown(row["reliability"])
        magnitude = f"{row['delta_fvu']:.2f}, {row['reliability']:.2f} ({whole:.2f}), {row['r']:.3f} "
        magnitude += f"[{row['r_low']:.2f}, {row['r_high']:.2f}], {row['told_apart']:.2f}"
        r2 = f"{row['r2_loo']:.2f}, {row['r2_cv']:.2f}"
        lines.append(
            f"| {row['sae']} | {row['step_size']:g} | {row['chosen_lam']:.0f} | {plain} | {magnitude} | {r2} |"
        )
    return "\n".join(lines)


def _rows(start: State, end: State, policy: Policy, groups: Index) -> list[Array]:
    """Plain ΔX·β, its magnitude part, and the measured change, each ``[category]``."""
    books = account(start, end, scale=policy.scale, lam=policy.lam, groups=groups)
    magnitude = books.rows["magnitude"][:, 0]
    return [magnitude + books.rows["gating"][:, 0], magnitude, books.measured[:, 0]]


def _likeness(start: State, ends: Sequence[State], policy: Policy, sides: tuple[Index, Index]) -> tuple[Array, Array]:
    """Correlations ``[step, step]`` of every step's ΔX on the first half with every step's on the second.

    Returns that of the plain ΔX and that of the magnitude part.
    """
    every = slice(None)
    shifts = np.array(
        [
            [
                split_shift(_part(start, side, every), _part(end, side, every), scale=policy.scale, lam=policy.lam / 2)
                for side in sides
            ]
            for end in ends
        ],
        dtype=object,
    )
    parts = []
    for name in ("shift_x", "shift_x_magnitude"):
        a, b = (np.array([getattr(split, name)[:, 0] for split in shifts[:, side]]) for side in (0, 1))
        parts.append(np.array([[correlation(one, other) for other in b] for one in a]))
    return parts[0], parts[1]


def _part(state: State, probes: Index | slice, features: Index | slice) -> State:
    return State(state.pre[probes][:, features], state.gate[probes][:, features], state.y[probes])
