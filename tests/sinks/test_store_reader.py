"""What a reader gives back: the records bit for bit, and tables that agree with them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from smda_callbacks.maths.uncertainty import step_floor
from smda_callbacks.records import PATHWAYS, ROWS, Alert, policy_hash, probe_hash
from smda_callbacks.sinks.files import StoreError, append_row, read_rows
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.equal import assert_same
from tests.helpers.runs import Run, make_run, write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run() -> Run:
    return make_run(
        windows=5, behaviours=("refusal", "hedging"), not_finite=[1], failed=[3], skipped=[3, 6], start_step=4
    )


@pytest.fixture
def store(run: Run, tmp_path: Path) -> RunStore:
    return RunStore.open(write_run(tmp_path / "run", run))


def test_everything_comes_back_bit_for_bit(run: Run, store: RunStore) -> None:
    for name in ("probes", "policy", "noise", "baseline"):
        assert_same(getattr(store, name), getattr(run.start, name), name)
    assert_same(store.gaps_start, run.start.gaps)
    assert_same(store.windows(), run.windows)
    assert_same(store.end, run.end)
    assert {key: value for key, value in store.manifest.items() if key != "schema_version"} == dict(run.start.manifest)
    assert policy_hash(store.policy) == policy_hash(run.start.policy)
    assert probe_hash(store.probes) == probe_hash(run.start.probes)
    assert_same(store.start.baseline, run.start.baseline)


def test_a_run_without_noise_has_none(tmp_path: Path) -> None:
    assert RunStore.open(write_run(tmp_path / "run", make_run(windows=1, noise=False))).noise is None


def test_gates_that_are_shares_come_back_too(tmp_path: Path) -> None:
    run = make_run(windows=2, mean_readout=True)
    assert_same(RunStore.open(write_run(tmp_path / "run", run)).windows(), run.windows)


def test_categories_are_numbered_by_first_appearance(run: Run, store: RunStore) -> None:
    assert store.categories == ("fraud", "weapons", "cooking", "coding")
    np.testing.assert_array_equal(store.groups, run.groups)
    assert store.groups.dtype == np.int64


def test_a_window_is_found_by_its_last_step(run: Run, store: RunStore) -> None:
    assert_same(store.window(8), run.windows[1])
    assert_same(store.window(4), run.start.baseline)
    with pytest.raises(StoreError, match=r"no window of .* ends at step 7; the nearest end at 6, 8, 4"):
        store.window(7)


def test_the_last_ok_window_passes_over_those_that_failed(run: Run, store: RunStore) -> None:
    assert_same(store.last_ok(), run.windows[4])
    assert_same(store.last_ok(12), run.windows[2])
    assert_same(store.last_ok(8), run.windows[0])
    assert_same(store.last_ok(5), run.start.baseline)


def test_a_reader_follows_a_run_that_goes_on(tmp_path: Path) -> None:
    run = make_run(windows=2)
    sink = StoreSink(tmp_path / "run")
    sink.open(run.start)
    store = RunStore.open(tmp_path / "run")
    assert (store.windows(), store.end) == ([], None)
    sink.write(run.windows[0])
    assert_same(store.windows(), run.windows[:1])
    (tmp_path / "run" / "steps" / "000000004.safetensors.part").write_bytes(b"half a")
    assert_same(store.windows(), run.windows[:1])
    sink.write(run.windows[1])
    sink.close(run.end)
    assert_same(store.windows(), run.windows)
    assert_same(store.end, run.end)


def test_alerts_inside_and_outside_windows_are_sorted_by_step(run: Run, store: RunStore) -> None:
    append_row(store.path / "alerts.jsonl", vars(Alert(5, "early", "said late")))
    inside = [alert for window in run.windows for alert in window.alerts]
    assert store.alerts() == [Alert(5, "early", "said late"), *inside, *run.alerts]


def test_a_torn_last_line_is_left_out_and_a_broken_finished_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "logged.jsonl"
    assert read_rows(path) == []
    append_row(path, {"step": 1, "text": "é\n"})
    append_row(path, {"step": 2})
    whole = path.read_bytes()
    for cut in range(len(whole) - 9, len(whole)):
        path.write_bytes(whole[:cut])
        assert read_rows(path) == [{"step": 1, "text": "é\n"}]
    append_row(path, {"step": 3})
    assert [row["step"] for row in read_rows(path)] == [1, 3]
    path.write_bytes(b'{"step": 1\n{"step": 2}\n')
    with pytest.raises(StoreError, match=r"logged\.jsonl cannot be read .*Restore it from a copy"):
        read_rows(path)


@pytest.mark.parametrize("name", ["steps/000000006.safetensors", "policy.safetensors", "policy.json", "gaps.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"\x08" + 400 * b"x"])
def test_a_damaged_file_is_named(store: RunStore, name: str, data: bytes) -> None:
    (store.path / name).write_bytes(data)
    with pytest.raises(StoreError, match=f"{name} cannot be read .*Restore it from a copy"):
        RunStore.open(store.path).windows()


@pytest.mark.parametrize("name", ["policy.safetensors", "policy.json", "gaps.json", "probes.jsonl"])
def test_a_missing_file_is_noticed(store: RunStore, name: str) -> None:
    (store.path / name).unlink()
    with pytest.raises(StoreError, match=f"{name} is missing from the run store .*Restore"):
        RunStore.open(store.path)


def test_a_missing_baseline_is_noticed(store: RunStore) -> None:
    (store.path / "steps" / "000000004.safetensors").unlink()
    with pytest.raises(StoreError, match=r"first record, of step 6, is a window.*baseline is missing.*Restore"):
        RunStore.open(store.path)


def test_a_renamed_window_is_noticed(store: RunStore) -> None:
    (store.path / "steps" / "000000006.safetensors").rename(store.path / "steps" / "000000007.safetensors")
    with pytest.raises(StoreError, match=r"000000007\.safetensors cannot be read .*holds the record of step 6"):
        store.windows()


def test_a_field_that_no_record_has_is_noticed(store: RunStore) -> None:
    file = store.path / "policy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"new": 1}))
    with pytest.raises(StoreError, match=r"policy\.json cannot be read \(KeyError: 'new'\)"):
        RunStore.open(store.path)


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError, match=r"is no run store: it has no manifest\.json.*Give the folder"):
            RunStore.open(path)


def test_reading_loads_neither_torch_nor_a_tracker() -> None:
    code = (
        "import sys; import smda_callbacks.sinks.tables, smda_callbacks.report.verify, smda_callbacks.sinks.store; {}"
        "sys.exit(bool({{'torch', 'wandb', 'transformers'}} & set(sys.modules)))"
    )
    for extra, expected in (("", 0), ("import torch; ", 1)):  # the second shows that the first can fail
        result = subprocess.run([sys.executable, "-c", code.format(extra)], cwd=ROOT, check=False)
        assert result.returncode == expected


# --------------------------------------------------------------------------------------------------------- tables


def rows(store: RunStore, name: str, **where: object) -> list[dict]:  # type: ignore[type-arg]
    return [row for row in store.table(name).to_pylist() if all(row[key] == value for key, value in where.items())]


@pytest.mark.parametrize("name", ["steps", "categories", "features", "pathways"])
def test_tables_written_at_close_are_those_built_from_the_windows(store: RunStore, name: str) -> None:
    file = store.path / "tables" / f"{name}.parquet"
    built = store.table(name)
    assert pq.read_table(file).equals(built)
    assert pq.read_metadata(file).row_group(0).column(0).compression == "ZSTD"
    for changed in file.parent.iterdir():
        changed.unlink()
    assert RunStore.open(store.path).table(name).equals(built)


def test_an_unknown_table_is_refused(store: RunStore) -> None:
    with pytest.raises(StoreError, match="no table 'pairs'; allowed are steps, categories, features, pathways"):
        store.table("pairs")


def test_steps_has_one_row_per_record(run: Run, store: RunStore) -> None:
    table = rows(store, "steps")
    assert [(row["first_step"], row["step"], row["status"], row["skipped"]) for row in table] == [
        (4, 4, "ok", 0), (5, 6, "ok", 1), (7, 8, "not_finite", 0),
        (9, 10, "ok", 0), (11, 12, "failed", 0), (13, 14, "ok", 0),
    ]  # fmt: skip
    assert [row["baseline"] for row in table] == [True] + 5 * [False]
    assert [row["trainer_loss"] for row in table] == [None] + [window.trainer["loss"] for window in run.windows]
    assert [row["error"] for row in table] == [None, None, "made up to fail", None, "made up to fail", None]
    good = run.windows[2]
    assert good.health is not None
    assert table[3]["r2_hedging"] == good.r2[1]
    assert table[3]["r2_loo_refusal"] == good.r2_loo[0]
    assert table[3]["delta_fvu_magnitude"] == good.health.delta_fvu_magnitude
    assert table[0]["delta_fvu"] is None


def test_categories_close_and_add_up(run: Run, store: RunStore) -> None:
    assert {row["step"] for row in rows(store, "categories")} == {4, 6, 10, 14}
    for number, behaviour in enumerate(store.policy.behaviours):
        for category in store.categories:
            table = rows(store, "categories", category=category, behaviour=behaviour)
            members = [probe.category == category for probe in run.start.probes]
            for row in table:
                snapshot = store.window(row["step"]).snapshot
                assert snapshot is not None
                assert row["mean"] == pytest.approx(snapshot.y[members, number].mean(), abs=1e-14)
            assert [table[0][name] for name in ROWS] == [None] * len(ROWS)
            assert table[0]["cumulative"] == 0.0
            for before, after in pairwise(table):
                assert sum(after[name] for name in ROWS) == pytest.approx(after["mean"] - before["mean"], abs=1e-13)
            assert table[-1]["cumulative"] == pytest.approx(table[-1]["mean"] - table[0]["mean"], abs=1e-15)


def test_features_carry_parts_floors_and_marks(run: Run, store: RunStore) -> None:
    noise, window = run.start.noise, run.windows[4]
    assert noise is not None
    assert window.coef is not None
    size = window.update_rms / noise.update_rms
    marks = set()
    for place, feature in enumerate(store.policy.features.tolist()):
        (row,) = rows(store, "features", step=14, feature=feature, behaviour="hedging")
        assert row["coef"] == window.coef[place, 1]
        above = []
        for part in PATHWAYS:
            floor = float(step_floor(noise.random[part], noise.rounding[part], size)[place, 1])
            assert row[part] == window.shift[part][place, 1]
            assert row[f"floor_{part}"] == floor
            above.append(abs(row[part]) > 2 * floor)
            assert row[f"above_floor_{part}"] is above[-1]
        assert row["above_floor"] is any(above)
        marks |= set(above)
    assert marks == {True, False}
    start = rows(store, "features", step=4, behaviour="hedging")
    assert all(row[name] is None for row in start for name in (*PATHWAYS, "above_floor", "floor_shift_y"))


def test_features_have_no_marks_where_noise_was_not_measured(tmp_path: Path) -> None:
    store = RunStore.open(write_run(tmp_path / "run", make_run(windows=1, noise=False)))
    names = ("above_floor", *(f"floor_{part}" for part in PATHWAYS), *(f"above_floor_{part}" for part in PATHWAYS))
    assert {row[name] for row in rows(store, "features") for name in names} == {None}


def test_pathways_are_norms_over_features(run: Run, store: RunStore) -> None:
    window = run.windows[2]
    assert window.coef is not None
    assert run.start.baseline.coef is not None
    for number, behaviour in enumerate(store.policy.behaviours):
        (row,) = rows(store, "pathways", step=10, behaviour=behaviour)
        parts = {part: window.shift[part][:, number] for part in PATHWAYS}
        for part, values in parts.items():
            assert row[part] == pytest.approx(float(np.sqrt((values**2).sum())), rel=1e-14)
            assert row[f"reliability_{part}"] == window.reliability[part]
        assert row["total"] == pytest.approx(float(np.linalg.norm(sum(parts.values()))), rel=1e-12)
        moved = window.coef[:, number] - run.start.baseline.coef[:, number]
        assert row["cumulative"] == pytest.approx(float(np.linalg.norm(moved)), rel=1e-14)
        assert row["first_order_error"] == window.first_order_error


def test_a_reliability_that_could_not_be_computed_is_null(tmp_path: Path) -> None:
    run = make_run(windows=1)
    window = replace(run.windows[0], reliability={"shift_y": None}, first_order_error=None)
    store = RunStore.open(write_run(tmp_path / "run", replace(run, windows=(window,))))
    (row,) = rows(store, "pathways", step=2)
    assert [row[name] for name in ("reliability_shift_y", "reliability_shift_x_gating", "first_order_error")] == [
        None
    ] * 3


def test_a_run_without_windows_has_tables_of_its_baseline(tmp_path: Path) -> None:
    store = RunStore.open(write_run(tmp_path / "run", make_run(windows=0)))
    sizes = {name: store.table(name).num_rows for name in ("steps", "categories", "features", "pathways")}
    assert sizes == {"steps": 1, "categories": 4, "features": 6, "pathways": 1}
    assert str(store.table("features").schema.field("shift_y").type) == "double"
