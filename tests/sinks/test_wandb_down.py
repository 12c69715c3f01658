"""W&B that is absent, dies, halts, deletes the run or comes back: what it costs, and that nothing is lost or doubled.

Against a stand-in for its server, with W&B's real client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from smda_callbacks.sinks import files, wandb_media
from smda_callbacks.sinks.metrics import ALERTS, STEP, UNREADABLE, rows_of_window, summary_of_run
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_sent import SyncError
from smda_callbacks.sinks.wandb_server import let_go
from smda_callbacks.sinks.wandb_sink import WandbSink
from smda_callbacks.sinks.wandb_sync import sync_run
from tests.helpers.runs import Run, make_run, write_run
from tests.helpers.wandb_runs import run_of
from tests.helpers.wandb_server import Server, wandb_server

#: Seconds that a dead server may cost a run, all in all.
BOUND = 10.0
NAME = "smda/smda-made-up"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with wandb_server(tmp_path) as found:
        yield found


class Training:
    """A run through a store and W&B; ``waited``: seconds that the sink kept it."""

    def __init__(self, path: Path, run: Run) -> None:
        self.run, self.waited = run, 0.0
        self.store = StoreSink(path)
        self.sink = WandbSink(store_path=path, tables_every=2)
        self.steps = 0
        self.store.open(run.start)
        self._timed(self.sink.open, run.start)

    def go(self, windows: int) -> None:
        for window in self.run.windows[self.steps : self.steps + windows]:
            self.store.write(window)
            self._timed(self.sink.write, window)
        self.steps += windows

    def end(self) -> None:
        for alert in self.run.alerts:
            self.store.alert(alert)
            self._timed(self.sink.alert, alert)
        self.store.close(self.run.end)
        self._timed(self.sink.close, self.run.end)

    def _timed(self, call: Callable[[Any], None], given: Any) -> None:
        began = time.monotonic()
        call(given)
        self.waited += time.monotonic() - began


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row[STEP] for row in rows if UNREADABLE in row]


def complete(server: Server, run: Run, name: str = NAME) -> None:
    """The server has every row once, with the right numbers, the alerts, the summary, the last tables, the store."""
    rows = server.rows(name)
    steps = [run.start.baseline.step, *(window.step for window in run.windows)]
    assert sorted(steps_of(rows)) == steps
    by_step = {row[STEP]: row for row in rows if UNREADABLE in row}
    for window in run.windows:
        expected = rows_of_window(window, run.start)
        assert {key: by_step[window.step][key] for key in expected} == pytest.approx(expected, rel=1e-12)
    outside = Counter(row[STEP] for row in rows if ALERTS in row and UNREADABLE not in row)
    assert outside == Counter(alert.step for alert in run.alerts)
    summary = server.books.runs[name]["summary"]
    expected = summary_of_run(run.start, run.windows)
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    for key in wandb_media.history_keys(run.start):
        sent = [row[STEP] for row in rows if key in row]
        assert run.end.step in sent
        assert key == wandb_media.CATEGORIES or len(sent) == len(set(sent))  # that one goes before every alert
    kept = Counter(each["type"] for each in server.books.artifacts if each["state"] == "COMMITTED")
    assert (kept["smda-policy"], kept["smda-store"]) == (1, 1)


@pytest.mark.slow
def test_what_is_logged_before_the_run_is_open_arrives_in_order(server: Server, tmp_path: Path) -> None:
    training = Training(tmp_path / "run", make_run(windows=5))
    training.go(5)
    assert training.waited < 1.0  # nobody waited for the start of the run
    training.end()
    assert training.sink.failures == training.sink.dropped == 0
    assert steps_of(server.rows(NAME)) == [0, 2, 4, 6, 8, 10]
    complete(server, training.run)
    assert server.books.runs[NAME]["state"] == "finished"
    again = sync_run(RunStore.open(tmp_path / "run"))  # there is nothing to send
    assert (again.anything, again.rows, again.of) == (False, 0, 6)


def test_a_server_that_was_never_there_and_comes_back(server: Server, tmp_path: Path) -> None:
    server.kill()
    training = Training(tmp_path / "run", make_run(windows=2))
    training.go(2)
    training.end()
    assert training.waited < BOUND
    assert training.sink.failures == 1
    assert wandb.run is None
    assert files.read_rows(tmp_path / "run" / "logged.jsonl") == []
    assert len(RunStore.open(tmp_path / "run").windows()) == 2
    server.start()
    store = RunStore.open(tmp_path / "run")
    first = sync_run(store)
    assert (first.id, first.rows, first.of, first.anything) == ("smda-made-up", 3, 3, True)
    complete(server, training.run)
    before = (server.rows(NAME), len(server.books.artifacts))
    second = sync_run(store)
    assert (second.rows, second.anything) == (0, False)
    assert (server.rows(NAME), len(server.books.artifacts)) == before
    assert server.books.runs[NAME]["config"]["smda"]["value"]["run_id"] == "made-up"


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["kill", "halt"])
def test_a_server_that_dies_in_the_middle(dies: str, server: Server, tmp_path: Path) -> None:
    training = Training(tmp_path / "run", make_run(windows=6))
    training.go(2)
    run_of(training.sink)
    server.wait_for(lambda books: bool(steps_of(server.rows(NAME))))
    getattr(server, dies)()
    training.go(4)
    training.end()
    assert training.waited < BOUND
    assert training.sink._channel.let_go
    assert wandb.run is None
    server.kill()
    server.start()
    there = set(steps_of(server.rows(NAME)))
    assert 0 < len(there) < 7
    found = sync_run(RunStore.open(tmp_path / "run"))
    assert found.rows == 7 - len(there)
    complete(server, training.run)


@pytest.mark.slow
def test_a_run_that_was_deleted_costs_nothing_and_can_be_sent_under_another_id(server: Server, tmp_path: Path) -> None:
    training = Training(tmp_path / "run", make_run(windows=4))
    training.go(1)
    run_of(training.sink)
    server.wait_for(lambda books: bool(steps_of(server.rows(NAME))))
    server.has_trouble("deleted")
    training.go(3)
    training.end()
    assert training.waited < BOUND
    let_go(training.sink.run)  # as the end of the process does, within a minute
    state = json.loads((server.folder / "state.json").read_bytes())
    (server.folder / "state.json").write_text(json.dumps({**state, "runs": {}, "artifacts": []}))
    server.kill()
    server.start()
    store = RunStore.open(tmp_path / "run")
    with pytest.raises(SyncError, match=r"deleted.*--id smda-made-up-2"):
        sync_run(store, patience=40.0)
    server.has_trouble("")
    assert sync_run(store, run_id="smda-made-up-2").rows == 5
    complete(server, training.run, "smda/smda-made-up-2")


def test_the_process_ends_though_the_server_is_gone(server: Server, tmp_path: Path) -> None:
    """W&B alone would wait for it for days. ``close`` is never called here: training broke off."""
    script = """
import os, signal, sys, time
from pathlib import Path
from smda_callbacks.sinks.wandb_sink import WandbSink
from tests.helpers.runs import make_run
from tests.helpers.wandb_runs import run_of
run = make_run(windows=3)
sink = WandbSink(tables_every=1)
sink.open(run.start)
sink.write(run.windows[0])
run_of(sink).alert("a", "b")
os.kill(int(sys.argv[1]), signal.SIGKILL)
sink.write(run.windows[1])
print(time.monotonic(), flush=True)
raise SystemExit(3)
"""
    assert server._process is not None
    done = subprocess.run(
        [sys.executable, "-c", script, str(server._process.pid)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    took = time.monotonic() - float(done.stdout.split()[-1])
    assert done.returncode == 3, done.stderr
    assert took < BOUND


def test_an_offline_copy_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()
    run = make_run(windows=3)
    path = write_run(tmp_path / "run", run, close=False)
    first = sync_run(RunStore.open(path))
    assert first.folder is not None
    assert first.rows == 4
    second = sync_run(RunStore.open(path))
    assert (second.folder, second.rows, second.anything) == (first.folder, 0, False)
    StoreSink(path, resume=True)
    files.write_json(path / "end.json", json.loads(json.dumps({"step": 6, "status": "finished", "seconds": 1.0,
                     "train_seconds": 1.0, "gaps": []})))  # fmt: skip
    with pytest.raises(SyncError, match=r"has grown since.*wandb sync"):
        sync_run(RunStore.open(path))


def test_a_server_that_cannot_be_asked_is_told_of(server: Server, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_run(windows=2))
    server.has_trouble("error")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smda_callbacks.sinks.wandb_sent.TIMEOUT", 2)
        with pytest.raises(SyncError, match=r"cannot be asked.*Nothing was sent.*--mode offline"):
            sync_run(RunStore.open(path))
    assert not (path / "wandb.json").exists()
