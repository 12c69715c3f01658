"""Where memory does not suffice for a batch: what is kept gives way, then the batch is read in halves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from smda_callbacks.observe.batches import ProbeBatch
from smda_callbacks.observe.kept import LowerLayers

logger = logging.getLogger("smda_callbacks")

Found = TypeVar("Found")


def in_memory(
    read_one: Callable[[ProbeBatch], Found], batch: ProbeBatch, lower: LowerLayers | None = None
) -> list[Found]:
    """The parts of a batch, read at once, or in halves of halves where memory does not suffice.

    ``lower``: what is kept of lower layers; it is let go before a batch is halved.
    """
    rows = len(batch.index)
    try:
        return [read_one(batch)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        again = lower is not None and lower.give_way((int(batch.index[0]), rows))
        if rows == 1 and not again:
            raise
    # Outside of the handler: the exception would hold on to what the failed pass has allocated.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if again:
        return in_memory(read_one, batch, lower)
    logger.warning(
        "out of memory with %d probes at once; they are read in two halves. measure.batch_size: %d avoids the attempt",
        rows,
        max(rows // 2, 1),
    )
    halves = (batch.rows(0, rows // 2), batch.rows(rows // 2, rows))
    return [part for half in halves for part in in_memory(read_one, half, lower)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory did not suffice, on CUDA or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
