"""How a behaviour is scored. A scorer turns the log-probabilities of response openings into one number per probe.

Adding a behaviour needs one function::

    @scorer("hedging", openings=("It depends", "Perhaps", "Maybe"))
    def hedging(log_probs):            # [probe, opening], natural log
        return np.exp(log_probs).sum(axis=1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smda_callbacks.observe.prefixes import REFUSALS, PrefixTree
from smda_callbacks.records import Array

#: Step of the central differences, in natural log: errors of truncation and of rounding are both about 1e-11 there.
SLOPE_STEP = 1e-5


class Scorer(Protocol):
    """A behaviour: its name, the openings it needs, and the function from their log-probabilities to a score."""

    @property
    def name(self) -> str: ...

    @property
    def openings(self) -> Sequence[str]: ...

    def __call__(self, log_probs: Array) -> Array:
        """``log_probs [probe, opening]`` (natural log) -> score ``[probe]``, a probability in [0, 1]."""
        ...


@dataclass(frozen=True)
class OpeningScorer:
    """A scorer made of a name, openings and a function."""

    name: str
    openings: tuple[str, ...]
    function: Callable[[Array], Array]

    def __call__(self, log_probs: Array) -> Array:
        return self.function(log_probs)


def scorer(name: str, openings: Sequence[str]) -> Callable[[Callable[[Array], Array]], OpeningScorer]:
    """Decorator that makes a scorer out of a function of opening log-probabilities."""
    return lambda function: OpeningScorer(name, tuple(openings), function)


def summed_probability(log_probs: Array) -> Array:
    """P(the response begins with one of the openings), ``[probe]``: the sum over a prefix-free set."""
    return np.minimum(np.exp(log_probs).sum(axis=1), 1.0)


def prefix_probability(name: str = "refusal", openings: Sequence[str] = REFUSALS) -> OpeningScorer:
    """The default behaviour: probability that the response opens as one of ``openings``."""
    return OpeningScorer(name, tuple(openings), summed_probability)


def score(scorers: Sequence[Scorer], tree: PrefixTree, log_probs: Array, target: str = "probability") -> Array:
    """Scores ``[probe, behaviour]`` float64 of every scorer from one reading of the tree.

    Args:
        log_probs: ``[probe, opening]`` for ``tree.openings``.
        target: ``probability`` or ``logit`` (log-odds, clipped at probabilities of 1e-9 and 1 - 1e-9).

    Raises:
        ValueError: a scorer needs an opening that the tree does not hold, or returns a wrong shape.
    """
    column = {text: index for index, text in enumerate(tree.openings)}
    columns = []
    for each in scorers:
        missing = [text for text in each.openings if text not in column]
        if missing:
            raise ValueError(f"behaviour {each.name!r} needs openings {missing} that were not read: {list(column)}.")
        values = np.asarray(each(log_probs[:, [column[text] for text in each.openings]]), dtype=np.float64)
        if values.shape != (len(log_probs),):
            raise ValueError(
                f"behaviour {each.name!r} returned shape {values.shape}; expected ({len(log_probs)},), one per probe."
            )
        columns.append(values)
    y = np.stack(columns, axis=1)
    if target == "logit":
        clipped = np.clip(y, 1e-9, 1 - 1e-9)
        return np.log(clipped) - np.log1p(-clipped)
    return y


def score_slopes(scorers: Sequence[Scorer], tree: PrefixTree, log_probs: Array, target: str = "probability") -> Array:
    """Derivative of every score by the log-probability of every opening, ``[probe, behaviour, opening]`` float64.

    By central differences: a scorer is any function of one probe's openings. Same arguments as :func:`score`.
    """
    slopes = np.empty((len(log_probs), len(scorers), len(tree.openings)))
    for opening in range(len(tree.openings)):
        step = np.zeros(len(tree.openings))
        step[opening] = SLOPE_STEP
        above, below = (score(scorers, tree, log_probs + sign * step, target) for sign in (1, -1))
        slopes[:, :, opening] = (above - below) / (2 * SLOPE_STEP)
    return slopes


def openings_of(scorers: Sequence[Scorer]) -> list[str]:
    """All openings that the scorers need, each once, in order."""
    return list(dict.fromkeys(text for each in scorers for text in each.openings))
