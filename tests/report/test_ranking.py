"""Pairs come in the order of what they did, with the numbers of the pair table under the names that are documented."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from smda_callbacks.report.ranking import Quantity, ranked, unexplained_part, unit_of
from smda_callbacks.sinks.pair_table import PairTable, column, pair_table
from tests.helpers.pair_runs import make_audit
from tests.helpers.runs import Run, make_run


def table_of(run: Run) -> PairTable:
    table = pair_table(run.start, run.windows)
    assert table is not None
    return table


@pytest.fixture
def run() -> Run:
    return make_run(windows=6, pairs=7, behaviours=("refusal", "hedging"), engine="exact", attributed=4)


@pytest.fixture
def table(run: Run) -> PairTable:
    return table_of(run)


@pytest.mark.parametrize("quantity", ["effect", "share"])
def test_the_largest_come_first_whatever_their_sign(run: Run, table: PairTable, quantity: Quantity) -> None:
    signs = np.array([1.0, -1, 1, -1, 1, -1, 1])[:, None]
    table = replace(table, **{quantity: signs * np.abs(getattr(table, quantity))})
    rows = ranked(table, run.start.policy, "refusal:fraud", quantity=quantity)
    values = getattr(table, quantity)[:, column(table, "refusal:fraud")]
    assert [row["pair"] for row in rows] == sorted(range(7), key=lambda pair: -abs(values[pair]))
    assert [row[quantity] for row in rows] == [values[row["pair"]] for row in rows]
    assert {row[quantity] > 0 for row in rows} == {True, False}
    assert ranked(table, run.start.policy, "refusal:fraud", quantity=quantity, top=3) == rows[:3]


def test_equal_pairs_stay_in_their_order(run: Run, table: PairTable) -> None:
    equal = replace(table, effect=np.ones_like(table.effect))
    assert [row["pair"] for row in ranked(equal, run.start.policy, "refusal:fraud")] == list(range(7))


def test_a_row_has_both_quantities_and_the_noise_of_the_effect(run: Run, table: PairTable) -> None:
    place = column(table, "refusal:harmful")
    assert table.floor is not None
    for row in ranked(table, run.start.policy, "refusal:harmful", quantity="share"):
        pair = row["pair"]
        assert (row["effect"], row["share"]) == (table.effect[pair, place], table.share[pair, place])
        assert row["floor"] == table.floor[pair, place]
        assert row["above_noise"] is bool(abs(row["effect"]) > 2 * row["floor"])
        assert row["windows"] == table.windows[pair]
        known = not np.isnan(table.interference[pair])
        assert row["interference"] == (table.interference[pair] if known else None)
        assert row["flagged"] == table.flagged[pair]
        assert row["spread"] is None


@pytest.mark.parametrize("tail", ["", ":hedging"])
@pytest.mark.parametrize("name", ["feature:1017:x", "feature:1017:y", "feature:1017:gating"])
@pytest.mark.parametrize("quantity", ["effect", "share"])
def test_by_a_feature_shifts_are_those_of_its_coefficient(
    run: Run, table: PairTable, name: str, tail: str, quantity: Quantity
) -> None:
    values = getattr(table, quantity)
    for row in ranked(table, run.start.policy, name + tail, quantity=quantity):
        x, gating, y = (
            values[row["pair"], column(table, f"feature:1017:{part}{tail}")] for part in ("x", "gating", "y")
        )
        assert row["shift_x"] == {"magnitude": x, "gating": gating}
        assert row["shift_y"] == y
    assert table.effect[0, column(table, name + tail)] != table.share[0, column(table, name + tail)]


@pytest.mark.parametrize(("name", "tail"), [("refusal:cooking", ""), ("hedging:harmful:logit", ":hedging")])
def test_by_a_behaviour_shifts_are_norms_over_the_attributed_features(
    run: Run, table: PairTable, name: str, tail: str
) -> None:
    for row in ranked(table, run.start.policy, name):
        parts = {
            part: sum(
                table.effect[row["pair"], column(table, f"feature:{j}:{part}{tail}")] ** 2 for j in table.features
            )
            for part in ("x", "gating", "y")
        }
        assert row["shift_x"]["magnitude"] == pytest.approx(parts["x"] ** 0.5, rel=1e-12)
        assert row["shift_x"]["gating"] == pytest.approx(parts["gating"] ** 0.5, rel=1e-12)
        assert row["shift_y"] == pytest.approx(parts["y"] ** 0.5, rel=1e-12)


def test_what_is_not_known_is_none() -> None:
    run = make_run(windows=2, pairs=4, noise=False, pair_text=False)
    for row in ranked(table_of(run), run.start.policy, "refusal:harmful"):
        assert row["shift_x"]["gating"] is None
        assert row["shift_x"]["magnitude"] > 0
        assert (row["floor"], row["above_noise"], row["text"]) == (None, None, None)


def test_without_attributed_features_there_are_no_shifts() -> None:
    run = make_run(windows=2, pairs=4, attributed=0)
    table = table_of(run)
    assert len(table.features) == 0
    assert np.isnan(table.interference).all()
    for row in ranked(table, run.start.policy, "refusal:harmful"):
        assert (row["shift_x"], row["shift_y"]) == ({"magnitude": None, "gating": None}, None)
        assert row["effect"] != 0


def test_pairs_without_an_account_are_not_ranked() -> None:
    run = make_run(windows=2, pairs=8, unattributed=[0])
    assert {row["pair"] for row in ranked(table_of(run), run.start.policy, "refusal:harmful")} == {4, 5, 6, 7}


def test_columns_of_the_data_set_do_not_hide_numbers(run: Run) -> None:
    odd = tuple(
        replace(
            window, pairs_seen=tuple(replace(pair, columns={"kind": "k", "effect": "x"}) for pair in window.pairs_seen)
        )
        for window in run.windows
    )
    row = ranked(table_of(replace(run, windows=odd)), run.start.policy, "refusal:harmful")[0]
    assert row["columns"] == {"kind": "k", "effect": "x"}
    assert row["kind"] == "k"
    assert isinstance(row["effect"], float)


def test_repeats_of_an_audit_have_a_spread() -> None:
    audit = make_audit(pairs=3, repeats=3)
    rows = ranked(table_of(audit), audit.start.policy, "refusal:harmful")
    assert all(0 < row["spread"] < 0.01 for row in rows)
    assert [row["windows"] for row in rows] == [3, 3, 3]


def test_units(run: Run, table: PairTable) -> None:
    policy = run.start.policy
    assert unit_of(table, policy, "refusal:harmful") == "probability"
    assert unit_of(table, policy, "refusal:harmful:logit") == "logit"
    assert unit_of(table, policy, "feature:1000:x") == "probability per standard deviation"


def test_the_unexplained_part_is_relative_to_what_was_measured(table: PairTable) -> None:
    place = column(table, "refusal:harmful")
    lines = {**table.lines, "unexplained": np.full_like(table.share[0], -0.5), "measured": 0 * table.share[0]}
    assert unexplained_part(replace(table, lines=lines), "refusal:harmful") is None
    lines["measured"][place] = 2.0
    assert unexplained_part(replace(table, lines=lines), "refusal:harmful") == 0.25
