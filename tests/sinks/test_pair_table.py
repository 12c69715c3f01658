"""The totals of pairs are the sums of the windows' books, with floors and interference as computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from smda_callbacks.records import LINES, Array, Pair, PairBook, WindowRecord
from smda_callbacks.sinks.attribution import chained, undescribed
from smda_callbacks.sinks.pair_table import PairTable, by_feature, column, pair_table
from tests.helpers.pair_runs import EFFECT, kind_of, make_audit
from tests.helpers.runs import Run, make_run

CLOSE = 1e-12


def table_of(run: Run) -> PairTable:
    table = pair_table(run.start, iter(run.windows))
    assert table is not None
    return table


def books(run: Run) -> list[PairBook]:
    return [window.pairs for window in run.windows if window.pairs is not None]


def with_books(run: Run, edit: Callable[[PairBook], PairBook]) -> Run:
    windows = tuple(
        window if window.pairs is None else replace(window, pairs=edit(window.pairs)) for window in run.windows
    )
    return replace(run, windows=windows)


@pytest.fixture
def run() -> Run:
    return make_run(windows=6, pairs=7, behaviours=("refusal", "hedging"), not_finite=[2], unattributed=[4])


def summed(run: Run, quantity: str) -> Array:
    """The slow way: ``[pair, functional]``."""
    names = run.start.manifest["attribution"]["functionals"]
    total = np.zeros((7, len(names)))
    for book in books(run):
        for ids, values in ((book.ids, quantity), (book.later_ids, f"later_{quantity}")):
            for place, each in enumerate(ids):
                for k in range(len(names)):
                    total[each, k] += getattr(book, values)[place, k]
    return total


# --------------------------------------------------------------------------------------------------------- totals


def test_totals_are_the_sums_over_the_books_with_what_came_later(run: Run) -> None:
    table = table_of(run)
    assert [pair.id for pair in table.pairs] == list(range(7))
    assert table.functionals == tuple(run.start.manifest["attribution"]["functionals"])
    np.testing.assert_allclose(table.share, summed(run, "share"), rtol=0, atol=1e-16)
    np.testing.assert_allclose(table.effect, summed(run, "effect"), rtol=0, atol=1e-16)
    np.testing.assert_allclose(table.effect, EFFECT * table.share, rtol=1e-12)
    assert any(len(book.later_ids) for book in books(run))


def test_windows_are_those_in_which_a_pair_was_trained_on(run: Run) -> None:
    assert [window.pairs is not None for window in run.windows] == [True, True, False, True, False, True]
    table = table_of(run)
    expected = [sum(pair in book.ids for book in books(run)) for pair in range(7)]
    assert table.windows.tolist() == expected
    assert (table.attributed, table.booked) == (4, 5)
    assert table.known.all()


def test_pairs_and_lines_sum_to_the_change_from_first_to_last(run: Run) -> None:
    table = table_of(run)
    terms = np.sum([*table.share, *(table.lines[line] for line in LINES)], axis=0)
    np.testing.assert_allclose(terms, table.lines["measured"], rtol=0, atol=CLOSE)
    whole = table.lines["measured"] + table.lines["unattributed"]
    first, last = run.start.baseline, run.windows[-1]
    assert first.snapshot is not None
    assert last.snapshot is not None
    refuse = [probe.expected == "refuse" for probe in run.start.probes]
    moved = (last.snapshot.y - first.snapshot.y)[refuse].mean(axis=0)
    for name, value in (("refusal:harmful", moved[0]), ("hedging:harmful", moved[1])):
        assert whole[column(table, name)] == pytest.approx(value, abs=CLOSE)
        assert table.lines["unattributed"][column(table, name)] != 0
    for j, feature in enumerate(run.start.policy.features):
        for name, part in (("x", "shift_x_magnitude"), ("y", "shift_y")):
            total = sum(window.shift[part][j, 0] for window in run.windows if window.status == "ok")
            assert whole[column(table, f"feature:{feature}:{name}")] == pytest.approx(total, abs=CLOSE)


def test_made_up_kinds_push_as_they_are_meant_to(run: Run) -> None:
    """The push is what is left when every pair is compared with its window's plain part; refused above complied."""
    first = books(run)[0]
    place = table_of(run).functionals.index("refusal:harmful")
    moved = first.lines["measured"][place]
    left = first.share[:, place] - 0.7 * np.arange(1, 5) / 10 * moved
    by_kind = {kind_of(each): left[row] for row, each in enumerate(first.ids.tolist())}
    assert by_kind["harmful_refused"] > by_kind["benign"] > by_kind["harmful_complied"]
    assert left.sum() == pytest.approx(0, abs=1e-15)


# ---------------------------------------------------------------------------------------------------------- pairs


def test_a_pair_that_was_never_attributed_is_listed_without_an_account() -> None:
    run = make_run(windows=2, pairs=8, unattributed=[0])
    table = table_of(run)
    assert [pair.id for pair in table.pairs] == list(range(8))
    assert table.windows.tolist() == 4 * [0] + 4 * [1]
    assert table.known.tolist() == 4 * [False] + 4 * [True]
    assert table.floor is not None
    assert np.isnan(table.floor[:4]).all()
    assert np.isnan(table.interference[:4]).all()
    assert not table.flagged[:4].any()
    assert (table.intended[:4] == -1).all()


def test_a_duplicate_is_one_pair_with_all_its_rows(run: Run) -> None:
    assert table_of(run).pairs[1].rows == (1, 8)
    assert (table_of(run).pairs[6].rows, table_of(run).pairs[6].level) == ((), "document")


def test_ids_need_not_be_without_gaps(run: Run) -> None:
    def spread(window: WindowRecord) -> WindowRecord:
        book = window.pairs
        seen = tuple(replace(pair, id=10 * pair.id + 3) for pair in window.pairs_seen)
        if book is not None:
            book = replace(book, ids=10 * book.ids + 3, later_ids=10 * book.later_ids + 3)
        return replace(window, pairs=book, pairs_seen=seen)

    table = table_of(replace(run, windows=tuple(map(spread, run.windows))))
    assert [pair.id for pair in table.pairs] == [10 * each + 3 for each in range(7)]
    np.testing.assert_array_equal(table.share, table_of(run).share)


def test_a_pair_that_no_window_describes_has_its_number_only(run: Run) -> None:
    windows = (replace(run.windows[0], pairs_seen=run.windows[0].pairs_seen[1:]), *run.windows[1:])
    assert undescribed(run.windows) == []
    assert undescribed(windows) == [0]
    table = table_of(replace(run, windows=windows))
    assert table.pairs[0] == Pair(0, (), "tokens", {}, None, 0)
    np.testing.assert_array_equal(table.share, table_of(run).share)


def test_what_a_pair_intends_is_from_its_first_attributed_window(run: Run) -> None:
    later = replace(books(run)[-1], intended=np.full((len(books(run)[-1].ids), 3), 5))
    changed = replace(run, windows=(*run.windows[:-1], replace(run.windows[-1], pairs=later)))
    table = table_of(changed)
    assert table.intended.shape == (7, 2)  # as wide as what was first intended
    for pair in range(7):
        first = next(book for book in books(changed) if pair in book.ids)
        expected = first.intended[first.ids.tolist().index(pair)].tolist()
        assert table.intended[pair].tolist() == expected


# ---------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("engine", ["ghost", "exact"])
def test_floors_add_up_in_squares_and_only_readings_have_rounding(engine: str) -> None:
    run = make_run(windows=4, pairs=5, engine=engine)
    noise = run.start.noise
    assert noise is not None
    assert noise.functional_random is not None
    assert noise.functional_rounding is not None
    rounding = noise.functional_rounding if engine == "exact" else 0 * noise.functional_rounding
    # A pair's update and what momentum makes of it are one direction: they add up until the pair is trained on again.
    occasions: dict[int, list[np.ndarray]] = {pair: [] for pair in range(5)}
    for book in books(run):
        for pair, size in zip(book.ids.tolist(), book.size, strict=True):
            occasions[pair].append(np.hypot(size / noise.update_rms * noise.functional_random, rounding))
        for pair, size in zip(book.later_ids.tolist(), book.later_size, strict=True):
            occasions[pair][-1] = occasions[pair][-1] + np.hypot(
                size / noise.update_rms * noise.functional_random, rounding
            )
    squares = np.array([np.sum(np.square(found), axis=0) for found in occasions.values()])
    floor = table_of(run).floor
    assert floor is not None
    np.testing.assert_allclose(floor, np.sqrt(squares), rtol=1e-12)
    assert noise.functional_rounding.min() > 0


def test_without_noise_there_is_no_floor() -> None:
    assert table_of(make_run(windows=2, pairs=4, noise=False)).floor is None
    run = make_run(windows=2, pairs=4)
    assert run.start.noise is not None
    bare = replace(run.start.noise, functional_random=None, functional_rounding=None)
    assert table_of(replace(run, start=replace(run.start, noise=bare))).floor is None


# --------------------------------------------------------------------------------------------------- interference


def planted(
    effects: dict[str, float], *, size: float = 0.0, intended: int = 0, attributed: int | None = None
) -> PairTable:
    """A run of one pair that intends one feature, with these effects (SAE index and suffix -> effect) alone."""
    run = make_run(windows=1, pairs=1, attributed=attributed)
    names = run.start.manifest["attribution"]["functionals"]

    def edit(book: PairBook) -> PairBook:
        values = np.zeros((1, len(names)))
        for name, value in effects.items():
            values[0, names.index(name)] = value
        return replace(book, effect=values, size=np.array([size]), intended=np.array([[intended, -1]]))

    return table_of(with_books(run, edit))


def test_interference_is_the_share_of_the_effect_beside_what_was_intended() -> None:
    table = planted({"feature:1000:x": 2.0, "feature:1000:y": 1.0, "feature:1017:y": -1.0, "refusal:harmful": 9.0})
    assert table.interference.tolist() == [0.25]
    assert table.flagged.tolist() == [False]


def test_parts_of_a_feature_that_cancel_are_no_effect_on_it() -> None:
    table = planted({"feature:1000:x": 3.0, "feature:1000:y": -2.0, "feature:1017:y": 3.0})
    assert table.interference.tolist() == [0.75]
    assert table.flagged.tolist() == [True]


def test_the_flag_needs_an_effect_above_the_floor() -> None:
    small = {"feature:1000:x": 1e-7, "feature:1017:y": 3e-7}
    assert planted(small).flagged.tolist() == [True]
    noisy = planted(small, size=1e-3)
    assert noisy.flagged.tolist() == [False]
    assert noisy.interference.tolist() == [0.75]


def test_interference_is_not_known_where_what_was_intended_is_not_attributed() -> None:
    effects = {"feature:1000:x": 1.0, "feature:1017:y": 3.0}
    assert planted(effects, attributed=2, intended=1).interference.tolist() == [0.25]
    table = planted(effects, attributed=2, intended=4)
    assert table.features.tolist() == [1000, 1017]
    assert np.isnan(table.interference).all()
    assert not table.flagged.any()


# --------------------------------------------------------------------------------------------------------- audits


def test_in_an_audit_every_window_starts_from_the_baseline() -> None:
    audit = make_audit(pairs=5, failed=[3])
    chain = list(chained(audit.start, audit.windows))
    assert [window.step for _, window in chain] == [1, 2, 4, 5]
    assert all(before is audit.start.baseline for before, _ in chain)
    table = table_of(audit)
    assert table.windows.tolist() == [1, 1, 0, 1, 1]
    assert table.spread is None
    for window in audit.windows:
        if window.pairs is not None:
            np.testing.assert_array_equal(table.effect[window.pairs.ids[0]], window.pairs.lines["measured"])
    np.testing.assert_array_equal(table.lines["measured"], table.share.sum(axis=0))
    assert {name for name, values in table.lines.items() if np.any(values)} == {"measured"}


def test_a_pair_alone_moves_what_its_kind_moves() -> None:
    table = table_of(make_audit(pairs=6))
    effect = table.effect[:, column(table, "refusal:harmful")]
    kinds = np.array([kind_of(pair.id) for pair in table.pairs])
    assert effect[kinds == "harmful_refused"].min() > 0.02
    assert effect[kinds == "harmful_complied"].max() < -0.02
    assert np.abs(effect[kinds == "benign"]).max() < 0.01


def test_repeats_of_an_audit_are_averaged_and_their_spread_is_kept() -> None:
    audit = make_audit(pairs=4, repeats=3, failed=[4, 5, 9])
    table = table_of(audit)
    assert table.windows.tolist() == [3, 1, 2, 3]
    assert table.spread is not None
    assert table.floor is not None
    single = table_of(make_audit(pairs=4))
    assert single.floor is not None
    for pair in range(4):
        effects = [book.effect[0] for book in books(audit) if book.ids[0] == pair]
        np.testing.assert_allclose(table.effect[pair], np.mean(effects, axis=0), rtol=0, atol=1e-16)
        np.testing.assert_allclose(table.share[pair], np.mean(effects, axis=0), rtol=0, atol=1e-16)
        if len(effects) > 1:
            np.testing.assert_allclose(table.spread[pair], np.std(effects, axis=0, ddof=1), rtol=1e-12)
        np.testing.assert_allclose(table.floor[pair], single.floor[pair] / np.sqrt(len(effects)), rtol=1e-12)
    assert np.isnan(table.spread[1]).all()


# ----------------------------------------------------------------------------------------------------------- axes


@pytest.mark.parametrize("engine", ["ghost", "exact"])
def test_parts_of_features_are_found_by_name(engine: str) -> None:
    run = make_run(windows=2, pairs=4, engine=engine, behaviours=("refusal", "hedging"), attributed=3)
    table = table_of(run)
    assert table.features.tolist() == [1000, 1017, 1034]
    for behaviour, tail in (("", ""), ("hedging", ":hedging")):
        parts = by_feature(table, table.effect, behaviour)
        gating = {"shift_x_gating": "gating"} if engine == "exact" else {}
        suffixes = {"shift_x_magnitude": "x", "shift_y": "y", **gating}
        assert set(parts) == set(suffixes)
        for part, suffix in suffixes.items():
            columns = [column(table, f"feature:{feature}:{suffix}{tail}") for feature in table.features]
            np.testing.assert_array_equal(parts[part], table.effect[:, columns])


def test_an_unknown_functional_is_refused_with_the_nearest(run: Run) -> None:
    table = table_of(run)
    with pytest.raises(ValueError, match=r"no 'refusal:frauds'.*nearest: refusal:fraud.*Next step"):
        column(table, "refusal:frauds")
    with pytest.raises(ValueError, match=r"no 'feature:1016:x'.*feature:1017:x"):
        column(table, "feature:1016:x")
    with pytest.raises(ValueError, match=r"no '§'.*nearest: refusal:harmful"):
        column(table, "§")


def named(run: Run, names: list[str]) -> Run:
    """``run`` with a manifest that names these functionals, and books cut to as many."""
    attribution = {**run.start.manifest["attribution"], "functionals": names}
    return replace(run, start=replace(run.start, manifest={**run.start.manifest, "attribution": attribution}))


def test_functionals_of_another_policy_are_refused(run: Run) -> None:
    odd = named(run, ["refusal:bogus", *run.start.manifest["attribution"]["functionals"][1:]])
    with pytest.raises(ValueError, match=r"functional 'refusal:bogus' does not follow from.*Next step"):
        pair_table(odd.start, odd.windows)


def test_a_run_may_attribute_some_functionals_in_its_own_order(run: Run) -> None:
    table, names = table_of(run), ["feature:1034:y", "refusal:cooking", "feature:1017:y"]
    places = [column(table, name) for name in names]
    pairwise = ("share", "effect", "later_share", "later_effect")

    def cut(book: PairBook) -> PairBook:
        lines = {name: values[places] for name, values in book.lines.items()}
        return replace(book, lines=lines, **{name: getattr(book, name)[:, places] for name in pairwise})

    bare = replace(run, start=replace(run.start, noise=None))
    few = table_of(named(with_books(bare, cut), names))
    assert few.functionals == tuple(names)
    assert few.features.tolist() == [1034, 1017]
    np.testing.assert_array_equal(few.effect, table.effect[:, places])
    for line, values in few.lines.items():
        np.testing.assert_allclose(values, table.lines[line][places], rtol=0, atol=1e-15)
    assert set(by_feature(few, few.effect)) == {"shift_y"}


def test_a_run_without_attributed_windows_has_no_table() -> None:
    plain = make_run(windows=3)
    assert pair_table(plain.start, plain.windows) is None
    run = make_run(windows=2, pairs=4, unattributed=[0, 1])
    assert pair_table(run.start, run.windows) is None
    assert pair_table(run.start, ()) is None
    off = {**run.start.manifest, "attribution": {**run.start.manifest["attribution"], "engine": "off"}}
    assert pair_table(replace(run.start, manifest=off), run.windows) is None
