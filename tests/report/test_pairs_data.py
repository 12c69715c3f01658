"""Views of pairs show the numbers of the pair table: rankings, ledger, cumulative shares, gaps, interference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import Pair
from smda_callbacks.report.data import RunData
from smda_callbacks.report.gap_pairs import closers
from smda_callbacks.report.pairs_data import (
    TERMS,
    PairData,
    above_noise,
    cumulative_shares,
    data_columns,
    ledger,
    moved_features,
    need_pairs,
    pair_data,
    pair_name,
    rankings,
    thinned,
)
from smda_callbacks.report.sections_groups import interfering, matrix_of
from smda_callbacks.sinks.pair_table import by_feature, column
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.pair_runs import make_audit
from tests.helpers.runs import Run, make_run, write_run


def read(path: Path, run: Run, *, close: bool = True) -> RunData:
    return RunData.read(RunStore.open(write_run(path / "run", run, close=close)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    run = make_run(windows=9, pairs=14, features=5, behaviours=("refusal", "hedging"), unattributed=[2], failed=[4])
    return read(tmp_path_factory.mktemp("pairs"), run)


@pytest.fixture(scope="module")
def pairs(data: RunData) -> PairData:
    return need_pairs(data)


def test_functionals_by_behaviour_and_unit(data: RunData, pairs: PairData) -> None:
    groups = ["harmful", "harmless", "fraud", "weapons", "cooking", "coding"]
    assert [each.name for each in pairs.groups(1)] == [f"hedging:{name}" for name in groups]
    assert pairs.category(0, "fraud") == column(pairs.table, "refusal:fraud")
    assert pairs.category(0, "nothing") is None


def test_parts_are_the_columns_of_the_features(pairs: PairData) -> None:
    for m, behaviour in ((0, ""), (1, "hedging")):
        mine, theirs = pairs.parts(m, pairs.table.effect), by_feature(pairs.table, pairs.table.effect, behaviour)
        assert mine.keys() == theirs.keys() == {"shift_x_magnitude", "shift_y"}
        for part, values in mine.items():
            np.testing.assert_array_equal(values, theirs[part])


def test_rankings_are_by_size_and_say_what_is_left_out(pairs: PairData) -> None:
    table = pairs.table
    names = ["refusal:harmful", "refusal:fraud", f"feature:{table.features[0]}:y"]
    found = rankings(table, table.effect, names, names[:1], per=6, most=8)
    for each in found:
        sizes = np.abs(table.effect[:, column(table, each.name)])
        order = np.argsort(-sizes, kind="stable").tolist()
        assert list(each.rows) == order[: len(each.rows)]
        assert len(each.rows) + each.left == len(table.pairs)
        assert each.largest == sizes[order[len(each.rows)]]
    assert len(found[0].rows) == 6
    assert 1 <= len(found[1].rows) == len(found[2].rows) <= 6
    assert len({row for each in found for row in each.rows}) <= 8


def test_a_ranking_of_all_leaves_nothing_out(pairs: PairData) -> None:
    (found,) = rankings(pairs.table, pairs.table.share, ["refusal:coding"], [], per=50, most=100)
    assert (len(found.rows), found.left, found.largest) == (14, 0, 0.0)


def test_pairs_without_an_account_are_not_ranked(pairs: PairData) -> None:
    table = replace(pairs.table, windows=pairs.table.windows * 0, effect=pairs.table.effect * 0)
    share = table.share.copy()
    share[3:] = 0
    (found,) = rankings(replace(table, share=share), share, ["refusal:coding"], [], per=50, most=100)
    assert sorted(found.rows) == [0, 1, 2]


def test_the_ledger_closes_and_thinning_keeps_its_sums(data: RunData, pairs: PairData) -> None:
    books = ledger(data)
    assert list(books.steps) == [window.step for window in data.ok if window.pairs is not None]
    for found in (books, thinned(books, 3)):
        np.testing.assert_allclose(sum(found.terms[term] for term in TERMS), found.terms["measured"], atol=1e-14)
        np.testing.assert_allclose(found.terms["measured"].sum(axis=0), pairs.table.lines["measured"], atol=1e-14)
    own = books.terms["pairs"].sum(axis=0) + books.terms["later"].sum(axis=0)
    np.testing.assert_allclose(own, pairs.table.share.sum(axis=0), atol=1e-14)
    few = thinned(books, 3)
    assert len(few.steps) == 3
    assert few.steps[-1] == books.steps[-1]
    np.testing.assert_allclose(few.terms["pairs"][0], books.terms["pairs"][:3].sum(axis=0), atol=1e-15)


def test_curves_end_at_the_shares_of_the_table(data: RunData, pairs: PairData) -> None:
    rows, place = [5, 0, 13], pairs.place("refusal:weapons")
    steps, curves = cumulative_shares(data, rows, place)
    assert steps == data.steps
    np.testing.assert_array_equal(curves[:, 0], 0)
    np.testing.assert_allclose(curves[:, -1], pairs.table.share[rows, place], atol=1e-15)


def test_noise_is_that_of_the_table_and_an_unknown_floor_is_not_beaten(pairs: PairData) -> None:
    assert pairs.table.floor is not None
    above = above_noise(pairs.table)
    assert above is not None
    np.testing.assert_array_equal(above, above_floor(pairs.table.effect, pairs.table.floor))
    floor = pairs.table.floor * 0
    floor[2] = np.nan
    some = above_noise(replace(pairs.table, floor=floor))
    assert some is not None
    assert not some[2].any()
    assert some[3].any()
    assert above_noise(replace(pairs.table, floor=None)) is None


def test_the_most_moved_features_come_in_their_order(pairs: PairData) -> None:
    effect = np.zeros_like(pairs.table.effect)
    for size, feature in ((3, 4), (1, 0), (2, 1)):
        effect[0, pairs.place(f"feature:{pairs.table.features[feature]}:y")] = size
    assert moved_features(replace(pairs, table=replace(pairs.table, effect=effect)), 0, 2).tolist() == [1, 4]


@pytest.mark.parametrize("refuse", [True, False])
def test_closers_and_wideners_by_sign_above_noise(data: RunData, pairs: PairData, refuse: bool) -> None:
    place = pairs.place("refusal:cooking")
    effect, floor = pairs.table.effect.copy(), np.zeros_like(pairs.table.effect)
    effect[:, place] = 0
    effect[[1, 4, 6, 9], place] = [0.2, -0.3, 0.5, 0.4]
    floor[9, place] = 0.3
    table = replace(pairs.table, effect=effect, floor=floor)
    up, down = closers(data, replace(pairs, table=table), "cooking", refuse=True)
    assert (up, down) == ([6, 1], [4])
    assert closers(data, replace(pairs, table=table), "cooking", refuse=False) == ([4], [6, 1])
    everything = closers(data, replace(pairs, table=replace(table, floor=None)), "cooking", refuse=refuse)
    assert everything == (([6, 9, 1], [4]) if refuse else ([4], [6, 9, 1]))


def test_interference_is_that_of_the_table(data: RunData, pairs: PairData) -> None:
    found = interfering(data, pairs)
    assert found is not None
    intended = found.intended
    for row in range(len(pairs.table.pairs)):
        sizes = np.abs(found.shift[row])
        inside = [at for at in intended[row] if at >= 0]
        assert pairs.table.interference[row] == pytest.approx(1 - sizes[inside].sum() / sizes.sum(), abs=1e-12)
        assert pairs.table.flagged[row] == (found.above[row] and found.largest[row] not in inside)
    assert pairs.table.flagged.any()


def test_the_matrix_is_the_mean_of_what_is_above_noise(data: RunData, pairs: PairData) -> None:
    found = interfering(data, pairs)
    assert found is not None
    assert found.floor is not None
    matrix, used = matrix_of(found)
    rows = [row for row in range(len(found.shift)) if (np.abs(found.shift[row]) > 2 * found.floor[row]).any()]
    assert used == len(rows) > 1
    with_first = [row for row in rows if 0 in found.intended[row]]
    wanted = np.mean([np.abs(found.shift[row]) / np.abs(found.shift[row]).sum() for row in with_first], axis=0)
    np.testing.assert_allclose(matrix[0], wanted, atol=1e-14)
    loud = replace(found, floor=np.full_like(found.shift, np.inf))
    assert matrix_of(loud)[1] == 0


def test_names_of_pairs() -> None:
    def pair(rows: tuple[int, ...], level: str = "row") -> str:
        return pair_name(Pair(7, rows, level, {}, None, 3))  # type: ignore[arg-type]

    assert pair((4,)) == "row 4"
    assert pair((4, 9)) == "rows 4, 9"
    assert pair((4, 9, 12, 13, 17)) == "rows 4, 9 and 3 more"
    assert pair((), "block") == "block 7"
    assert pair((3, 4), "id") == "rows 3, 4, id 7"


def test_kind_and_category_come_first(pairs: PairData) -> None:
    first = replace(pairs.table.pairs[0], columns={"source": "x", "category": "a", "kind": "b"})
    assert data_columns(replace(pairs.table, pairs=(first, *pairs.table.pairs[1:]))) == ["kind", "category", "source"]


def test_runs_without_books_have_no_pairs(tmp_path: Path) -> None:
    data = read(tmp_path, make_run(windows=2))
    assert data.pairs is None
    assert pair_data(data) is None
    with pytest.raises(ValueError, match="no window of the run was attributed"):
        need_pairs(data)


def test_an_audit_is_never_summed_over_windows(tmp_path: Path) -> None:
    from smda_callbacks.report.data import behaviour_floors, gaps_now
    from smda_callbacks.report.shifts import cumulative_shifts, shift_floors

    data = read(tmp_path, make_audit(pairs=3), close=False)
    for summed in (lambda: data.account, lambda: cumulative_shifts(data), lambda: shift_floors(data),
                   lambda: behaviour_floors(data)):  # fmt: skip
        with pytest.raises(ValueError, match="the run is an audit"):
            summed()
    assert gaps_now(data) == list(data.store.gaps_start)
