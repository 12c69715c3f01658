"""Every sink keeps the promise of the protocol; sinks are found, not listed."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smda_callbacks.sinks
from smda_callbacks.sinks.base import Sink
from tests.helpers.runs import make_run

pytestmark = pytest.mark.usefixtures("no_tracker")

METHODS = ("open", "write", "alert", "close")

#: How to make a fresh sink in an empty folder; a new sink needs an entry here.
FACTORIES: dict[str, Callable[[type[Any], Path], Any]] = {
    "MemorySink": lambda kind, folder: kind(),
    "StoreSink": lambda kind, folder: kind(folder / "run"),
    "TrackerSink": lambda kind, folder: kind("tensorboard", folder),
    "WandbSink": lambda kind, folder: kind(mode="disabled"),
}


def find_sinks() -> dict[str, type[Any]]:
    """All classes of the package with the protocol's methods, by name."""
    found = {}
    for module in pkgutil.iter_modules(smda_callbacks.sinks.__path__, "smda_callbacks.sinks."):
        for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if kind.__module__ == module.name and kind is not Sink and all(hasattr(kind, each) for each in METHODS):
                found[name] = kind
    return found


@pytest.fixture
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves this machine, whatever the environment says."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


SINKS = find_sinks()


def make(name: str, folder: Path) -> Any:
    assert name in FACTORIES, f"say in FACTORIES how a {name} is made"
    return FACTORIES[name](SINKS[name], folder)


def test_sinks_are_found() -> None:
    assert {"MemorySink", "StoreSink"} <= set(SINKS)


@pytest.mark.parametrize("name", sorted(SINKS))
def test_a_sink_survives_two_runs_with_fresh_instances_and_a_double_close(name: str, tmp_path: Path) -> None:
    run = make_run(windows=3, not_finite=[1])
    for number in range(2):
        sink = make(name, tmp_path / str(number))
        assert isinstance(sink, Sink)
        sink.open(run.start)
        for window in run.windows:
            sink.write(window)
        sink.alert(run.alerts[0])
        sink.close(run.end)
        sink.close(run.end)


@pytest.mark.parametrize("name", sorted(SINKS))
def test_a_sink_closes_without_a_window(name: str, tmp_path: Path) -> None:
    run = make_run(windows=0)
    sink = make(name, tmp_path)
    sink.open(run.start)
    sink.close(run.end)


@pytest.mark.parametrize("name", sorted(SINKS))
def test_methods_take_what_the_protocol_says(name: str) -> None:
    for method in METHODS:
        expected = inspect.signature(getattr(Sink, method)).parameters
        assert list(inspect.signature(getattr(SINKS[name], method)).parameters) == list(expected)


def test_the_memory_sink_holds_what_it_was_given() -> None:
    run = make_run(windows=2)
    sink = SINKS["MemorySink"]()
    sink.open(run.start)
    for window in run.windows:
        sink.write(window)
    sink.alert(run.alerts[0])
    sink.close(run.end)
    sink.close(make_run(windows=0).end)
    assert sink.start is run.start
    assert tuple(sink.windows) == run.windows
    assert tuple(sink.alerts) == run.alerts
    assert sink.end is run.end
    with pytest.raises(ValueError, match=r"already holds run 'made-up'.*Make a new MemorySink"):
        sink.open(run.start)
