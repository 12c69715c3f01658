"""Whose row is it: from the tokens of a training example to the rows of the user's data set.

A table made at the start of training maps the key of every example (see :mod:`smda_callbacks.observe.sequences`) to a
pair. Examples of equal tokens are one pair with all their row numbers: what they did cannot be told apart. Where rows
are not known (packing, streaming) pairs are known at a lower level, and ``PairIndex.note`` says so in plain words.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
from transformers import Trainer

from smda_callbacks.records import Pair
from smda_callbacks.training.row_table import Groups, is_table
from smda_callbacks.training.row_text import RowText, cut_text, decode
from smda_callbacks.training.row_ways import Level, Ways


def find_trainer() -> Trainer | None:
    """The trainer whose callback is being called; None outside of one. Callbacks are not handed it."""
    frame = _trainers_frame()
    return None if frame is None else frame.f_locals["self"]


def training_runs() -> Callable[[], bool]:
    """A function that tells, later, whether the training that this is called in still runs; True where none is found.

    A training that breaks off calls nobody, but its loop is gone from the call stack then. Nothing is kept alive. Ask
    for it in ``on_train_begin``: elsewhere the innermost loop may be that over an epoch.
    """
    frame, thread = _trainers_frame(), threading.get_ident()
    if frame is None:
        return lambda: True
    # A frame cannot be referred to weakly, and the next training's may lie where this one's lay.
    loop, trainer = (id(frame), frame.f_code), weakref.ref(frame.f_locals["self"])

    def runs() -> bool:
        here: FrameType | None = sys._getframe()
        while here is not None:
            if (id(here), here.f_code) == loop and here.f_locals["self"] is trainer():
                return True
            here = here.f_back
        return threading.get_ident() != thread  # the stack of another thread, such as autograd's, does not tell

    return runs


def _trainers_frame() -> FrameType | None:
    """The innermost method of a trainer that is being executed."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    return frame


class PairIndex:
    """Numbers of pairs by the tokens of their examples. Made by :func:`build_index`.

    Attributes:
        level: what pairs are, see :class:`~smda_callbacks.records.Pair`.
        note: what is known of the rows and what is not, in plain words; None where all is as one expects.
        unknown: how many pairs were met whose tokens are not in the table: all of a stream's, else examples that were
            changed after the data set had been prepared. Their level is ``tokens``.
    """

    def __init__(
        self,
        level: Level,
        note: str | None,
        groups: Groups | None,
        words: RowText | None,
        tokenizer: Any,
        *,
        text: bool,
        text_limit: int,
    ) -> None:
        self.level, self.note = level, note
        self._groups = groups if groups is not None else Groups({}, [], [], [], [], [])
        self._words, self._tokenizer, self._text, self._limit = words, tokenizer, text, text_limit
        self._new: dict[bytes, int] = {}
        self._tokens: list[np.ndarray[Any, Any]] = []
        self._first_new = len(self._groups.rows)

    def __len__(self) -> int:
        return self._first_new + self.unknown

    def continue_from(self, number: int) -> None:
        """Number pairs that are not in the table from ``number`` on, where an earlier part of the run used up to it."""
        if self.unknown:
            raise ValueError(f"{self.unknown} pairs have been numbered already. Next step: ask before training begins.")
        self._first_new = max(self._first_new, number)

    @property
    def unknown(self) -> int:
        return len(self._tokens)

    def pair_of(self, key: bytes, tokens: Any) -> int:
        """Number of the pair with this key; what is not in the table gets the next number, at first sight."""
        known = self._groups.numbers.get(key)
        if known is not None:
            return known
        if key not in self._new:
            self._new[key] = len(self)
            self._tokens.append(np.asarray(tokens, dtype=np.int32))
        return self._new[key]

    def describe(self, number: int) -> Pair:
        """The pair of a number. Raises IndexError for numbers that were never given."""
        if 0 <= number < len(self._groups.rows):
            return self._known(number)
        if not self._first_new <= number < len(self):
            raise IndexError(f"pair {number} is not known; allowed are 0 to {len(self) - 1}")
        tokens = self._tokens[number - self._first_new]
        return Pair(number, (), "tokens", {}, self._cut(tokens), len(tokens))

    def _known(self, number: int) -> Pair:
        groups, words = self._groups, self._words
        rows, place, count = groups.rows[number], groups.places[number][0], groups.tokens[number]
        assert words is not None
        if self.level in ("row", "id"):
            columns = words.columns(groups.places[number])
            level: Level = "id" if words.id_column in columns else "row"
        else:
            columns = {"block": str(place)} if self.level == "block" else {}
            level = self.level
        text = words.text(place, groups.starts[number], groups.lengths[number]) if self._text else None
        return Pair(number, rows, level, columns, None if text is None else cut_text(text, self._limit), count)

    def _cut(self, tokens: Any) -> str | None:
        return cut_text(decode(self._tokenizer, tokens), self._limit) if self._text else None


def build_index(
    dataset: Any,
    *,
    tokenizer: Any,
    trainer_dataset: Any = None,
    user_dataset: Any = None,
    text: bool = True,
    id_column: str | None = None,
    text_limit: int = 2000,
    trainer: Any = None,
) -> PairIndex:
    """The table of pairs of a run.

    Args:
        dataset: what the train dataloader reads: tokens, prepared and maybe packed.
        trainer_dataset: ``trainer.train_dataset``, the same rows with the user's columns.
        user_dataset: the data set that the user gave the trainer. Needed where packing or streaming hides its rows.
        text: keep texts; False leaves them out of every pair.
        id_column: a column whose value names the pair: rows with the same value are one.
        text_limit: longest text, in characters.
        trainer: found on the stack if None.

    Raises:
        RowError: ``id_column`` is no column of the data set, or ``user_dataset`` is not what is trained on.
    """
    trainer = trainer if trainer is not None else find_trainer()
    user = user_dataset if user_dataset is not None and is_table(user_dataset) else None
    source = Ways(dataset, trainer_dataset, user, trainer, tokenizer, id_column)
    made = source.by_order() or source.by_tokens() or source.by_documents() or source.by_blocks() or source.stream()
    level, groups, words, notes = made
    if user_dataset is not None and user is None:
        notes = [*notes, "the data set given to the callback cannot be read by row number, so it is not used"]
    note = "; ".join(notes) or None
    return PairIndex(level, note, groups, words, tokenizer, text=text, text_limit=text_limit)
