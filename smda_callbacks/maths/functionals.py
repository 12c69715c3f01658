"""The numbers that a model's change is attributed to pairs by: group means of behaviours, and shifts of coefficients.

A functional is known in two ways. :func:`measured` takes its exact change between two states. :func:`slopes` takes its
derivative at one state, in behaviours and pre-activations, gates held. The mean of the slopes at both ends, times the
change, is the change to third order in its size where no gate flips (trapezoid rule).

Names, in this order: for every behaviour ``<behaviour>:harmful`` and ``<behaviour>:harmless`` (mean over all probes
that ought to be refused, or complied with), ``<behaviour>:<category>`` for every category, and the same again in the
other unit with the suffix ``:logit`` or ``:probability``; then ``feature:<SAE index>:x`` (shift_x_magnitude of its
coefficient), ``:y`` (shift_y) and ``:gating``, with ``:<behaviour>`` appended for behaviours after the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smda_callbacks.maths.account import check_groups
from smda_callbacks.maths.pathways import State, centred, check_states, solve_gram, split_shift
from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.maths.units import Target, conversion_slope, convert, other_unit

Array = NDArray[np.float64]
Pathway = Literal["x", "y", "gating"]

#: The two groups of probes; a category of such a name is told apart by the word category in front.
_GROUPS = ("harmful", "harmless")

#: Pathway of a functional -> field of PathwaySplit.
_FIELDS = {"x": "shift_x_magnitude", "y": "shift_y", "gating": "shift_x_gating"}


@dataclass(frozen=True)
class GroupMean:
    """Mean behaviour of a group of probes."""

    name: str
    behaviour: int
    group: str  # "harmful", "harmless" or the category
    is_category: bool
    converted: bool  # in the other unit than the policy's target
    probes: NDArray[np.int64] = field(compare=False, repr=False)  # numbers of the group's probes


@dataclass(frozen=True)
class FeatureShift:
    """A pathway's part of the shift of one coefficient."""

    name: str
    behaviour: int
    feature: int  # SAE index
    position: int  # in the policy's features
    pathway: Pathway


@dataclass(frozen=True, eq=False)
class FunctionalSet:
    """Functionals on the axis ``functional``: ``means`` first, then ``shifts``; see the module for the names."""

    means: tuple[GroupMean, ...]
    shifts: tuple[FeatureShift, ...]
    behaviours: tuple[str, ...]
    target: Target
    shape: tuple[int, int, int]  # probes, features and behaviours of the states that they are read from
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = [each.name for each in self.means] + [each.name for each in self.shifts]
        object.__setattr__(self, "names", tuple(names))
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f"two functionals would be called {twice[0]!r}; every name must say which is meant. "
                "Rename the category or behaviour, or name every feature once."
            )

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Position of ``name`` on the axis ``functional``. Raises ValueError, naming the nearest, if there is none."""
        if name not in self.names:
            near = get_close_matches(name, self.names, n=3, cutoff=0.0)
            raise ValueError(
                f"there is no functional {name!r} among the {len(self)}. Nearest: {', '.join(near) or 'none'}. "
                "Attribute it by the configuration, or ask for one that is there."
            )
        return self.names.index(name)


@dataclass(frozen=True, eq=False)
class Slopes:
    """Derivatives of functionals at one state: ``df_k = Σ y[k]·dy + Σ pre[k]·dpre`` with the gates held.

    ``y`` in the functional's unit per unit of behaviour, ``pre`` per SAE unit of pre-activation.
    """

    y: Array  # [functional, probe, behaviour]
    pre: Array  # [functional, probe, feature]


def functional_set(
    *,
    behaviours: Sequence[str],
    categories: Sequence[str],
    refuse: Sequence[bool],
    groups: ArrayLike,
    features: ArrayLike,
    attributed: Sequence[int] | None = None,
    target: Target = "probability",
    gating: bool = False,
) -> FunctionalSet:
    """All functionals of a policy on a probe set.

    ``refuse`` ``[category]``: whether its probes ought to be refused; a side without a probe has no functional.
    ``groups`` ``[probe]``: category numbers. ``features`` ``[feature]``: SAE indices of the policy. ``attributed``:
    positions in ``features`` of those that get functionals, in that order; None for all. ``target``: the unit of y.
    ``gating``: whether gating functionals are wanted; their slopes are zero, only :func:`measured` sees them.

    Raises ValueError for lengths that differ, an unknown target, positions out of range and names that coincide, and
    as :func:`~smda_callbacks.maths.account.check_groups`.
    """
    numbers = check_groups(groups, np.size(groups), len(categories))
    indices = np.asarray(features, dtype=np.int64)
    places = list(range(len(indices))) if attributed is None else [int(place) for place in attributed]
    _check_set(behaviours, categories, refuse, target, places, len(indices))
    means = tuple(
        GroupMean(f"{behaviour}:{label}{suffix}", m, group, is_category, bool(suffix), np.flatnonzero(members))
        for m, behaviour in enumerate(behaviours)
        for suffix in ("", f":{other_unit(target)}")
        for label, group, is_category, members in _members(categories, np.asarray(refuse, dtype=bool), numbers)
    )
    pathways: tuple[Pathway, ...] = ("x", "y", "gating") if gating else ("x", "y")
    shifts = tuple(
        FeatureShift(f"feature:{indices[j]}:{pathway}{f':{name}' if m else ''}", m, int(indices[j]), j, pathway)
        for j, (m, name), pathway in product(places, enumerate(behaviours), pathways)
    )
    return FunctionalSet(means, shifts, tuple(behaviours), target, (len(numbers), len(indices), len(behaviours)))


def measured(functionals: FunctionalSet, before: State, after: State, *, scale: Array, lam: float) -> Array:
    """The exact change of every functional between two states, ``[functional]`` float64, in the functional's unit.

    ``scale`` ``[feature]`` and ``lam`` are those of :func:`~smda_callbacks.maths.pathways.split_shift`, which gives the
    coefficient shifts. Raises ValueError for states that are not of the set's probes, features and behaviours, or as
    ``split_shift``.
    """
    check_states(before, after)
    _check_state(functionals, before)
    target = functionals.target
    change = (after.y - before.y, convert(after.y, target) - convert(before.y, target))  # by GroupMean.converted
    values = [change[each.converted][each.probes, each.behaviour].mean() for each in functionals.means]
    if functionals.shifts:
        parts = split_shift(before, after, scale=scale, lam=lam).as_dict()
        values += [parts[_FIELDS[each.pathway]][each.position, each.behaviour] for each in functionals.shifts]
    return np.array(values, dtype=np.float64)


def slopes(functionals: FunctionalSet, state: State, *, scale: Array, lam: float) -> Slopes:
    """The derivative of every functional at one state, gates held; gating functionals have none and get zeros.

    With ``G = ZᵀHZ + λI`` and ``r = H(y − Zβ)``, the differential of the normal equations
    (:func:`~smda_callbacks.maths.pathways.first_order_shift`) read backwards::

        ∂ shift_x[j] / ∂ pre[i, k] = gate[i, k] / scale[k] · (G⁻¹[j, k] r[i] − (HZG⁻¹)[i, j] β[k])
        ∂ shift_y[j] / ∂ y[i]      = (HZG⁻¹)[i, j]

    ``scale`` ``[feature]``, ``lam`` and errors as in :func:`measured`.
    """
    _check_state(functionals, state)
    n, d, m = functionals.shape
    result = Slopes(np.zeros((len(functionals), n, m)), np.zeros((len(functionals), n, d)))
    rate = conversion_slope(state.y, functionals.target)
    for row, mean in enumerate(functionals.means):
        inside = rate[mean.probes, mean.behaviour] if mean.converted else 1.0
        result.y[row, mean.probes, mean.behaviour] = inside / len(mean.probes)
    if functionals.shifts:
        _fill_shifts(functionals, state, np.asarray(scale, dtype=np.float64), lam, result)
    return result


def _fill_shifts(functionals: FunctionalSet, state: State, scale: Array, lam: float, result: Slopes) -> None:
    coef = fit_ridge(state.x, state.y, lam, scale=scale).coef
    z = centred(state.x / scale)
    residual = centred(state.y) - z @ coef
    columns = {position: column for column, position in enumerate(sorted({e.position for e in functionals.shifts}))}
    inverse = solve_gram(z, lam, np.eye(len(scale))[:, list(columns)])  # [feature, attributed]: columns of G⁻¹
    weights = z @ inverse  # [probe, attributed]
    gain = state.gate / scale
    for row, each in enumerate(functionals.shifts, start=len(functionals.means)):
        column, m = columns[each.position], each.behaviour
        if each.pathway == "y":
            result.y[row, :, m] = weights[:, column]
        elif each.pathway == "x":
            moved = np.outer(residual[:, m], inverse[:, column]) - np.outer(weights[:, column], coef[:, m])
            result.pre[row] = gain * moved


def _members(
    categories: Sequence[str], refuse: NDArray[np.bool_], groups: NDArray[np.int64]
) -> list[tuple[str, str, bool, NDArray[np.bool_]]]:
    """Label in the name, group, whether it is a category, and members ``[probe]`` of every group that has any."""
    harmful = refuse[groups]
    both = [(name, name, False, members) for name, members in zip(_GROUPS, (harmful, ~harmful), strict=True)]
    single = [
        (f"category {name}" if name in _GROUPS else name, name, True, groups == number)
        for number, name in enumerate(categories)
    ]
    return [each for each in both + single if each[3].any()]


def _check_state(functionals: FunctionalSet, state: State) -> None:
    shape = (*state.pre.shape, state.y.shape[1])
    if shape != functionals.shape:
        raise ValueError(
            f"the state has (probes, features, behaviours) = {shape}, the functionals are of {functionals.shape}. "
            "Take the state with the probes and the policy that the functionals were made for."
        )


def _check_set(
    behaviours: Sequence[str],
    categories: Sequence[str],
    refuse: Sequence[bool],
    target: str,
    places: list[int],
    features: int,
) -> None:
    if not behaviours:
        raise ValueError("there are no behaviours; at least one is needed. Name the behaviours of the policy.")
    if len(refuse) != len(categories):
        raise ValueError(
            f"refuse has {len(refuse)} entries for {len(categories)} categories; one for each is needed. "
            "Say for every category whether it ought to be refused."
        )
    if target not in ("probability", "logit"):
        raise ValueError(f"target is {target!r}; allowed are 'probability' and 'logit'. Pass the policy's target.")
    outside = [place for place in places if not 0 <= place < features]
    if outside:
        raise ValueError(
            f"attributed holds the position {outside[0]}; allowed are 0 to {features - 1}, positions in the policy's "
            "features. Pass positions, not SAE indices."
        )
