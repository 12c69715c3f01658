"""Made-up runs that differ in one known thing, and how they are handed to a comparison."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from smda_callbacks.records import Pair, PairBook, WindowRecord
from smda_callbacks.sinks.run_source import RunSource, from_store
from tests.helpers.runs import Run, write_run


def stored(folder: Path, *runs: Run) -> list[RunSource]:
    """The runs as run stores, ready to be compared."""
    return [from_store(write_run(folder / f"run-{n}", run), f"run-{n}") for n, run in enumerate(runs)]


def with_manifest(run: Run, **changes: Any) -> Run:
    """``run`` with entries of its manifest changed; ``sae__hash`` means ``sae.hash``."""
    manifest = dict(run.start.manifest)
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        manifest[outer] = {**manifest[outer], inner: value} if inner else value
    return replace(run, start=replace(run.start, manifest=manifest))


def without_pairs(run: Run, dropped: Collection[int]) -> Run:
    """``run`` as if the pairs with these numbers had not been in its data: those behind them move up a row."""

    def moved(pair: Pair) -> Pair:
        rows = tuple(row - sum(each < row for each in dropped) for row in pair.rows)
        return replace(pair, id=pair.id + 100, rows=rows)

    def window(record: WindowRecord) -> WindowRecord:
        seen = tuple(moved(pair) for pair in record.pairs_seen if pair.id not in dropped)
        return replace(record, pairs_seen=seen, pairs=_without(record.pairs, dropped))

    return replace(run, windows=tuple(window(record) for record in run.windows))


def with_effects(run: Run, factors: Mapping[int, float]) -> Run:
    """``run`` with the effects of these pairs, their later ones too, times a factor."""

    def scaled(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        return values * np.array([factors.get(int(each), 1.0) for each in ids])[:, None]

    windows = []
    for record in run.windows:
        book = record.pairs
        if book is not None:
            effect, later = scaled(book.ids, book.effect), scaled(book.later_ids, book.later_effect)
            record = replace(record, pairs=replace(book, effect=effect, later_effect=later))
        windows.append(record)
    return replace(run, windows=tuple(windows))


def _without(book: PairBook | None, dropped: Collection[int]) -> PairBook | None:
    if book is None:
        return None
    keep = ~np.isin(book.ids, list(dropped))
    later = ~np.isin(book.later_ids, list(dropped))
    return replace(
        book,
        ids=book.ids[keep] + 100,
        share=book.share[keep],
        effect=book.effect[keep],
        size=book.size[keep],
        intended=book.intended[keep],
        later_ids=book.later_ids[later] + 100,
        later_share=book.later_share[later],
        later_effect=book.later_effect[later],
        later_size=book.later_size[later],
    )
