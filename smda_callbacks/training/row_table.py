"""Token keys of the rows of a prepared data set, and the rows of the user's data set that they were made from."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

#: Where examples begin and end within a row of a length: ``[(start, stop), ...]``.
Cut = Callable[[int], list[tuple[int, int]]]

_BATCH = 1000


@dataclass(frozen=True)
class Keyed:
    """Examples of a data set, in order: their keys, the row that each is in, and its first token and length there."""

    keys: list[bytes]
    places: Ints  # [example]
    starts: Ints  # [example]
    lengths: Ints  # [example]


@dataclass(frozen=True)
class Groups:
    """Pairs by number: examples that cannot be told apart, or are not to be, are one pair.

    ``rows`` are the user's, all of them, none where unknown; ``places`` are the same rows in the data set read.
    ``starts`` and ``lengths`` say where in the first place the first example is, ``tokens`` how many the pair has.
    """

    numbers: dict[bytes, int]
    rows: list[tuple[int, ...]]
    places: list[tuple[int, ...]]
    starts: list[int]
    lengths: list[int]
    tokens: list[int]


def is_table(dataset: Any) -> bool:
    """Whether rows can be read twice with the same result: an Arrow data set without a transform on reading."""
    known = all(hasattr(dataset, name) for name in ("__len__", "select_columns", "with_format", "column_names"))
    form = getattr(dataset, "format", None) if known else None
    return isinstance(form, dict) and form.get("type") != "custom"


def read_keys(dataset: Any, cut: Cut | None = None) -> Keyed:
    """Keys of all examples of an Arrow data set with the columns ``input_ids`` and, where packed, ``seq_lengths``.

    ``cut`` says which parts of a row are examples; by default all of it, or as ``seq_lengths`` has it. 100,000 rows of
    200 tokens take about a second.
    """
    packed = cut is None and "seq_lengths" in dataset.column_names
    names = ["input_ids", *(["seq_lengths"] if packed else [])]
    keys: list[bytes] = []
    parts: list[tuple[int, int, int]] = []
    row = 0
    for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=_BATCH):
        tokens, lengths = _flat(batch.column("input_ids"))
        data = memoryview(tokens.tobytes())
        documents = _split(*_flat(batch.column("seq_lengths"))) if packed else None
        begin = 0
        for place, length in enumerate(lengths.tolist()):
            pieces = cut(length) if cut else _steps(documents[place]) if documents is not None else [(0, length)]
            for start, stop in pieces:
                keys.append(_key(data[8 * (begin + start) : 8 * (begin + stop)]))
                parts.append((row, start, stop - start))
            begin += length
            row += 1
    columns = np.array(parts, dtype=np.int64).reshape(-1, 3).T
    return Keyed(keys, columns[0], columns[1], columns[2])


def head(length: int | None) -> Cut:
    """The first ``length`` tokens of a row; all of them if None."""
    return lambda n: [(0, n if length is None else min(n, length))]


def tail(length: int) -> Cut:
    """The last ``length`` tokens of a row."""
    return lambda n: [(max(0, n - length), n)]


def pieces(length: int) -> Cut:
    """Pieces of ``length`` tokens, the last one shorter."""
    return lambda n: [(start, min(start + length, n)) for start in range(0, n, length)]


def group(examples: Keyed, labels: Sequence[int], rows: Sequence[int] | None) -> Groups:
    """Pairs of examples ``[example]``: those with one key, and those with one label, are one pair.

    Equal tokens under several labels are a pair of their own, which belongs to all of these labels. Pairs are numbered
    by their labels, ascending. ``rows``: the user's row of each example; None where it is not known.
    """
    members: dict[bytes, list[int]] = {}
    for number, key in enumerate(examples.keys):
        members.setdefault(key, []).append(number)
    together: dict[tuple[int, ...], list[list[int]]] = {}
    for equal in members.values():
        name = (labels[equal[0]],) if len(equal) == 1 else tuple(sorted({labels[each] for each in equal}))
        together.setdefault(name, []).append(equal)
    found = Groups({}, [], [], [], [], [])
    where = np.stack([examples.places, examples.starts, examples.lengths], axis=1).tolist()
    for number, name in enumerate(sorted(together)):
        same = together[name]
        everyone = [each for equal in same for each in equal]
        if rows is not None and len(everyone) > 1:
            everyone = sorted(everyone, key=lambda each: (rows[each], each))
        place, start, length = where[everyone[0]]
        found.rows.append(() if rows is None else tuple(dict.fromkeys([rows[each] for each in everyone])))
        found.places.append((place,) if len(everyone) == 1 else tuple(dict.fromkeys(where[e][0] for e in everyone)))
        found.starts.append(start)
        found.lengths.append(length)
        found.tokens.append(sum(where[equal[0]][2] for equal in same))
        for equal in same:
            found.numbers[examples.keys[equal[0]]] = number
    return found


def user_rows(dataset: Any, trainer: Any) -> Ints:
    """Rows ``[prepared row]`` of the data set given to ``trainer`` that the rows of the unpacked ``dataset`` come from.

    TRL's preparation keeps the order of the rows it is given, views (select, shuffle, filter) included, and writes them
    to a new table; afterwards it may drop rows and shuffle, which leaves a mapping to that table. Without truncation
    nothing need be written, so that the mapping may be to a table below the user's view; but then the order is that of
    the trainer's own shuffle.
    """
    n = len(dataset)
    if trainer is not None and not prepares(trainer):
        return np.arange(n)
    args = getattr(trainer, "args", None)
    if args is not None and args.max_length is None:
        return np.random.default_rng(args.seed).permutation(n) if args.shuffle_dataset else np.arange(n)
    mapping = getattr(dataset, "_indices", None)
    return np.arange(n) if mapping is None else mapping.column(0).to_numpy().astype(np.int64)


def prepares(trainer: Any) -> bool:
    """Whether the trainer tokenizes, truncates and packs the data set itself, as TRL's do."""
    return callable(getattr(trainer, "_prepare_dataset", None)) and not getattr(trainer, "_skip_prepare_dataset", False)


def prepare_again(dataset: Any, trainer: Any) -> tuple[Any, Cut]:
    """The user's data set, tokenized row by row as the trainer does it, and how the trainer cuts rows into examples."""
    args = copy.copy(trainer.args)
    length, packing = args.max_length, args.packing
    # Neither truncated, filtered nor shuffled: row k stays row k.
    for name, value in (("max_length", None), ("shuffle_dataset", False), ("packing", False)):
        object.__setattr__(args, name, value)
    with _no_progress_bars():
        made = trainer._prepare_dataset(
            dataset, trainer.processing_class, args, False, getattr(trainer, "_formatting_func", None), "train"
        )
    if length is None:
        return made, head(None)
    if packing:
        return made, pieces(length) if args.packing_strategy == "bfd_split" else head(length)
    return made, tail(length) if args.truncation_mode == "keep_end" else head(length)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def _flat(column: Any) -> tuple[Ints, Ints]:
    """Values of a column of lists, and the lengths of the lists; slices and chunks are taken care of."""
    import pyarrow.compute as pc

    values = pc.list_flatten(column).to_numpy().astype(np.int64)
    return values, pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)


def _split(values: Ints, lengths: Ints) -> list[Ints]:
    return np.split(values, np.cumsum(lengths)[:-1])


def _steps(lengths: Ints) -> list[tuple[int, int]]:
    stops = np.cumsum(lengths)
    return list(zip((stops - lengths).tolist(), stops.tolist(), strict=True))


def _key(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
