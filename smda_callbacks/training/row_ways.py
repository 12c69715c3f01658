"""The ways in which the rows behind training examples can be known, from the best to the least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from smda_callbacks.training.row_table import (
    Groups,
    Ints,
    Keyed,
    group,
    is_table,
    prepare_again,
    prepares,
    read_keys,
    user_rows,
)
from smda_callbacks.training.row_text import RowText

Level = Literal["row", "document", "block", "id", "tokens"]

_SAMPLE = 200
_SAY = "Next step: name the data set that you give the trainer, with SMDACallback.from_config(..., dataset=...)"


class RowError(ValueError):
    """What the user says about the data set does not agree with what is trained on."""


Made = tuple[Level, Groups | None, RowText | None, list[str]]


class Ways:
    """The ways in which pairs can be known, best first; each returns None where it is not open."""

    def __init__(
        self, dataset: Any, trainer_dataset: Any, user: Any, trainer: Any, tokenizer: Any, id_column: str | None
    ) -> None:
        self.dataset, self.user, self.trainer, self.tokenizer = dataset, user, trainer, tokenizer
        self.id_column = id_column
        self.args = getattr(trainer, "args", None)
        self.table = is_table(dataset) and "input_ids" in dataset.column_names
        self.packed = self.table and "seq_lengths" in dataset.column_names
        packing = bool(getattr(self.args, "packing", False)) and prepares(trainer)
        self.wrapped = packing and getattr(self.args, "packing_strategy", None) == "wrapped"
        same = is_table(trainer_dataset) and self.table and len(trainer_dataset) == len(dataset)
        self.columns = trainer_dataset if same else dataset

    def by_order(self) -> Made | None:
        """Rows by their order, which preparation keeps; checked against the user's data set where it is given."""
        if not self.table or self.packed or self.wrapped:
            return None
        rows = user_rows(self.dataset, self.trainer)
        if self.user is not None and not _agree(
            self.columns, rows, self.user, getattr(self.tokenizer, "eos_token", "")
        ):
            if self._can_prepare():
                return None
            raise RowError(
                f"the data set given to the callback ({len(self.user)} rows) is not the one that is trained on "
                f"({len(self.dataset)} rows): their rows differ. Allowed: the very data set that the trainer was "
                "given, in the same order. Next step: pass that one, or none."
            )
        return self._rows(read_keys(self.dataset), rows, self.columns, [])

    def by_tokens(self) -> Made | None:
        """Rows by their tokens: the user's data set is prepared again, row by row."""
        if self.user is None or self.wrapped or not self._can_prepare():
            return None
        made, cut = prepare_again(self.user, self.trainer)
        examples = read_keys(made, cut)
        notes = ["rows are found by their tokens in the data set given to the callback"]
        if self.table:
            known, trained = set(examples.keys), read_keys(self.dataset).keys
            missing = sum(key not in known for key in trained)
            if missing == len(trained):
                raise RowError(
                    f"none of the {missing} examples that are trained on is in the data set given to the callback "
                    f"({len(self.user)} rows, columns {', '.join(self.user.column_names)}). Allowed: the data set that "
                    "the trainer was given. Next step: pass that one, or none."
                )
            if missing:
                notes.append(f"{missing} of {len(trained)} examples are not in it and have no row number")
        return self._rows(examples, np.arange(len(made)), made, notes)

    def by_documents(self) -> Made | None:
        """Documents of packed rows."""
        if not self.packed:
            return None
        why = "packing keeps no row numbers: pairs are the documents inside packed rows, shown by their text"
        return self._numberless("document", [f"{why}. {_SAY}" if self._can_prepare() else why])

    def by_blocks(self) -> Made | None:
        """Blocks of wrapped packing."""
        if not self.wrapped or not self.table:
            return None
        return self._numberless(
            "block",
            [
                "wrapped packing joins and cuts rows, and the parts attend to each other: pairs are its blocks, "
                "numbered as in the packed data set. Next step: packing_strategy bfd keeps examples apart"
            ],
        )

    def stream(self) -> Made:
        """Nothing is known beforehand."""
        why = "the data set is a stream or made on the fly, so that its rows have no numbers"
        if self.table is False and is_table(self.dataset):
            why = f"the data set has no column input_ids (it has {', '.join(self.dataset.column_names)})"
        notes = [f"{why}: pairs are told apart by their tokens alone"]
        if self._can_prepare() and not self.wrapped:
            notes[0] += f". {_SAY}, as one that is not a stream"
        return "tokens", None, None, [*notes, *self._lost_id()]

    def _rows(self, examples: Keyed, row_of: Ints, columns: Any, notes: list[str]) -> Made:
        """``row_of``: the user's row of each row of ``columns``, which ``examples`` were read from."""
        rows = row_of[examples.places].tolist()
        if self.id_column is None:
            groups = group(examples, rows, rows)
            return "row", groups, self._words(columns), [*notes, *_said_of_duplicates(groups)]
        if self.id_column not in columns.column_names:
            raise RowError(
                f"attribution.id_column is {self.id_column!r}, which the data set does not have. Allowed: one of "
                f"{', '.join(columns.column_names)}. Next step: correct the name, or leave it out."
            )
        names = columns.select_columns([self.id_column]).with_format(None)[:][self.id_column]
        labels = _first_rows(names, row_of)[examples.places].tolist()
        return "id", group(examples, labels, rows), self._words(columns), notes

    def _numberless(self, level: Level, notes: list[str]) -> Made:
        examples = read_keys(self.dataset)
        groups = group(examples, range(len(examples.keys)), None)
        return level, groups, self._words(self.dataset), [*notes, *self._lost_id()]

    def _words(self, columns: Any) -> RowText:
        field = getattr(self.args, "dataset_text_field", None) or "text"
        return RowText(columns, self.tokenizer, text_field=field, id_column=self.id_column)

    def _lost_id(self) -> list[str]:
        if self.id_column is None:
            return []
        return [f"the column {self.id_column!r} does not reach training and names no pairs here"]

    def _can_prepare(self) -> bool:
        """Whether a data set can be prepared again: with several processes that would wait for the others."""
        alone = int(getattr(self.args, "world_size", 1)) <= 1
        return alone and hasattr(self.args, "packing") and prepares(self.trainer)


def _said_of_duplicates(groups: Groups) -> list[str]:
    shared = [len(each) for each in groups.rows if len(each) > 1]
    if not shared:
        return []
    return [f"{sum(shared)} rows have the same tokens as another row: together they are {len(shared)} pairs"]


def _first_rows(names: Sequence[Any], row_of: Ints) -> Ints:
    """For every row, the lowest row number under the same name; rows without a name stand alone."""
    lowest: dict[Any, int] = {}
    for name, row in zip(names, row_of.tolist(), strict=True):
        lowest[name] = min(row, lowest.get(name, row))
    pairs = zip(names, row_of.tolist(), strict=True)
    return np.array([row if name is None else lowest[name] for name, row in pairs], dtype=np.int64)


def _agree(columns: Any, row_of: Ints, user: Any, eos: str | None) -> bool:
    """Whether a sample of the rows of ``columns`` holds what the user's rows of these numbers hold."""
    if len(row_of) and int(row_of.max()) >= len(user):
        return False
    shared = [name for name in user.column_names if name in columns.column_names and name != "labels"]
    places = np.unique(np.linspace(0, len(row_of) - 1, min(_SAMPLE, len(row_of))).astype(np.int64))
    if not shared or not len(places):
        return True
    ours = columns.select_columns(shared).with_format(None).select(places.tolist())
    theirs = user.select_columns(shared).with_format(None).select(row_of[places].tolist())
    pairs = zip(ours, theirs, strict=True)
    return all(_same(name, one[name], other[name], eos or "") for one, other in pairs for name in shared)


def _same(name: str, prepared: Any, given: Any, eos: str) -> bool:
    if name == "input_ids":
        prepared, given = list(prepared), list(given)
        return prepared in (given[: len(prepared)], given[max(0, len(given) - len(prepared)) :])
    return bool(prepared == given or (isinstance(given, str) and prepared == given + eos))
