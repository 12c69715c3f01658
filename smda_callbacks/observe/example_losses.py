"""The loss of every example of a micro-batch by itself, in plain arithmetic that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smda_callbacks.observe.sequences import IGNORED
from smda_callbacks.observe.sequences import Sequence as Example

#: Arguments of a forward pass that have to do with the loss that the model or the trainer computes, not with logits.
_OF_LOSS = frozenset({"labels", "num_items_in_batch", "shift_labels", "use_cache"})


def example_losses(
    model: nn.Module, inputs: Mapping[str, Any], examples: Sequence[Example], denominator: float
) -> Tensor:
    """Cross-entropy summed over an example's trained tokens, over ``denominator``: ``[example]``.

    Args:
        inputs: what the trainer gave the model, ``labels [row, token]`` among it.
        examples: of this batch, as :func:`~smda_callbacks.observe.sequences.split_batch` gives them; packed or not.
        denominator: trained tokens of the whole optimizer step, for a trainer that averages over them.
    """
    given = {name: value for name, value in inputs.items() if name not in _OF_LOSS}
    logits = model(**given, use_cache=False).logits[:, :-1]
    labels = inputs["labels"][:, 1:].to(logits.device)
    rows, columns = torch.nonzero(labels != IGNORED, as_tuple=True)
    each = functional.cross_entropy(_at_least_float32(logits[rows, columns]), labels[rows, columns], reduction="none")
    owner = _owners(labels, examples)[rows, columns]
    return each.new_zeros(len(examples)).index_add(0, owner, each) / denominator


def _owners(labels: Tensor, examples: Sequence[Example]) -> Tensor:
    """Number of the example of every label, ``[row, token - 1]``; labels of no example are an error further on."""
    owner = torch.full_like(labels, -1)
    for number, example in enumerate(examples):
        owner[example.row, max(example.start - 1, 0) : example.stop - 1] = number
    return owner


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
