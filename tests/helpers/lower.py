"""Where readings of a model may begin."""

from __future__ import annotations

from torch import nn

from smda_callbacks.observe.kept import LowerLayers


def first_trained(model: nn.Module) -> int:
    """The layer that a reading of ``model`` begins at when memory allows: the lowest that training changes, or 0."""
    lower = LowerLayers(1)
    lower.begin(model)
    return lower.first
