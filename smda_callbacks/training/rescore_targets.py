"""What influence on the end of a run is asked for: names of targets, and their gradients at the final weights.

Names are those of :mod:`smda_callbacks.maths.functionals`, of the change from the start of the run to its end, and
``feature:<SAE index>`` for a whole coefficient. Gates are held at what they are at both ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smda_callbacks.maths.end_slopes import end_slopes
from smda_callbacks.maths.functionals import FunctionalSet, Slopes, measured
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.records import Array, PolicyRecord
from smda_callbacks.training.attribution_start import functionals_of

_FEATURE = re.compile(r"feature:(\d+)(:.*)?")

#: Pathways that sum to a coefficient's change.
_WHOLE = ("x", "gating", "y")


class TargetError(ValueError):
    """A target that a run does not have."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets as sums of functionals: ``mix [target, functional]``."""

    names: tuple[str, ...]
    functionals: FunctionalSet
    mix: Array

    def measured(self, before: State, after: State, policy: PolicyRecord) -> Array:
        """The exact change of every target between two states, ``[target]``."""
        found: Array = self.mix @ measured(self.functionals, before, after, scale=policy.scale, lam=policy.lam)
        return found

    def slopes(self, before: State, after: State, policy: PolicyRecord) -> Slopes:
        """Their derivatives by the state ``after``."""
        each = end_slopes(self.functionals, before, after, scale=policy.scale, lam=policy.lam)
        return Slopes(np.tensordot(self.mix, each.y, 1), np.tensordot(self.mix, each.pre, 1))


def default_targets(instrument: Instrument, policy: PolicyRecord, features: int = 3) -> tuple[str, ...]:
    """Mean behaviour of the two sides in the policy's unit, and both pathways of the largest coefficients.

    Every target costs about as much as training did, so these are few.
    """
    functionals = functionals_of(instrument, policy, features, exact=False)
    means = tuple(each.name for each in functionals.means if not each.converted and not each.is_category)
    return means + tuple(each.name for each in functionals.shifts if each.behaviour == 0)


def resolve(names: Sequence[str], instrument: Instrument, policy: PolicyRecord) -> Targets:
    """The targets of these names.

    Raises:
        TargetError: there is none of a name; says which there are.
    """
    names = tuple(dict.fromkeys(names))
    features = tuple(dict.fromkeys(int(match[1]) for match in map(_FEATURE.fullmatch, names) if match))
    unknown = sorted(set(features) - set(policy.features.tolist()))
    if unknown:
        raise TargetError(
            f"the policy does not hold feature {unknown[0]}. Allowed: {', '.join(map(str, policy.features.tolist()))}."
        )
    functionals = functionals_of(instrument, policy, features, exact=True)
    mix = np.zeros((len(names), len(functionals)))
    for row, name in enumerate(names):
        match = _FEATURE.fullmatch(name)
        parts = [f"{name}:{part}" for part in _WHOLE] if match and not match[2] else [name]
        for part in parts:
            mix[row, _place(part, functionals)] = 1.0
    return Targets(names, functionals, mix)


def _place(name: str, functionals: FunctionalSet) -> int:
    if name not in functionals.names:
        means = ", ".join(each.name for each in functionals.means if not each.converted)
        raise TargetError(
            f"there is no target {name!r}. Allowed: {means}, the same with :logit or :probability at the end, and "
            "feature:J, feature:J:x, feature:J:y, feature:J:gating with J one of the policy's features."
        )
    return functionals.names.index(name)
