"""Metrics to other trackers: TensorBoard read back with its own reader, stand-ins for the clients of the others."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smda_callbacks.config.build import build_sinks
from smda_callbacks.config.load import ConfigError, check_config
from smda_callbacks.sinks import trackers
from smda_callbacks.sinks.metric_values import Progress
from smda_callbacks.sinks.metrics import STEP, rows_of_window, summary_of_run
from smda_callbacks.sinks.past import read_past
from smda_callbacks.sinks.trackers import TrackerSink
from tests.helpers.runs import Run, make_run, write_run

Rows = dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(windows=4, pairs=5)


class Stand:
    """MLflow and trackio: what they were sent, and which runs were started and ended."""

    is_mlflow = False

    def __init__(self, *, is_open: bool = False) -> None:
        self.rows: Rows = defaultdict(dict)
        self.alerts: list[str] = []
        self.events: list[str] = []
        self.is_open = is_open
        self.broken = False

    info = SimpleNamespace(run_id="r1")  # as MLflow's

    def log(self, row: dict[str, float], step: int, **options: Any) -> None:
        if self.broken:
            raise ConnectionError("no server")
        assert options.get("run_id", "r1") == "r1"
        # Without the id MLflow opens a new run, once the trainer has ended its own.
        assert self.is_mlflow == ("run_id" in options)
        self.rows[step] |= row

    def start(self, *args: Any, **kwargs: Any) -> Stand:
        self.events.append("start")
        return self

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append(text)

    def finish(self) -> None:
        self.events.append("finish")

    def log_metrics(self, row: dict[str, float], **options: Any) -> None:
        self.is_mlflow = True
        self.log(row, **options)

    def mlflow(self) -> dict[str, Any]:
        return {
            "active_run": lambda: self if self.is_open else None,
            "start_run": self.start,
            "log_metrics": self.log_metrics,
            "end_run": self.finish,
            "flush_async_logging": lambda: None,
        }

    def trackio(self) -> dict[str, Any]:
        current = SimpleNamespace(get=lambda: self if self.is_open else None)
        return {
            "context_vars": SimpleNamespace(current_run=current),
            "init": self.start,
            "AlertLevel": SimpleNamespace(WARN="warn"),
        }


def install(monkeypatch: pytest.MonkeyPatch, stand: Stand) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    parts = {"mlflow": stand.mlflow(), "trackio": stand.trackio()}
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def feed(sink: TrackerSink, run: Run) -> None:
    sink.open(run.start)
    for window in run.windows:
        sink.write(window)
    for alert in run.alerts:
        sink.alert(alert)
    sink.close(run.end)
    sink.close(run.end)


def expected_rows(run: Run) -> Rows:
    rows: Rows = defaultdict(dict)
    done = Progress.at(run.start)
    rows[run.start.baseline.step] |= rows_of_window(run.start.baseline, run.start, done)
    for window in run.windows:
        done = done.after(window)
        rows[window.step] |= rows_of_window(window, run.start, done)
    rows[run.end.step] |= summary_of_run(run.start, run.windows)
    return rows


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_tracker_gets_the_rows_that_wandb_gets(
    name: Any, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand = Stand()
    install(monkeypatch, stand)
    feed(TrackerSink(name, tmp_path), run)
    rows = {step: {key: row[key] for key in row if key != STEP} for step, row in stand.rows.items()}
    assert rows == expected_rows(run)
    assert stand.events == ["start", "finish"]
    alerts = [alert for window in run.windows for alert in window.alerts] + list(run.alerts)
    wanted = [f"step {alert.step}: {alert.message}" for alert in alerts]
    assert stand.alerts == ([] if name == "mlflow" else wanted)  # MLflow has none


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_the_trainers_own_run_is_used_and_left_open(
    name: Any, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand = Stand(is_open=True)
    install(monkeypatch, stand)
    feed(TrackerSink(name, tmp_path), run)
    assert stand.events == []
    assert set(stand.rows) == set(expected_rows(run))


def test_a_tracker_that_fails_is_told_of_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand = Stand()
    stand.broken = True
    install(monkeypatch, stand)
    sink = TrackerSink("mlflow", tmp_path)
    feed(sink, run)
    assert sink.failures == len(run.windows) + 2  # the baseline and the summary too
    assert [record.message for record in caplog.records if "no server" in record.message] == [
        "mlflow failed (ConnectionError: no server). Training goes on and the run store has everything; further "
        "failures are counted in silence."
    ]


def test_a_resumed_run_goes_on_after_its_past(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand = Stand()
    install(monkeypatch, stand)
    past = read_past(write_run(tmp_path / "store", run), run.windows[1].step)
    sink = TrackerSink("trackio", tmp_path, past=past)
    sink.open(run.start)
    for window in run.windows[2:]:
        sink.write(window)
    sink.close(run.end)
    wanted = expected_rows(run)
    steps = [window.step for window in run.windows[2:]]
    assert sorted(stand.rows) == steps
    for step in steps:
        assert {key: value for key, value in stand.rows[step].items() if key != STEP} == pytest.approx(wanted[step])


def test_what_is_not_installed_is_refused_before_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mlflow is not installed.*pip install mlflow"):
        TrackerSink("mlflow", tmp_path).open(run.start)
    with pytest.raises(ValueError, match=r"no tracker 'aim'.*tensorboard, mlflow, trackio"):
        TrackerSink("aim", tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trackers_key", "report_to", "wanted"),
    [
        ("auto", [], []),
        ("auto", ["tensorboard", "codecarbon"], ["tensorboard"]),
        (["trackio", "mlflow"], ["tensorboard"], ["trackio", "mlflow"]),
        ([], ["tensorboard"], []),
    ],
)
def test_the_configuration_says_which(trackers_key: Any, report_to: Any, wanted: list[str], tmp_path: Path) -> None:
    values = {"sae": {"source": "x"}, "wandb": {"enabled": False}, "trackers": trackers_key}
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=report_to)
    sinks = build_sinks(check_config(values, "test"), args)
    found = [sink for sink in sinks if isinstance(sink, TrackerSink)]
    assert [sink.name for sink in found] == wanted
    assert all(sink.folder == tmp_path / "runs" / "smda" for sink in found)


def test_an_unknown_tracker_is_refused_by_the_configuration() -> None:
    with pytest.raises(ConfigError, match="tensorboard"):
        check_config({"sae": {"source": "x"}, "trackers": ["aim"]}, "test")


def test_tensorboard_reads_it_back(run: Run, tmp_path: Path) -> None:
    feed(TrackerSink("tensorboard", tmp_path), run)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    wanted = expected_rows(run)
    assert set(events.Tags()["scalars"]) == set().union(*wanted.values())
    for name in events.Tags()["scalars"]:
        rows = [(step, row[name]) for step, row in sorted(wanted.items()) if name in row]
        assert [each.step for each in events.Scalars(name)] == [step for step, _ in rows]
        assert [each.value for each in events.Scalars(name)] == pytest.approx([value for _, value in rows], rel=1e-6)
    texts = [each.tensor_proto.string_val[0].decode() for each in events.Tensors("smda/alerts")]
    alerts = [alert for window in run.windows for alert in window.alerts] + list(run.alerts)
    assert texts == [f"step {alert.step}: {alert.message}" for alert in alerts]
