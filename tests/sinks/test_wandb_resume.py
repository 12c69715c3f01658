"""A run that goes on from a checkpoint goes on in W&B: in the same run where W&B can, else in one that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from smda_callbacks.records import WindowRecord
from smda_callbacks.report.verify import verify
from smda_callbacks.sinks.past import read_past
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_sink import WandbSink
from tests.helpers.runs import Run, make_run, resumed


@pytest.fixture(autouse=True)
def _leave_no_settings() -> Iterator[None]:
    """W&B reads the environment once."""
    yield
    wandb.teardown()


class FakeRun:
    """Stands in for a run of W&B's; ``offline`` as W&B says it."""

    project, entity, url = "p", "me", None

    def __init__(self, name: str, offline: bool) -> None:
        self.id, self.offline = name, offline
        self.rows: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.config = self.summary = self

    def update(self, values: dict[str, Any], **kwargs: Any) -> None:
        self.settings |= values

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    log_artifact = finish = define_metric

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of windows; tables and alerts come alone."""
        return [row for row in self.rows if len(row) > 2]


class Server:
    """Notes how runs are started, and what each was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, offline: bool) -> None:
        self.calls: list[dict[str, Any]] = []
        self.runs: list[FakeRun] = []
        self.offline = offline
        monkeypatch.setenv("WANDB_MODE", "offline" if offline else "online")
        monkeypatch.setattr(wandb, "run", None)
        monkeypatch.setattr(wandb, "init", self.init)
        monkeypatch.setattr(wandb, "login", lambda **kwargs: True)
        wandb.teardown()

    def init(self, **kwargs: Any) -> FakeRun:
        self.calls.append({name: value for name, value in kwargs.items() if name != "settings"})
        self.runs.append(FakeRun(kwargs.get("id") or f"run{len(self.runs)}", self.offline))
        return self.runs[-1]


def _part(path: Path, run: Run, windows: list[WindowRecord], *, at: int | None = None, **options: Any) -> None:
    """One process: it begins, or goes on at the step ``at``, writes windows and ends."""
    past = None if at is None else read_past(path, at)
    sinks = [
        StoreSink(path, resume=past is not None),
        WandbSink(logged_path=path / "logged.jsonl", past=past, tables_every=2, **options),
    ]
    for sink in sinks:
        sink.open(run.start if at is None else resumed(run, at))
    for window in windows:
        for sink in sinks:
            sink.write(window)
    for sink in sinks:
        sink.close(run.end)


@pytest.mark.parametrize("offline", [False, True])
def test_metrics_go_on_where_the_checkpoint_was(offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sums since the start go on too; what was sent of later steps is not in ``logged.jsonl`` any more."""
    run, server = make_run(windows=6), Server(monkeypatch, offline=offline)
    _part(tmp_path / "whole", run, run.windows)
    step = run.windows[2].step
    _part(tmp_path / "run", run, run.windows[:4])
    _part(tmp_path / "run", run, run.windows[3:], at=step)
    whole, first, second = server.runs
    assert whole.metrics == first.metrics[:4] + second.metrics
    assert server.calls[1] == {}
    if offline:
        assert server.calls[2] == {}
        assert second.id != first.id
        assert second.settings["smda_continues"] == {"id": first.id, "project": "p", "entity": "me", "url": None}
    else:
        assert server.calls[2] == {"id": first.id, "project": "p", "entity": "me", "resume": "allow"}
        assert "smda_continues" not in second.settings
    noted = json.loads((tmp_path / "run" / "wandb.json").read_bytes())["runs"]
    assert [(each["id"], each["from_step"]) for each in noted] == [(first.id, 0), (second.id, step)]
    checks = {check.name: check for check in verify(RunStore.open(tmp_path / "run"))}
    assert checks["logged"].ok, checks["logged"]
    assert checks["telescoping"].ok
    assert checks["contiguity"].ok


def test_a_run_that_somebody_else_opened_is_used_and_names_the_earlier_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, server = make_run(windows=4), Server(monkeypatch, offline=False)
    _part(tmp_path / "run", run, run.windows[:2])
    theirs = FakeRun("theirs", False)
    monkeypatch.setattr(wandb, "run", theirs)
    with caplog.at_level("INFO", logger="smda_callbacks"):
        _part(tmp_path / "run", run, run.windows[2:], at=run.windows[1].step)
    assert len(server.calls) == 1
    assert theirs.settings["smda_continues"]["id"] == server.runs[0].id
    assert f"WANDB_RUN_ID={server.runs[0].id} WANDB_RESUME=allow" in caplog.text
    assert [row["train/global_step"] for row in theirs.metrics] == [window.step for window in run.windows[2:]]


def test_a_users_own_run_id_goes_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, server = make_run(windows=4), Server(monkeypatch, offline=False)
    _part(tmp_path / "run", run, run.windows[:2])
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    _part(tmp_path / "run", run, run.windows[2:], at=run.windows[1].step)
    assert server.calls[1] == {}


def test_a_run_that_was_not_sent_before_is_sent_with_its_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, server = make_run(windows=4), Server(monkeypatch, offline=False)
    store = StoreSink(tmp_path / "run")
    store.open(run.start)
    for window in run.windows[:2]:
        store.write(window)
    _part(tmp_path / "run", run, run.windows[2:], at=run.windows[1].step)
    steps = [row["train/global_step"] for row in server.runs[0].metrics]
    assert steps == [run.start.baseline.step, *(window.step for window in run.windows[2:])]
