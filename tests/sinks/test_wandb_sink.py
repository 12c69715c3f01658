"""The W&B sink against real offline runs, read back with W&B's own reader, and against a W&B that fails."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb

from smda_callbacks.records import Alert, RunEnd, RunStart, WindowRecord
from smda_callbacks.sinks import files, wandb_media, wandb_run
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.metric_values import progress_of
from smda_callbacks.sinks.metrics import STEP, metric_names, rows_of_window, summary_of_run
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_sink import WandbSink
from smda_callbacks.sinks.wandb_worker import Worker
from tests.helpers.wandb_runs import Logged, all_bytes, log_records, offline_wandb, read_back
from tests.sinks.test_metrics import PROBES, make_start, make_window

FELL = Alert(4, "refusal_fell", "behaviour on 'fraud' fell", "fraud", -0.2, 0.15)
END = RunEnd(4, "finished", 1.0, 10.0, ({"category": "fraud", "mean": 0.5, "pulling": ((42, -0.5),)},))


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("wandb")
    with offline_wandb(root):
        yield root


def log_run(store: Path, **options: Any) -> Logged:
    """A run through three windows, one of which could not be read."""
    start = make_start()
    failed = WindowRecord(step=3, first_step=3, skipped=(3,), status="failed", seconds=0.5, error="broken")
    windows = [make_window(start, 2), failed, make_window(start, 4, alerts=(FELL,))]
    outside = Alert(4, "loss_not_finite", "the training loss is nan")
    return log_records(store, start, windows, [outside], END, **options)


@pytest.fixture(scope="module")
def logged(offline: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    return log_run(tmp_path_factory.mktemp("store") / "run", project="made-up-project", tables_every=2)


def expected_rows(logged: Logged) -> list[dict[str, float]]:
    start, done = logged.start, []
    rows = [rows_of_window(start.baseline, start, progress_of(start, [])) | {STEP: 0}]
    for window in logged.windows:
        done.append(window)
        rows.append(rows_of_window(window, start, progress_of(start, done)) | {STEP: window.step})
    return [*rows, {"smda/alerts/count": 1.0, STEP: 4}]


def test_every_row_arrives_as_it_was_sent_with_the_trainers_step(logged: Logged) -> None:
    assert logged.rows == expected_rows(logged)
    assert {name for row in logged.rows for name in row} == {*metric_names(logged.start), STEP}
    assert logged.sink.failures == logged.sink.dropped == 0


def test_metrics_are_defined_by_exact_name_over_the_step(logged: Logged) -> None:
    defined = {each["metric"]["name"]: each["metric"].get("step_metric") for each in logged.records
               if each["type"] == "metric"}  # fmt: skip
    assert defined.pop(STEP) is None
    assert set(defined.values()) == {STEP}
    assert list(defined) == [*metric_names(logged.start), *wandb_media.history_keys(logged.start)]
    in_history = {name.split(".")[0] for row in logged.history for name in row}
    assert in_history == {*defined, STEP}


def test_logged_jsonl_holds_what_w_and_b_holds(logged: Logged) -> None:
    noted = RunStore.open(logged.store).logged()
    assert [each["row"] for each in noted if "row" in each and len(each["row"]) != 2][: len(logged.windows) + 1] == (
        expected_rows(logged)[:-1]
    )
    for key in (wandb_media.CATEGORIES, wandb_media.FEATURES, wandb_media.PROBES, wandb_media.GAPS):
        sent = [each["row"][key] for each in noted if key in each.get("row", {})]
        assert [{"columns": each["columns"], "data": each["data"]} for each in logged.table(key)] == sent
    steps = [each["step"] for each in noted if wandb_media.FEATURES in each.get("row", {})]
    assert steps == [0, 2, 4]  # the start; after two windows, of which the second was not ok; the end
    (summary,) = (each["summary"] for each in noted if "summary" in each)
    assert summary == summary_of_run(logged.start, logged.windows)


def test_summary_configuration_and_project_are_in_the_run(logged: Logged) -> None:
    summary = logged.merged("summary")
    expected = summary_of_run(logged.start, logged.windows)
    assert {name: summary[name] for name in expected} == expected
    assert logged.merged("config")["smda"] == {"run_id": "made-up"}
    run = next(each["run"] for each in logged.records if each["type"] == "run")
    assert run["project"] == "made-up-project"


def test_an_own_run_is_finished_and_keeps_what_the_program_prints_to_itself(logged: Logged) -> None:
    assert any(each["type"] == "exit" for each in logged.records)
    assert not {"output", "output_raw"} & {each["type"] for each in logged.records}
    assert wandb.run is None


def test_tables_show_the_run(logged: Logged) -> None:
    features = logged.table(wandb_media.FEATURES)[-1]
    rows = [dict(zip(features["columns"], row, strict=True)) for row in features["data"]]
    assert [row["feature"] for row in rows] == ["42", "7"]  # the larger change first
    assert rows[0]["coef"] == 8.0
    assert rows[0]["run_shift_y"] == -4.0
    assert rows[0]["window_shift_y"] == -2.0
    assert rows[1]["promoted"] == " sorry"
    categories = logged.table(wandb_media.CATEGORIES)[-1]
    fraud = dict(zip(categories["columns"], categories["data"][0], strict=True))
    assert (fraud["category"], fraud["expected"], fraud["probes"]) == ("fraud", "refuse", 3)
    assert fraud["change"] == pytest.approx(-0.2)
    before, after = logged.table(wandb_media.GAPS)
    assert before["data"] == [["weapons", 0.5, True, "7: -0.25", None]]
    assert after["data"] == [["fraud", 0.5, "42: -0.5"]]


def test_alerts_and_artifacts_are_in_an_offline_run(logged: Logged) -> None:
    alerts = [each["alert"] for each in logged.records if each["type"] == "alert"]
    assert [(each["title"], each["text"]) for each in alerts] == [
        ("SMDA refusal_fell: fraud", "step 4: behaviour on 'fraud' fell"),
        ("SMDA loss_not_finite", "step 4: the training loss is nan"),
    ]
    assert logged.contents("smda-policy") == {"policy.json", "policy.safetensors"}
    contents = logged.contents("smda-store")
    assert {"manifest.json", "end.json", "steps/000000004.safetensors", "tables/features.parquet"} < contents
    assert files.PROBES not in contents


def test_no_probe_text_leaves_unless_it_is_allowed(logged: Logged, offline: Path) -> None:
    found = all_bytes(offline)  # the run and the staged artifacts, whatever their format
    assert b"made-up-project" in found
    assert b"probes_shown.jsonl" in found
    assert b"secret" not in found
    assert digest(0).encode() not in found


@pytest.mark.parametrize("log_text", ["hash", "full"])
def test_a_hash_or_the_text_is_sent_where_it_is_asked_for(
    log_text: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    logged = log_run(tmp_path_factory.mktemp("store") / "run", log_text=log_text)
    shown = logged.table(wandb_media.PROBES)[0]["data"][0][-1]
    assert shown == (digest(0) if log_text == "hash" else PROBES[0].text)
    found = all_bytes(tmp_path)
    assert (b"secret text zero" in found) == (log_text == "full")
    assert (digest(0).encode() in found) == (log_text == "hash")


def digest(number: int) -> str:
    return hashlib.sha256(PROBES[number].text.encode()).hexdigest()[:16]


def test_an_open_run_is_used_and_left_open(tmp_path: Path) -> None:
    run = wandb.init(project="somebody-elses")
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)  # as the Hugging Face trainer does
    start = make_start()
    sink = WandbSink("another-project", logged_path=tmp_path / "logged.jsonl", tables_every=1)
    sink.open(start)
    for step in range(2, 42, 2):
        sink.write(make_window(start, step))
        run.log({"train/loss": float(step), STEP: step})  # while the worker logs tables
    sink.close(replace(END, step=40))
    assert wandb.run is run
    run.log({"train/loss": 0.0, STEP: 41})
    run.finish()
    wandb.teardown()
    records = read_back(Path(run.dir).parent)
    rows = [each["history"]["item"] for each in records if each["type"] == "history"]
    noted = [each["row"] for each in files.read_rows(tmp_path / "logged.jsonl") if "row" in each]
    assert [row["_step"] for row in rows] == list(range(len(noted) + 21))  # none lost, none merged
    assert [row[STEP] for row in rows if "smda/cost/seconds" in row] == list(range(0, 42, 2))
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [*map(float, range(2, 42, 2)), 0.0]
    project = next(each["run"]["project"] for each in records if each["type"] == "run")
    assert project == "somebody-elses"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    ours = wandb_run.own_settings("project", "offline")
    assert ours == {"project": "project", "mode": "offline", **wandb_run.DEFAULTS}
    for name, value in (("PROJECT", "theirs"), ("MODE", "offline"), ("INIT_TIMEOUT", "77"), ("CONSOLE", "wrap")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert set(wandb_run.own_settings("project", "online")) == {"x_transaction_log_flush_interval", "finish_timeout"}
    assert wandb.Settings(**wandb_run.own_settings(None, None)).x_transaction_log_flush_interval == 2.0


class FakeRun:
    """Stands in for an online run of somebody else's; ``on_log`` is called with every row."""

    id, offline = "fake", False

    def __init__(self, on_log: Any = None, fail: Exception | None = None) -> None:
        self.on_log, self.fail = on_log or (lambda row: None), fail
        self.rows: list[dict[str, Any]] = []
        self.alerts: list[str] = []
        self.config = self.summary = self

    def update(self, *args: Any, **kwargs: Any) -> None:
        if self.fail:
            raise self.fail

    define_metric = log_artifact = finish = update

    def log(self, row: dict[str, Any]) -> None:
        self.update()
        self.on_log(row)
        self.rows.append(row)

    def alert(self, title: str, text: str, level: str) -> None:
        self.update()
        self.alerts.append(title)


def opened(monkeypatch: pytest.MonkeyPatch, run: Any, **options: Any) -> tuple[WandbSink, RunStart]:
    monkeypatch.setattr(wandb, "run", run)
    sink, start = WandbSink(**options), make_start()
    sink.open(start)
    return sink, start


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_failing_w_and_b_warns_once_and_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = FakeRun(fail=ConnectionResetError("wandb-core is gone"))
    sink, start = opened(monkeypatch, run, store_path=tmp_path, tables_every=1)
    for step in (2, 4):
        sink.write(make_window(start, step, alerts=(FELL,)))
    sink.alert(FELL)
    sink.close(END)
    assert sink.failures > 10
    (message,) = warnings_of(caplog)
    assert message.startswith("W&B: defining metrics failed (ConnectionResetError: wandb-core is gone)")


def test_a_run_that_cannot_start_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def init(**kwargs: Any) -> None:
        tries.append(kwargs)
        raise wandb.errors.CommError("no route to the server")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda **kwargs: True)
    sink, start = opened(monkeypatch, None)
    sink.write(make_window(start, 2))
    sink.write(make_window(start, 4))
    sink.close(END)
    assert len(tries) == sink.failures == 1
    (message,) = warnings_of(caplog)
    assert "starting the run failed (CommError: no route to the server)" in message


def test_a_full_disk_does_not_keep_rows_from_w_and_b(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = FakeRun()
    sink, start = opened(monkeypatch, run, logged_path=tmp_path / "no folder" / "logged.jsonl")
    sink.write(make_window(start, 2))
    sink.close(END)
    assert [row[STEP] for row in run.rows if "smda/cost/seconds" in row] == [0, 2]
    (message,) = warnings_of(caplog)
    assert "logged.jsonl failed (FileNotFoundError" in message


def test_a_server_that_hangs_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()

    def hang(row: dict[str, Any]) -> None:
        if threading.current_thread() is not threading.main_thread():
            gate.wait(30)

    run = FakeRun(hang)
    sink, start = opened(monkeypatch, run, tables_every=1, queue_size=3, finish_timeout=0.2)
    began = time.monotonic()
    for step in range(2, 22, 2):
        sink.write(make_window(start, step))
    assert sink.dropped > 20
    sink.close(END)
    assert time.monotonic() - began < 2.0
    assert len([row for row in run.rows if "smda/cost/seconds" in row]) == 11
    (message,) = warnings_of(caplog)
    assert "closing failed (TimeoutError: not everything was sent within 0.2 s" in message
    gate.set()
    assert sink._channel._worker.close(5.0)


def test_online_alerts_go_out_only_after_the_server_has_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr("smda_callbacks.sinks.wandb_run.monotonic", lambda: clock[0])
    delays = {"now": 0.1}

    def answer(row: dict[str, Any]) -> None:
        if wandb_media.CATEGORIES in row:
            clock[0] += delays["now"]

    run = FakeRun(answer)
    sink, start = opened(monkeypatch, run)
    sink.write(make_window(start, 2, alerts=(FELL,)))
    assert _until(lambda: run.alerts == ["SMDA refusal_fell: fraud"])
    delays["now"] = 19.0
    sink.write(make_window(start, 4, alerts=(replace(FELL, category="weapons"),)))
    assert _until(lambda: sink.failures == 1)
    assert "the W&B server took 19 s to answer, so the alert was not sent" in warnings_of(caplog)[0]
    sink.close(END)
    assert run.alerts == ["SMDA refusal_fell: fraud"]
    assert [row["smda/alerts/count"] for row in run.rows if "smda/alerts/count" in row] == [0.0, 1.0, 1.0]


def test_alerts_can_be_kept_out_of_w_and_b(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    sink, start = opened(monkeypatch, run, alerts=False)
    sink.write(make_window(start, 2, alerts=(FELL,)))
    sink.close(END)
    assert run.alerts == []
    assert [row["smda/alerts/count"] for row in run.rows if "smda/alerts/count" in row] == [0.0, 1.0]


def _until(condition: Any, seconds: float = 5.0) -> bool:
    for _ in range(int(seconds * 100)):
        if condition():
            return True
        threading.Event().wait(0.01)
    return False


def test_a_sink_takes_one_run_in_order() -> None:
    sink, start = WandbSink(), make_start()
    with pytest.raises(ValueError, match=r"this WandbSink is not open.*Call open"):
        sink.write(make_window(start))
    sink.close(END)
    sink.open(start)
    with pytest.raises(ValueError, match=r"opened before.*Make a new one"):
        sink.open(start)
    sink.close(END)
    sink.close(END)
    with pytest.raises(ValueError, match=r"this WandbSink is closed"):
        sink.alert(FELL)
    assert wandb.run is None  # nothing was written, so nothing was started
    assert isinstance(sink, Sink)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dry"}, r"mode is 'dry'; allowed are online"),
        ({"log_text": "some"}, r"log_text is 'some'; allowed are none, hash, full"),
        ({"tables_every": 0}, r"tables_every is 0.*at least 1"),
        ({"finish_timeout": -1.0}, r"finish_timeout -1.0.*at least 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WandbSink(**options)


def test_the_worker_keeps_order_drops_what_is_too_much_and_survives_errors() -> None:
    done: list[int] = []
    errors: list[str] = []
    gate, busy = threading.Event(), threading.Event()
    worker = Worker(lambda what, error: errors.append(f"{what}: {error}"), size=2)
    assert worker.submit("start", busy.set)
    assert worker.submit("hold", lambda: gate.wait(10))
    assert busy.wait(5)
    assert _until(lambda: worker._queue.empty())
    assert worker.submit("break", lambda: 1 / 0)
    assert worker.submit("one", lambda: done.append(1))
    assert not worker.submit("two", lambda: done.append(2))
    assert worker.submit("three", lambda: done.append(3), always=True)
    gate.set()
    assert worker.close(5.0)
    assert done == [1, 3]
    assert errors == ["break: division by zero"]
    assert worker.dropped == 1
    assert Worker(lambda what, error: None).close(0.0)
