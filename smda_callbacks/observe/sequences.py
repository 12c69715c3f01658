"""Which training examples go through the model: told from the tokens that it really gets.

What a collator did to the data set (padding, packing, shuffling, workers) does not matter here. An example is named by
a hash of its token ids; whose row that is, is looked up elsewhere.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

logger = logging.getLogger("smda_callbacks")

Ints = NDArray[np.int64]

#: The label of tokens that are not trained on.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Sequence:
    """One training example inside a micro-batch: columns ``[start, stop)`` of batch row ``row``.

    ``prompt_end``: column, in the batch, of the last token of the prompt: the one before the first label that is set.
    None where it is not known: no labels, none of them set, or training begins with the first or second token, which
    means that the prompt is trained on too (the first label of a packed document is always masked).
    """

    row: int
    start: int
    stop: int
    tokens: Ints = field(repr=False)  # [token], padding excluded
    key: bytes
    prompt_end: int | None


def token_key(tokens: Any) -> bytes:
    """The name of an example: BLAKE2b, 16 bytes, over its token ids as int64."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


def split_batch(kwargs: Mapping[str, Any]) -> list[Sequence]:
    """The examples of a micro-batch, from the keyword arguments of the model's forward pass.

    Reads ``input_ids`` and, where given, ``attention_mask``, ``position_ids`` and ``labels``, all ``[row, token]``.
    Padding may be on either side. A row holds several examples where ``position_ids`` start again from zero (packing,
    padding-free batches). In such rows one token alone is no example: it is the padding to a multiple, and a document
    of one token has nothing to be predicted.

    Raises:
        ValueError: ``input_ids`` is missing or not ``[row, token]``.
    """
    ids = _matrix(kwargs, "input_ids", None)
    if ids is None:
        found = getattr(kwargs.get("input_ids"), "shape", None)
        raise ValueError(
            f"a batch needs input_ids [row, token], got {'none' if found is None else list(found)}. "
            "Next step: pass token ids to the model, not embeddings."
        )
    mask, positions, labels = (
        _matrix(kwargs, name, ids.shape) for name in ("attention_mask", "position_ids", "labels")
    )
    found = []
    for row in range(len(ids)):
        here = np.arange(ids.shape[1]) if mask is None else np.flatnonzero(mask[row])
        for columns in _documents(here, None if positions is None else positions[row]):
            tokens = ids[row, columns]
            end = None if labels is None else _prompt_end(columns, labels[row, columns])
            found.append(Sequence(row, int(columns[0]), int(columns[-1]) + 1, tokens, token_key(tokens), end))
    return found


def find_prompt_end(tokens: Any, marker: Many[int]) -> int | None:
    """Position in ``tokens`` of the last token of ``marker`` where it first occurs; None where it does not.

    ``marker`` is what a chat template adds to ask for an answer, so that the position is the last of the prompt.
    """
    array, wanted = np.asarray(tokens, dtype=np.int64), np.asarray(marker, dtype=np.int64)
    if not 0 < len(wanted) <= len(array):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(array, len(wanted))
    places = np.flatnonzero((windows == wanted).all(axis=1))
    return int(places[0]) + len(wanted) - 1 if len(places) else None


#: Called with the examples of a training forward pass and the shape of its ``input_ids``, (rows, tokens).
Listener = Callable[[list[Sequence], tuple[int, ...]], None]


class BatchWatch:
    """Tells a listener about every training forward pass of ``model``; changes nothing and draws no random number.

    Training means: the module is in train mode and gradients are on. Evaluations, probes and the second, gradient-free
    pass that some losses make are left out. A batch that cannot be read is said once in the log and left out too; what
    the listener raises is its own. ``wanted`` is asked first at every forward pass, whoever makes it. ``inputs`` gets
    the arguments of the forward pass, before its examples are looked for.
    """

    def __init__(
        self,
        model: nn.Module,
        listener: Listener,
        wanted: Callable[[], bool] = lambda: True,
        inputs: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.model, self.listener, self.wanted, self.inputs = model, listener, wanted, inputs
        self._handle: Any = None
        self._warned = False

    def attach(self) -> None:
        """Hook the model; does nothing where that is done."""
        if self._handle is None:
            # Traced by a compiler, the hook would break the graph, or be skipped.
            hook = torch.compiler.disable(self._before)
            self._handle = self.model.register_forward_pre_hook(hook, with_kwargs=True)

    def detach(self) -> None:
        """Take the hook off; does nothing where that is done."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.wanted() and module.training and torch.is_grad_enabled()):
            return
        given = {"input_ids": args[0], **kwargs} if args else kwargs
        self.inputs(given)
        try:
            examples = split_batch(given)
        except Exception as error:
            self._warn(error)
            return
        self.listener(examples, tuple(given["input_ids"].shape))

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning("the examples of a training batch are not known: %s: %s", type(error).__name__, error)
        self._warned = True


def _matrix(kwargs: Mapping[str, Any], name: str, shape: tuple[int, ...] | None) -> Ints | None:
    """An argument as an array ``[row, token]``; None where it is not given, or is something else."""
    value = kwargs.get(name)
    if not torch.is_tensor(value) or value.dim() != 2 or (shape is not None and value.shape[1] != shape[1]):
        return None
    array = value.detach().cpu().numpy().astype(np.int64, copy=False)
    return array if shape is None else np.broadcast_to(array, shape)


def _documents(columns: Ints, positions: Ints | None) -> list[Ints]:
    """``columns`` of a row, cut where positions start again."""
    if not len(columns):
        return []
    cuts = np.zeros(0, dtype=np.int64) if positions is None else np.flatnonzero(positions[columns] == 0)
    cuts = cuts[cuts > 0]
    if not len(cuts):
        return [columns]
    return [part for part in np.split(columns, cuts) if len(part) > 1]


def _prompt_end(columns: Ints, labels: Ints) -> int | None:
    answer = np.flatnonzero(labels != IGNORED)
    if not len(answer) or answer[0] <= 1:
        return None
    return int(columns[answer[0] - 1])
