"""Behaviours in their two units: probability, and its log-odds (natural log), called logit."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Target = Literal["probability", "logit"]

#: Probabilities are clipped this far from 0 and 1 before they are turned into log-odds.
LEAST_PROBABILITY = 1e-9


def other_unit(target: Target) -> Target:
    """The unit that ``target`` is not."""
    return "logit" if target == "probability" else "probability"


def convert(y: Array, target: Target) -> Array:
    """Behaviours in the other unit than ``target``: log-odds (natural log) of probabilities, or back. Any shape."""
    if target == "probability":
        clipped = np.clip(y, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        odds: Array = np.log(clipped) - np.log1p(-clipped)
        return odds
    return _sigmoid(y)


def conversion_slope(y: Array, target: Target) -> Array:
    """Derivative of :func:`convert`, elementwise; 0 where a probability is clipped and its log-odds are constant."""
    if target == "probability":
        inside = (y > LEAST_PROBABILITY) & (y < 1 - LEAST_PROBABILITY)
        safe = np.where(inside, y, 0.5)
        slope: Array = np.where(inside, 1 / (safe * (1 - safe)), 0.0)
        return slope
    return _sigmoid(y) * _sigmoid(-y)


def _sigmoid(y: Array) -> Array:
    # Neither overflows nor loses its relative accuracy, however large |y|.
    values: Array = np.exp(-np.logaddexp(0.0, -y))
    return values
