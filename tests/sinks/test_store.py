"""The store survives kills and faults, refuses what it cannot record, and resumes the run that it holds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from smda_callbacks.records import SCHEMA_VERSION
from smda_callbacks.sinks.files import STEPS, StoreError, append_row, step_file
from smda_callbacks.sinks.store import StoreSink, check_writable
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.endless import numbered_alert, numbered_window
from tests.helpers.equal import assert_same
from tests.helpers.runs import make_run, resumed, write_run

ROOT = Path(__file__).parents[2]
KILLS = 12


def edit_manifest(path: Path, **changes: Any) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# ---------------------------------------------------------------------------------------------------------- kills


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a signal of POSIX systems")
def test_a_killed_writer_loses_at_most_the_step_in_flight(tmp_path: Path) -> None:
    draw = random.Random(0)
    folders = [tmp_path / f"run{number}" for number in range(KILLS)]
    command = [sys.executable, "-m", "tests.helpers.endless"]
    writers = [subprocess.Popen([*command, str(each)], cwd=ROOT, stdout=subprocess.PIPE) for each in folders]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open\n"
        time.sleep(draw.uniform(0, 0.05))
        writer.kill()
        writer.communicate(timeout=30)
    reached = [check_killed(folder) for folder in folders]
    assert max(reached) > 3  # some writers got somewhere


def check_killed(folder: Path) -> int:
    """Every listed window is complete and as written, none is missing; the last step of the store."""
    store = RunStore.open(folder)
    windows, alerts = store.windows(), store.alerts()
    assert [window.step for window in windows] == list(range(1, len(windows) + 1))
    for window in windows:
        assert_same(window, numbered_window(window.step))
    assert len(windows) <= len(alerts) <= len(windows) + 1  # the alert of a step goes before its window
    assert alerts == [numbered_alert(alert.step) for alert in alerts]
    assert store.end is None
    again = StoreSink(folder, resume=True)
    again.open(resumed(make_run(windows=0), len(windows)))
    assert not list(folder.rglob("*.part"))
    again.write(numbered_window(len(windows) + 1))
    assert_same(RunStore.open(folder).windows()[-1], numbered_window(len(windows) + 1))
    return len(windows)


def test_a_kill_before_training_leaves_a_half_written_store_or_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = make_run(windows=0), os.fsync
    whole = 0
    for survived in range(9):
        calls = iter([real] * survived)

        def fsync(descriptor: int, calls: Any = calls) -> None:
            step = next(calls, None)
            if step is None:
                raise OSError(28, "No space left on device")
            step(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        folder = tmp_path / str(survived)
        sink = StoreSink(folder)
        try:
            sink.open(run.start)
            whole += 1
        except OSError:
            sink.close(run.end)
            with pytest.raises(StoreError, match=r"half-written.*delete the folder"):
                RunStore.open(folder)
            with pytest.raises(StoreError, match=r"half-written.*delete the folder"):
                check_writable(folder)
            continue
        assert_same(RunStore.open(folder).start.baseline, run.start.baseline)
    assert 0 < whole < 9


def test_a_fault_while_writing_a_window_costs_that_window_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(windows=3)
    sink = StoreSink(tmp_path / "run")
    sink.open(run.start)
    sink.write(run.windows[0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            sink.write(run.windows[1])
    assert [window.step for window in RunStore.open(tmp_path / "run").windows()] == [2]
    sink.close(run.end)
    store = RunStore.open(tmp_path / "run")
    assert_same(store.windows(), [run.windows[0]])
    assert_same(store.end, run.end)
    assert store.table("steps")["step"].to_pylist() == [0, 2]


# -------------------------------------------------------------------------------------------------- what is written


def test_files_are_the_documented_ones_and_closing_twice_changes_nothing(tmp_path: Path) -> None:
    run = make_run()
    sink = StoreSink(tmp_path / "run")
    sink.open(run.start)
    for window in run.windows:
        sink.write(window)
    sink.alert(run.alerts[0])
    sink.close(run.end)
    first = content(tmp_path / "run")
    sink.close(replace(run.end, status="interrupted"))
    assert content(tmp_path / "run") == first
    tables = {f"tables/{name}.parquet" for name in ("steps", "categories", "features", "pathways")}
    steps = {f"steps/{step:09d}.safetensors" for step in (0, 2, 4, 6, 8)}
    head = {"manifest.json", "probes.jsonl", "policy.json", "policy.safetensors", "noise.safetensors", "gaps.json"}
    assert set(first) == head | steps | tables | {"alerts.jsonl", "end.json"}
    assert next(iter(json.loads(first["manifest.json"]))) == "schema_version"


def test_numbers_that_are_not_finite_are_strict_json(tmp_path: Path) -> None:
    run = make_run(windows=1)
    odd = {"loss": float("nan"), "grad_norm": float("inf"), "other": float("-inf"), "numpy": np.float64("nan")}
    window = replace(run.windows[0], trainer=odd, reliability={"shift_y": None}, first_order_error=float("inf"))
    manifest = {**run.start.manifest, "config": {"clip": float("inf")}}
    sink = StoreSink(tmp_path / "run")
    sink.open(replace(run.start, manifest=manifest))
    sink.write(window)
    sink.close(run.end)
    texts = [data.decode("latin-1") for data in content(tmp_path / "run").values()]
    assert not any(f": {bare}" in text for text in texts for bare in ("NaN", "Infinity", "-Infinity"))
    store = RunStore.open(tmp_path / "run")
    assert_same(store.window(2).trainer, odd | {"numpy": float("nan")})
    assert store.window(2).first_order_error == float("inf")
    assert store.window(2).reliability == {"shift_y": None}
    assert store.manifest["config"] == {"clip": "Infinity"}  # free-form: stays a word


def test_gates_and_activations_are_narrow_only_where_nothing_is_lost(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    run = make_run(windows=1)
    snapshot = run.windows[0].snapshot
    assert snapshot is not None
    wide = replace(snapshot, pre=snapshot.pre + 1e-12, gate=snapshot.gate * 0.5)
    windows = (run.windows[0], replace(run.windows[0], step=3, snapshot=replace(wide, step=3)))
    path = write_run(tmp_path / "run", replace(run, windows=windows))
    narrow, full = (load_file(path / STEPS / f"{step:09d}.safetensors") for step in (2, 3))
    assert (narrow["snapshot/gate"].dtype.name, narrow["snapshot/pre"].dtype.name) == ("uint8", "float32")
    assert (full["snapshot/gate"].dtype.name, full["snapshot/pre"].dtype.name) == ("float64", "float64")
    assert narrow["coef"].dtype == narrow["snapshot/y"].dtype == np.float64
    assert_same(RunStore.open(path).windows(), list(windows))


def test_arrays_in_any_memory_order_come_back_right(tmp_path: Path) -> None:
    run = make_run(windows=1)
    window = run.windows[0]
    assert window.snapshot is not None
    assert window.coef is not None
    turned = replace(window, snapshot=replace(window.snapshot, pre=np.asfortranarray(window.snapshot.pre)))
    strided = replace(turned, coef=np.repeat(window.coef, 2, axis=0)[::2])
    path = write_run(tmp_path / "run", replace(run, windows=(strided,)))
    assert_same(RunStore.open(path).windows(), [window])


def test_records_go_in_between_open_and_close_and_forward_only(tmp_path: Path) -> None:
    run = make_run(windows=2)
    sink = StoreSink(tmp_path / "run")
    with pytest.raises(StoreError, match=r"not open.*Call open"):
        sink.write(run.windows[0])
    sink.open(run.start)
    sink.write(run.windows[1])
    for again in run.windows:
        with pytest.raises(StoreError, match=r"ends at step \d.*reaches step 4.*once and in order"):
            sink.write(again)
    sink.close(run.end)
    with pytest.raises(StoreError, match="closed"):
        sink.alert(run.alerts[0])
    with pytest.raises(StoreError, match=r"opened before.*Make a new one"):
        sink.open(run.start)


# ------------------------------------------------------------------------------------------------------- refusals


def refused(path: Path, words: str, *, resume: bool = False, run: Any = None) -> None:
    """Opening raises with ``words`` and changes nothing on disk."""
    before = content(path) if path.is_dir() else None
    with pytest.raises(StoreError, match=words):
        StoreSink(path, resume=resume).open((run or make_run(windows=0)).start)
    assert (content(path) if path.is_dir() else None) == before


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", deny)
    with pytest.raises(StoreError, match=r"cannot be written: Permission denied at .*Choose a folder"):
        check_writable(tmp_path / "a" / "b")
    refused(tmp_path / "a" / "b", "cannot be written")
    assert not (tmp_path / "a").exists()


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file.*Choose another path")
    refused(tmp_path / "file" / "run", "cannot be written: Not a directory")


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for resume in (False, True):
        refused(
            tmp_path / "run", r"holds notes\.txt, which is no run store; allowed is a missing or empty", resume=resume
        )


def test_an_empty_folder_is_taken_and_checking_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "there")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert_same(RunStore.open(write_run(tmp_path, make_run(windows=1))).windows(), list(make_run(windows=1).windows))


@pytest.mark.parametrize("resume", [False, True])
def test_a_half_written_store_is_refused(tmp_path: Path, resume: bool) -> None:
    path = write_run(tmp_path / "run", make_run(windows=0), close=False)
    (path / "manifest.json").rename(path / "manifest.json.part")
    refused(path, "half-written.*no manifest.json.*No step was measured: delete", resume=resume)


def test_an_existing_store_is_not_overwritten(tmp_path: Path) -> None:
    refused(write_run(tmp_path / "run", make_run()), "already holds a run.*resume=True")


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    refused(tmp_path / "run", "there is no run store at .*resume=False", resume=True)
    (tmp_path / "run").mkdir()
    refused(tmp_path / "run", "is empty; there is no run to resume.*resume=False", resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("version", "words"),
    [
        (SCHEMA_VERSION + 1, "newer than this library's.*Upgrade smda-callbacks"),
        (SCHEMA_VERSION - 1, r"older than this library's.*Read it with smda-callbacks 0\.1\.0"),
    ],
)
def test_another_schema_version_is_refused(tmp_path: Path, version: int, words: str, resume: bool) -> None:
    path = write_run(tmp_path / "run", make_run(windows=1))
    edit_manifest(path, schema_version=version)
    refused(path, f"schema version {version}, {words}", resume=resume)
    with pytest.raises(StoreError, match=words):
        RunStore.open(path)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_run(windows=0, run_id="another"), "run_id 'made-up' there and 'another' here"),
        (make_run(windows=0, probes_per_category=8), "probe_hash"),
        (make_run(windows=0, lam=4.0), "policy_hash"),
    ],
)
def test_the_store_of_another_run_is_not_resumed(tmp_path: Path, other: Any, words: str) -> None:
    path = write_run(tmp_path / "run", make_run())
    refused(path, f"store of another run: .*{words}.*or start a new run", resume=True, run=other)


@pytest.mark.parametrize("part", ["model", "sae"])
def test_the_store_of_another_model_is_not_resumed(tmp_path: Path, part: str) -> None:
    run = make_run()
    path = write_run(tmp_path / "run", run)
    manifest = {**run.start.manifest, part: {**run.start.manifest[part], "hash": "other"}}
    other = replace(run, start=replace(run.start, manifest=manifest))
    refused(path, rf"{part}\.hash '\w+' there and 'other' here", resume=True, run=other)


def test_a_resume_from_before_the_store_began_is_refused(tmp_path: Path) -> None:
    run = make_run(start_step=10)
    path = write_run(tmp_path / "run", run)
    with pytest.raises(StoreError, match=r"resumes at step 4, but .* starts at step 10"):
        StoreSink(path, resume=True).open(resumed(run, 4))


@pytest.mark.parametrize("name", ["probe_hash", "policy_hash"])
def test_a_manifest_with_a_wrong_hash_is_refused(tmp_path: Path, name: str) -> None:
    run = make_run(windows=0)
    wrong = replace(run.start, manifest={**run.start.manifest, name: "0" * 64})
    refused(tmp_path / "run", rf"the manifest says {name} '0+'.*records\.{name}", run=replace(run, start=wrong))


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    run = make_run(windows=0)
    start = replace(run.start, manifest={**run.start.manifest, "config": {"path": tmp_path}})
    with pytest.raises(TypeError, match=r"0/config/path is a PosixPath.*allowed are"):
        StoreSink(tmp_path / "run").open(start)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------- resume


def test_a_resumed_store_is_that_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    run = make_run(windows=5)  # windows end at 2, 4, 6, 8, 10
    path = write_run(tmp_path / "run", replace(run, windows=run.windows[:4]))
    for step in (2, 6):
        append_row(path / "logged.jsonl", {"step": step, "row": {"value": step}})
    sink = StoreSink(path, resume=True)
    sink.open(resumed(run, 5))
    store = RunStore.open(path)
    assert [window.step for window in store.windows()] == [2, 4]
    assert store.end is None
    assert not list((path / "tables").iterdir())
    assert store.logged() == [{"step": 2, "row": {"value": 2}}]
    assert [alert.step for alert in store.alerts()] == [
        4
    ]  # that of step 8 outside a window is set aside, and the window's
    assert_same(store.last_ok(5), run.windows[1])
    assert_same(store.last_ok(1), run.start.baseline)
    for window in run.windows[2:]:
        sink.write(window)
    sink.alert(run.alerts[0])
    sink.close(run.end)
    plain = RunStore.open(write_run(tmp_path / "plain", run))
    again = RunStore.open(path)
    assert_same(
        (again.start, again.windows(), again.alerts(), again.end),
        (plain.start, plain.windows(), plain.alerts(), plain.end),
    )


def test_what_a_resume_sets_aside_is_kept_under_its_own_name(tmp_path: Path) -> None:
    run = make_run(windows=4)
    path = write_run(tmp_path / "run", run)
    before = content(path)
    StoreSink(path, resume=True).open(resumed(run, 4))
    after = content(path)
    assert after["steps/superseded-1-000000006.safetensors"] == before["steps/000000006.safetensors"]
    assert after["steps/superseded-1-000000008.safetensors"] == before["steps/000000008.safetensors"]
    assert after["superseded-1-alerts.jsonl"] == before["alerts.jsonl"]
    assert after["superseded-1-end.json"] == before["end.json"]
    kept = {"manifest.json", "probes.jsonl", "policy.json", "gaps.json", "steps/000000000.safetensors"}
    assert all(after[name] == before[name] for name in kept)
    second = StoreSink(path, resume=True)
    second.open(resumed(run, 2))
    assert content(path)["steps/superseded-2-000000004.safetensors"] == before["steps/000000004.safetensors"]
    assert [window.step for window in RunStore.open(path).windows()] == [2]


def test_a_resume_cut_short_leaves_no_hole_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(windows=5)
    path, calls, rename = write_run(tmp_path / "run", run), [], Path.rename

    def once(self: Path, target: Path) -> Path:
        calls.append(self.name)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", once)
        with pytest.raises(OSError, match="Input/output"):
            StoreSink(path, resume=True).open(resumed(run, 2))
    assert [window.step for window in RunStore.open(path).windows()] == [2, 4, 6, 8]
    StoreSink(path, resume=True).open(resumed(run, 2))
    assert [window.step for window in RunStore.open(path).windows()] == [2]


def test_a_torn_last_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    run = make_run(windows=1)
    path = write_run(tmp_path / "run", run, close=False)
    whole = (path / "alerts.jsonl").read_bytes()
    (path / "alerts.jsonl").write_bytes(whole + b'{"step": 7, "mess')
    assert RunStore.open(path).alerts() == list(run.alerts)
    sink = StoreSink(path, resume=True)
    sink.open(resumed(run, 2))
    sink.alert(numbered_alert(9))
    assert RunStore.open(path).alerts() == [*run.alerts, numbered_alert(9)]


def test_a_store_from_before_a_field_was_there_is_read(tmp_path: Path) -> None:
    """Windows of older stores have no reason why they are not attributed."""
    run = make_run(windows=2, pairs=3, unattributed=[1])
    path = step_file(write_run(tmp_path / "run", run), run.windows[1].step)
    with safe_open(path, "numpy") as old:
        head = dict(old.metadata())
        arrays = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118 - no mapping
    record = json.loads(head["record"])
    assert record.pop("unattributed") is None
    path.write_bytes(save(arrays, {**head, "record": json.dumps(record)}))
    assert RunStore.open(tmp_path / "run").windows()[1].unattributed is None
