"""The tables of pairs say what the books say; the store gives books and pairs back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from smda_callbacks.records import LINES
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.pair_table import PairTable, pair_table
from smda_callbacks.sinks.pair_tables import PAIR_TABLES
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.equal import assert_same
from tests.helpers.pair_runs import make_audit
from tests.helpers.runs import Run, make_run, write_run


@pytest.fixture
def run() -> Run:
    return make_run(windows=5, pairs=7, failed=[1], unattributed=[3], engine="exact", attributed=2)


@pytest.fixture
def store(run: Run, tmp_path: Path) -> RunStore:
    return RunStore.open(write_run(tmp_path / "run", run))


@pytest.fixture
def table(run: Run) -> PairTable:
    found = pair_table(run.start, run.windows)
    assert found is not None
    return found


def rows(store: RunStore, name: str, **where: object) -> list[dict[str, Any]]:
    return [row for row in store.table(name).to_pylist() if all(row[key] == value for key, value in where.items())]


# ---------------------------------------------------------------------------------------------------------- store


@pytest.mark.parametrize("text", [True, False])
def test_books_and_pairs_come_back_bit_for_bit(tmp_path: Path, text: bool) -> None:
    run = make_run(windows=5, pairs=7, failed=[1], unattributed=[3], pair_text=text)
    store = RunStore.open(write_run(tmp_path / "run", run))
    assert_same(store.windows(), run.windows)
    assert_same(store.noise, run.start.noise)
    assert {key: value for key, value in store.manifest.items() if key != "schema_version"} == dict(run.start.manifest)
    assert sum(window.pairs is not None for window in store.windows()) == 3
    assert len(store.windows()[1].pairs_seen) == 3  # a window that failed says whom it saw


def test_an_audit_comes_back_bit_for_bit(tmp_path: Path) -> None:
    audit = make_audit(pairs=4, repeats=2, failed=[3])
    store = RunStore.open(write_run(tmp_path / "run", audit))
    assert_same(store.windows(), audit.windows)
    assert_same(store.last_ok(), audit.start.baseline)
    assert_same(store.last_ok(2), audit.start.baseline)


def test_odd_numbers_of_a_book_come_back(tmp_path: Path) -> None:
    run = make_run(windows=1, pairs=3)
    book = run.windows[0].pairs
    assert book is not None
    odd = replace(book, update_error=float("nan"), capture_error=float("inf"), intended=book.intended[:, :0])
    windows = (replace(run.windows[0], pairs=odd),)
    assert_same(RunStore.open(write_run(tmp_path / "run", replace(run, windows=windows))).windows(), windows)


# --------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", PAIR_TABLES)
def test_tables_written_at_close_are_those_built_from_the_windows(store: RunStore, name: str) -> None:
    file = store.path / "tables" / f"{name}.parquet"
    assert pq.read_table(file).equals(store.table(name))


@pytest.mark.parametrize("name", PAIR_TABLES)
def test_a_run_that_attributes_nothing_has_no_such_table(tmp_path: Path, name: str) -> None:
    store = RunStore.open(write_run(tmp_path / "run", make_run(windows=1)))
    assert not (store.path / "tables" / f"{name}.parquet").exists()
    with pytest.raises(StoreError, match=f"no table '{name}'; allowed are steps, categories, features, pathways"):
        store.table(name)


@pytest.mark.parametrize("name", PAIR_TABLES)
def test_a_run_that_was_never_attributed_has_empty_tables_of_the_same_kind(
    store: RunStore, name: str, tmp_path: Path
) -> None:
    empty = RunStore.open(write_run(tmp_path / "none", make_run(windows=0, pairs=3))).table(name)
    assert empty.num_rows == 0
    schema = store.table(name).schema
    columns = [column for column in schema.names if not column.startswith("column_")]
    assert [str(empty.schema.field(column).type) for column in columns] == [
        str(schema.field(column).type) for column in columns
    ]


def test_pairs_has_one_row_per_pair(store: RunStore, table: PairTable, run: Run) -> None:
    found = rows(store, "pairs")
    features = run.start.policy.features.tolist()
    assert [row["pair"] for row in found] == list(range(7))
    for row, pair in zip(found, table.pairs, strict=True):
        assert (row["rows"], row["level"], row["tokens"]) == (list(pair.rows), pair.level, pair.tokens)
        assert (row["column_kind"], row["column_category"]) == (pair.columns["kind"], pair.columns["category"])
        assert row["text"] == pair.text
        assert row["windows"] == table.windows[pair.id]
        assert row["flagged"] == table.flagged[pair.id]
        assert row["intended"] == [features[place] for place in table.intended[pair.id] if place >= 0]
        known = not np.isnan(table.interference[pair.id])
        assert row["interference"] == (table.interference[pair.id] if known else None)
    assert {row["interference"] is None for row in found} == {True, False}


def test_texts_that_were_kept_out_are_null(tmp_path: Path) -> None:
    store = RunStore.open(write_run(tmp_path / "run", make_run(windows=2, pairs=5, pair_text=False)))
    assert {row["text"] for row in rows(store, "pairs")} == {None}


def test_totals_are_those_of_the_pair_table(store: RunStore, table: PairTable) -> None:
    assert len(rows(store, "pair_totals")) == table.known.sum() * len(table.functionals)
    assert table.floor is not None
    marks = set()
    for row in rows(store, "pair_totals"):
        k = table.functionals.index(row["functional"])
        floor = table.floor[row["pair"], k]
        assert (row["share"], row["effect"]) == (table.share[row["pair"], k], table.effect[row["pair"], k])
        assert row["floor"] == floor
        assert row["above_floor"] is bool(abs(row["effect"]) > 2 * floor)
        assert (row["spread"], row["windows"]) == (None, table.windows[row["pair"]])
        marks.add(row["above_floor"])
    assert marks == {True, False}


def test_totals_have_no_marks_where_noise_was_not_measured(tmp_path: Path) -> None:
    store = RunStore.open(write_run(tmp_path / "run", make_run(windows=2, pairs=4, noise=False)))
    found = rows(store, "pair_totals")
    assert {(row["floor"], row["above_floor"]) for row in found} == {(None, None)}


def test_a_pair_in_windows_that_were_not_attributed_has_no_total(tmp_path: Path) -> None:
    store = RunStore.open(write_run(tmp_path / "run", make_run(windows=2, pairs=8, unattributed=[0])))
    assert {row["pair"] for row in rows(store, "pair_totals")} == {4, 5, 6, 7}
    assert {row["pair"]: row["windows"] for row in rows(store, "pairs")} == dict(
        zip(range(8), 4 * [0] + 4 * [1], strict=True)
    )


def test_steps_are_the_books(store: RunStore, run: Run) -> None:
    names = run.start.manifest["attribution"]["functionals"]
    for window in run.windows:
        found = rows(store, "pair_steps", step=window.step)
        if window.pairs is None:
            assert found == []
            continue
        book = window.pairs
        own = {(int(each), name): (p, k) for p, each in enumerate(book.ids) for k, name in enumerate(names)}
        later = {(int(each), name): (p, k) for p, each in enumerate(book.later_ids) for k, name in enumerate(names)}
        assert {(row["pair"], row["functional"]) for row in found} == set(own) | set(later)
        assert len(found) == len(set(own) | set(later))
        for row in found:
            key = (row["pair"], row["functional"])
            for quantity in ("share", "effect"):
                expected = getattr(book, quantity)[own[key]] if key in own else None
                carried = getattr(book, f"later_{quantity}")[later[key]] if key in later else None
                assert (row[quantity], row[f"later_{quantity}"]) == (expected, carried)
    last = rows(store, "pair_steps", step=run.windows[-1].step)
    assert {(row["share"] is None, row["later_share"] is None) for row in last} == {
        (True, False),
        (False, True),
        (False, False),
    }


def test_the_ledger_closes_in_its_table(store: RunStore, run: Run) -> None:
    found = rows(store, "ledger")
    names = run.start.manifest["attribution"]["functionals"]
    steps = [window.step for window in run.windows if window.pairs is not None]
    assert [(row["step"], row["functional"]) for row in found] == [(step, name) for step in steps for name in names]
    for row in found:
        terms = [row[name] for name in ("pairs", "later", *LINES)]
        assert sum(terms) == pytest.approx(row["measured"], abs=1e-9 * sum(map(abs, terms)))
    book = run.windows[2].pairs
    assert book is not None
    (row,) = rows(store, "ledger", step=run.windows[2].step, functional=names[1])
    assert row["pairs"] == pytest.approx(book.share[:, 1].sum(), abs=1e-17)
    assert row["later"] == pytest.approx(book.later_share[:, 1].sum(), abs=1e-17)
    assert [row[line] for line in LINES] == [book.lines[line][1] for line in LINES]


def test_an_audit_with_repeats_has_spreads(tmp_path: Path) -> None:
    audit = make_audit(pairs=3, repeats=2, failed=[5])
    store, table = RunStore.open(write_run(tmp_path / "run", audit)), pair_table(audit.start, audit.windows)
    assert table is not None
    assert table.spread is not None
    found = rows(store, "pair_totals", functional="refusal:harmful")
    assert [row["spread"] for row in found] == [*table.spread[:2, 0].tolist(), None]
    assert [row["windows"] for row in found] == [2, 2, 1]
