"""Metrics and tables of pairs: on made-up books whose parts are known, and on two pairs done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from smda_callbacks.report.ranking import ranked, unexplained_part
from smda_callbacks.sinks.metric_values import progress_of
from smda_callbacks.sinks.metrics import metric_names, rows_of_window, summary_of_run
from smda_callbacks.sinks.pair_table import pair_table, table_of
from smda_callbacks.sinks.pair_totals import PairTotals, totals_of
from smda_callbacks.sinks.pair_values import LEDGER
from smda_callbacks.sinks.wandb_pair_tables import MAX_PAIRS, effect_bars, effects_table, shares_table
from smda_callbacks.sinks.wandb_tables import MAX_BARS, Table
from tests.helpers.pair_runs import DECAY, EFFECT, LATER, MOMENTUM, OWN
from tests.helpers.runs import Run, make_run

BEHAVIOURS = ("refusal", "hedging")


@pytest.fixture
def run() -> Run:
    return make_run(windows=6, pairs=7, behaviours=BEHAVIOURS, not_finite=[2], unattributed=[4])


def as_dicts(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.data]


def ledger_of(row: dict[str, float], behaviour: str) -> dict[str, float]:
    return {line: row[f"smda/{behaviour}_ledger_refuse/{line}"] for line in LEDGER}


# --------------------------------------------------------------------------------------------------------- metrics


def test_a_windows_ledger_has_the_parts_it_was_made_of_and_closes(run: Run) -> None:
    before = rows_of_window(run.windows[0], run.start)
    row = rows_of_window(run.windows[1], run.start)
    for behaviour in BEHAVIOURS:
        lines, earlier = ledger_of(row, behaviour), ledger_of(before, behaviour)
        moved = row[f"smda/{behaviour}_group/refuse"] - before[f"smda/{behaviour}_group/refuse"]
        assert lines["measured"] == pytest.approx(moved, abs=1e-14)
        assert lines["pairs"] == pytest.approx(OWN * moved, abs=1e-14)
        assert lines["later"] == pytest.approx(LATER * earlier["pairs"], abs=1e-14)
        assert lines["momentum"] == pytest.approx(MOMENTUM * moved)
        assert lines["decay"] == pytest.approx(DECAY * moved)
        assert lines["unexplained"] == pytest.approx((1 - OWN - MOMENTUM - DECAY) * moved - lines["later"], abs=1e-14)
        assert sum(lines[line] for line in LEDGER[:-1]) == pytest.approx(lines["measured"], abs=1e-14)


def test_errors_cost_and_number_of_pairs_are_those_of_the_book(run: Run) -> None:
    row = rows_of_window(run.windows[0], run.start)
    expected = {"count": 4.0, "capture_error": 1e-7, "update_error": 1e-5}
    assert {name: row[f"smda/pairs/{name}"] for name in expected} == expected
    assert row["smda/cost/attribution_seconds"] == 0.05


@pytest.mark.parametrize("number", [2, 4])
def test_a_window_without_a_book_says_nothing_of_pairs(run: Run, number: int) -> None:
    row = rows_of_window(run.windows[number], run.start)
    assert not [name for name in row if "_ledger_" in name or "pairs" in name or "attribution" in name]


def test_flagged_pairs_are_those_that_move_most_what_they_do_not_intend() -> None:
    """Two features, no noise floor: pair 0 intends feature 0, pair 1 and 2 feature 1, of pair 3 nothing is known."""
    run = make_run(windows=1, pairs=4, features=2, noise=False)
    window = run.windows[0]
    book = window.pairs
    assert book is not None
    names = run.start.manifest["attribution"]["functionals"]
    effect = np.zeros((4, len(names)))
    first, second = (names.index(f"feature:{feature}:x") for feature in run.start.policy.features)
    effect[:, first], effect[:, second] = [3.0, 3.0, 1.0, 3.0], [-1.0, -1.0, -3.0, 1.0]
    nothing = np.zeros((0, len(names)))
    by_hand = replace(
        book, effect=effect, later_ids=np.zeros(0, dtype=np.int64), later_share=nothing, later_effect=nothing,
        intended=np.array([[0], [1], [1], [-1]]),
    )  # fmt: skip
    window = replace(window, pairs=by_hand)
    assert rows_of_window(window, run.start)["smda/pairs/flagged"] == 1.0
    summary = summary_of_run(run.start, [window])
    assert summary["smda/summary/pairs_flagged"] == 1.0
    assert summary["smda/summary/top_interfering_row"] == 1.0
    table = pair_table(run.start, [window])
    assert table is not None
    np.testing.assert_allclose(table.interference, [0.25, 0.75, 0.25, np.nan])


def test_flags_of_a_window_are_of_its_own_effects_against_its_own_floors(run: Run) -> None:
    for window in run.windows:
        alone = pair_table(run.start, [window])
        found = rows_of_window(window, run.start).get("smda/pairs/flagged")
        assert found == (None if alone is None else alone.flagged.sum())
    assert sum(rows_of_window(window, run.start).get("smda/pairs/flagged", 0.0) for window in run.windows) > 0


def test_the_summary_is_that_of_the_whole_run(run: Run) -> None:
    table = pair_table(run.start, run.windows)
    assert table is not None
    summary = summary_of_run(run.start, run.windows)
    assert summary["smda/summary/attributed_windows"] == 4.0
    assert summary["smda/summary/pairs_flagged"] == table.flagged.sum() > 0
    for behaviour in BEHAVIOURS:
        part = unexplained_part(table, f"{behaviour}:harmful")
        assert summary[f"smda/summary/{behaviour}_unexplained"] == pytest.approx(part)
    top = table.pairs[int(np.nanargmax(np.where(table.flagged, table.interference, np.nan)))]
    assert summary["smda/summary/top_interfering_row"] == top.rows[0]


def test_a_run_that_attributes_nothing_has_no_metric_of_pairs() -> None:
    plain, off = make_run(windows=2), make_run(windows=2, pairs=4, unattributed=[0, 1])
    for name in (*metric_names(plain.start), *summary_of_run(plain.start, plain.windows)):
        assert "pairs" not in name
        assert "ledger" not in name
    assert summary_of_run(off.start, off.windows)["smda/summary/attributed_windows"] == 0.0
    assert "smda/summary/pairs_flagged" not in summary_of_run(off.start, off.windows)


def test_metric_names_are_those_of_an_attributed_window_and_few(run: Run) -> None:
    window = run.windows[1]
    row = rows_of_window(window, run.start, progress_of(run.start, run.windows[:2]))
    names = metric_names(run.start)
    assert [name for name in names if name in row] == list(row)
    ours = set(names) - set(metric_names(replace(run.start, manifest={})))
    assert ours <= set(row)
    assert len(ours) == 6 * len(BEHAVIOURS) + 5


def test_probes_to_comply_alone_have_no_ledger(run: Run) -> None:
    attribution = run.start.manifest["attribution"]
    names = [name for name in attribution["functionals"] if ":harmful" not in name]
    start = replace(run.start, manifest={"attribution": {**attribution, "functionals": names}})
    assert not [name for name in metric_names(start) if "_ledger_" in name]


# ------------------------------------------------------------------------------------------------------ running sums


def test_running_sums_leave_earlier_ones_as_they_were(run: Run) -> None:
    totals = PairTotals.at(run.start)
    assert totals is not None
    kept = []
    for window in run.windows:
        totals = totals.after(window)
        kept.append(totals)
    for number, each in enumerate(kept):
        again, table = totals_of(run.start, run.windows[: number + 1]), table_of(each)
        assert again is not None
        fresh = table_of(again)
        assert table is not None
        assert fresh is not None
        for name in ("share", "effect", "floor", "windows", "intended", "interference", "flagged"):
            np.testing.assert_array_equal(getattr(table, name), getattr(fresh, name))
        assert (table.attributed, table.booked) == (fresh.attributed, fresh.booked)


@pytest.mark.parametrize("name", ["share", "effect", "size", "intended", "later_share"])
def test_a_book_with_a_row_too_few_is_refused(run: Run, name: str) -> None:
    book = run.windows[1].pairs
    assert book is not None
    damaged = replace(run.windows[1], pairs=replace(book, **{name: getattr(book, name)[:-1]}))
    with pytest.raises(ValueError, match=r"."):
        totals_of(run.start, [run.windows[0], damaged])


# ----------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(("quantity", "build"), [("effect", effects_table), ("share", shares_table)])
def test_tables_rank_as_the_command_line_does(run: Run, quantity: Any, build: Any) -> None:
    progress = progress_of(run.start, run.windows)
    found = as_dicts(build(run.start, progress, "full"))
    table = pair_table(run.start, run.windows)
    assert table is not None
    expected = ranked(table, run.start.policy, "refusal:harmful", quantity=quantity)
    assert len(found) == len(expected) == 7
    for row, other in zip(found, expected, strict=True):
        same = ("pair", "level", quantity, "above_noise", "interference", "flagged", "windows", "text")
        assert {name: row[name] for name in same} == {name: other[name] for name in same}
        assert row["rows"] == ", ".join(map(str, other["rows"]))
        assert {name: row[f"column_{name}"] for name in other["columns"]} == other["columns"]
        assert row.get("floor") == (other["floor"] if quantity == "effect" else None)


def test_share_and_effect_are_never_in_one_table(run: Run) -> None:
    progress = progress_of(run.start, run.windows)
    assert "share" not in effects_table(run.start, progress, "full").columns
    shares = shares_table(run.start, progress, "full").columns
    assert not {"effect", "floor"} & set(shares)
    assert effect_bars(run.start, progress).columns == ("pair", "effect")


def test_without_leave_there_is_no_text_in_a_table(run: Run) -> None:
    progress = progress_of(run.start, run.windows)
    for build in (effects_table, shares_table):
        none, hashed = (build(run.start, progress, each) for each in ("none", "hash"))
        assert "Sorry" not in repr(none)
        assert not {"text", "text_sha256"} & set(none.columns)
        assert all(len(row["text_sha256"]) == 16 for row in as_dicts(hashed))
        assert "Sorry" not in repr(hashed)


def test_bars_name_rows_and_pairs_without_one(run: Run) -> None:
    progress = progress_of(run.start, run.windows)
    bars = dict(effect_bars(run.start, progress).data)
    shown = [row for row in as_dicts(effects_table(run.start, progress, "none")) if row["above_noise"]]
    rows = {row["pair"]: row["effect"] for row in shown}
    assert rows
    assert bars == {f"row {pair}" if pair != 6 else "pair 6": value for pair, value in rows.items()}


def test_tables_are_bounded_and_take_the_largest() -> None:
    run = make_run(windows=60, pairs=220, noise=False, features=2, probes_per_category=2)
    progress = progress_of(run.start, run.windows)
    table = pair_table(run.start, run.windows)
    assert table is not None
    sizes = np.sort(np.abs(table.effect[:, table.functionals.index("refusal:harmful")]))[::-1]
    found = effects_table(run.start, progress, "none")
    assert [abs(row["effect"]) for row in as_dicts(found)] == pytest.approx(sizes[:MAX_PAIRS].tolist())
    assert len(effect_bars(run.start, progress).data) == MAX_BARS
    shares = table.share[table.known][:, table.functionals.index("refusal:harmful")]
    *largest, rest = as_dicts(shares_table(run.start, progress, "hash"))
    assert len(largest) == MAX_PAIRS
    assert rest["level"] == f"rest: {len(shares) - MAX_PAIRS} pairs"
    assert rest["share"] == pytest.approx(shares.sum() - sum(row["share"] for row in largest))
    assert {rest[name] for name in ("pair", "flagged", "text_sha256")} == {None}


def test_before_the_first_book_tables_are_empty(run: Run) -> None:
    progress = progress_of(run.start, [])
    assert effects_table(run.start, progress, "hash").data == ()
    assert "effect" in effects_table(run.start, progress, "hash").columns
    assert effect_bars(run.start, progress).data == ()


def test_effects_are_a_tenth_larger_as_they_were_made(run: Run) -> None:
    progress = progress_of(run.start, run.windows)
    effects = {row["pair"]: row["effect"] for row in as_dicts(effects_table(run.start, progress, "none"))}
    shares = {row["pair"]: row["share"] for row in as_dicts(shares_table(run.start, progress, "none"))}
    assert effects == pytest.approx({pair: EFFECT * share for pair, share in shares.items()})
