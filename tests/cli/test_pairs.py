"""``smda pairs``: rows as the pair table has them, one quantity in a table, and refusals that name what is near."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smda_callbacks.sinks.pair_table import PairTable, column, pair_table
from tests.helpers.pair_runs import make_audit
from tests.helpers.runs import Run, make_run, write_run

Smda = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    return make_run(windows=6, pairs=7, unattributed=[2], engine="exact")


@pytest.fixture
def store(run: Run, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", run)


@pytest.fixture
def table(run: Run) -> PairTable:
    found = pair_table(run.start, run.windows)
    assert found is not None
    return found


# ----------------------------------------------------------------------------------------------------------- json


def test_rows_are_pairs_by_their_effect_on_harmful_refusal(store: Path, table: PairTable, smda: Smda) -> None:
    found = smda("pairs", store, "--json")
    assert found.code == 0
    assert (found.json["functional"], found.json["quantity"]) == ("refusal:harmful", "effect")
    assert (found.json["unit"], found.json["engine"], found.json["kind"]) == ("probability", "exact", "run")
    rows, place = found.json["rows"], column(table, "refusal:harmful")
    assert sorted(row["pair"] for row in rows) == list(range(7))
    assert [abs(row["effect"]) for row in rows] == sorted((abs(row["effect"]) for row in rows), reverse=True)
    for row in rows:
        pair = table.pairs[row["pair"]]
        assert row["rows"] == list(pair.rows)
        assert (row["kind"], row["category"]) == (pair.columns["kind"], pair.columns["category"])
        assert (row["effect"], row["share"]) == (table.effect[pair.id, place], table.share[pair.id, place])
        assert row["text"] == pair.text
        assert set(row["shift_x"]) == {"magnitude", "gating"}
        assert {"shift_y", "interference", "above_noise", "windows"} <= set(row)


def test_json_says_how_much_of_the_run_is_in_it(store: Path, table: PairTable, smda: Smda) -> None:
    found, place = smda("pairs", store, "--json").json, column(table, "refusal:harmful")
    assert found["windows"] == {"attributed": 5, "booked": 6}
    for name in ("measured", "unexplained", "unattributed"):
        assert found[name] == table.lines[name][place]
    assert found["unexplained_part"] == abs(found["unexplained"] / found["measured"])


@pytest.mark.parametrize("by", ["refusal:fraud", "refusal:harmless", "feature:1017:x", "feature:1017:y"])
@pytest.mark.parametrize("quantity", ["effect", "share"])
def test_any_functional_and_both_quantities(store: Path, table: PairTable, smda: Smda, by: str, quantity: str) -> None:
    found = smda("pairs", store, "--by", by, "--quantity", quantity, "--top", 3, "--json").json
    values = getattr(table, quantity)[:, column(table, by)]
    order = sorted(range(7), key=lambda pair: -abs(values[pair]))
    assert [row["pair"] for row in found["rows"]] == order[:3]
    assert [row[quantity] for row in found["rows"]] == [values[pair] for pair in order[:3]]
    assert found["pairs"] == 7


def test_by_a_feature_the_shift_is_the_coefficients(store: Path, table: PairTable, smda: Smda) -> None:
    (row,) = smda("pairs", store, "--by", "feature:1017:y", "--top", 1, "--json").json["rows"]
    assert row["shift_y"] == row["effect"]
    assert row["shift_x"]["magnitude"] == table.effect[row["pair"], column(table, "feature:1017:x")]


def test_a_text_that_was_kept_out_is_null(tmp_path: Path, smda: Smda) -> None:
    store = write_run(tmp_path / "run", make_run(windows=2, pairs=4, pair_text=False))
    assert {row["text"] for row in smda("pairs", store, "--json").json["rows"]} == {None}


# ---------------------------------------------------------------------------------------------------------- table


def header(out: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.split()[:1] == ["rows"])
    return re.split(r"\s{2,}", line.strip())


def test_a_table_shows_one_quantity_only(store: Path, smda: Smda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    effects, shares = smda("pairs", store), smda("pairs", store, "--quantity", "share")
    assert header(effects.out) == [
        "rows", "kind", "category", "effect", "noise", "shift x", "gating", "shift y", "interf.", "win.", "text",
    ]  # fmt: skip
    assert header(shares.out) == [
        "rows", "kind", "category", "share", "shift x", "gating", "shift y", "win.", "text",
    ]  # fmt: skip
    assert "left out of its steps" in effects.out
    assert "left out of its steps" not in shares.out
    assert "other lines sum to the change" in shares.out


def test_a_table_says_what_was_attributed_and_what_is_unexplained(store: Path, table: PairTable, smda: Smda) -> None:
    said = " ".join(smda("pairs", store).out.split())
    place = column(table, "refusal:harmful")
    part = abs(table.lines["unexplained"][place] / table.lines["measured"][place])
    assert "5 of 6 windows attributed by the engine exact" in said
    assert f"({100 * part:.0f} %) is unexplained; the other windows by" in said
    assert "7 of 7 pairs, by effect" in said


def test_texts_are_on_one_line_cut_and_not_obeyed(store: Path, smda: Smda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    out = smda("pairs", store).out
    assert '<b>pair 0</b> & "how" do I …? <script>alert(0)</script> Sorry, I can\'t.' in out
    assert "1, 8 " in out
    monkeypatch.setenv("COLUMNS", "110")
    out = smda("pairs", store).out
    assert "<b>pair 0" in out
    assert "Sorry" not in out
    assert len([line for line in out.splitlines() if "pair" in line]) == 7 + 3  # a line for each, and the words around
    assert re.search(r"^ +– ", out, re.M)  # the document whose row is not known


def test_signs_are_shown(store: Path, smda: Smda) -> None:
    out = smda("pairs", store, "--by", "feature:1017:y").out
    assert re.search(r" \+0\.\d", out)
    assert re.search(r" −0\.\d", out)


def test_an_audit_shows_spreads_and_no_ledger(tmp_path: Path, smda: Smda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    store = write_run(tmp_path / "audit", make_audit(pairs=4, repeats=2))
    shown = smda("pairs", store)
    assert shown.code == 0
    assert "spread" in header(shown.out)
    assert "every pair alone made its steps from the same start, 8 windows in all" in shown.out
    assert "unexplained" not in shown.out
    found = smda("pairs", store, "--json").json
    assert found["kind"] == "audit"
    assert [row["windows"] for row in found["rows"]] == [2, 2, 2, 2]
    assert all(row["effect"] == row["share"] for row in found["rows"])


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("by", "near"), [("refusal:frauds", "refusal:fraud"), ("feature:1018:x", "feature:1017:x"), ("refusal", "refusal:")]
)
def test_an_unknown_functional_is_refused_with_the_nearest(store: Path, smda: Smda, by: str, near: str) -> None:
    found = smda("pairs", store, "--by", by)
    assert found.code == 2
    assert re.search(rf"no '{by}'.*nearest: .*{near}.*Next step", found.err, re.S)


def test_a_run_without_attribution_is_refused_with_the_reason(tmp_path: Path, smda: Smda) -> None:
    found = smda("pairs", write_run(tmp_path / "plain", make_run(windows=1)))
    assert found.code == 2
    assert re.search(r"attributes nothing to pairs\. Next step: train again", found.err)
    run = make_run(windows=1, pairs=2, unattributed=[0])
    none = smda("pairs", write_run(tmp_path / "none", run))
    assert none.code == 2
    assert "has no attributed window yet. 1 of 1 window is not attributed: the store does not say why." in none.err
    windows = tuple(replace(window, unattributed="no memory. Next step: buy some") for window in run.windows)
    told = smda("pairs", write_run(tmp_path / "told", replace(run, windows=windows)))
    assert "1 of 1 window is not attributed: no memory. Next step: buy some. Next step: wait" in told.err


def test_the_reasons_of_windows_that_are_not_attributed_are_told(run: Run, tmp_path: Path, smda: Smda) -> None:
    whys = {1: "no memory for 7 pairs", 2: "no memory for 7 pairs", 4: "no step was seen"}
    windows = tuple(
        replace(window, pairs=None, unattributed=whys[number]) if number in whys else window
        for number, window in enumerate(run.windows)
    )
    store = write_run(tmp_path / "told", replace(run, windows=windows))
    text = "3 of 6 windows are not attributed. 2 of them: no memory for 7 pairs. 1 of them: no step was seen."
    assert text in " ".join(smda("pairs", store).out.split())
    found = smda("pairs", store, "--json").json["not_attributed"]
    assert found == {"why": {"no memory for 7 pairs": 2, "no step was seen": 1}, "text": text}


@pytest.mark.parametrize("top", ["0", "-1", "2.5", "all"])
def test_a_number_of_rows_is_a_whole_number_above_0(store: Path, smda: Smda, top: str) -> None:
    found = smda("pairs", store, f"--top={top}")
    assert found.code == 2
    assert f"--top: '{top}' is not a whole number above 0" in found.err


def test_what_is_no_store_is_refused(tmp_path: Path, smda: Smda) -> None:
    assert "does not exist" in smda("pairs", tmp_path / "nowhere").err
