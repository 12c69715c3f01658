"""What a tracker was sent is made again from the store; where it was changed, the check says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smda_callbacks.records import Alert
from smda_callbacks.report.logged import ALERT
from smda_callbacks.report.verify import Check, verify
from smda_callbacks.sinks import files
from smda_callbacks.sinks.metrics import STEP
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_media import GAPS, media_of
from smda_callbacks.sinks.wandb_sink import WandbSink
from tests.helpers.runs import Run, louder, make_run, with_renewals

METRIC = "smda/pathways/first_order_error"
LINE = "smda/refusal_ledger_refuse/unexplained"
TABLE = "smda/tables/features"
PAIRS = "smda/tables/pair_effects"
SHARES = "smda/tables/pair_shares"


def of(path: Path) -> Check:
    """The check, which alone may fail."""
    checks = verify(RunStore.open(path))
    assert all(check.ok for check in checks if check.name != "logged")
    return next(check for check in checks if check.name == "logged")


def log(path: Path, run: Run, **options: Any) -> Path:
    """A store with all that a W&B sink logged beside it; nothing is really sent."""
    sinks: list[Any] = [StoreSink(path), WandbSink(tables_every=2, logged_path=path / files.LOGGED, **options)]
    for sink in sinks:
        sink.open(run.start)
        for window in run.windows:
            sink.write(window)
        for alert in (Alert(3, "loss_not_finite", "between two windows"), *run.alerts):
            sink.alert(alert)
        sink.close(run.end)
    return path


@pytest.fixture(autouse=True)
def disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    return log(tmp_path / "logged", make_run(windows=4, behaviours=("refusal", "hedging"), pairs=6))


def edit_logged(path: Path, pick: Callable[[dict[str, Any]], bool], edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the last entry that ``pick`` takes."""
    entries = files.read_rows(path / files.LOGGED)
    edit(next(entry for entry in reversed(entries) if pick(entry)))
    (path / files.LOGGED).unlink()
    for entry in entries:
        files.append_row(path / files.LOGGED, entry)


@pytest.mark.parametrize("pairs", [0, 6])
@pytest.mark.parametrize("renewals", [{}, {1: 4.0, 3: 0.3}], ids=str)
def test_what_was_logged_is_made_again(tmp_path: Path, pairs: int, renewals: dict[int, float]) -> None:
    run = with_renewals(make_run(windows=4, behaviours=("refusal", "hedging"), pairs=pairs), renewals)
    path = log(tmp_path / "run", run)
    entries = files.read_rows(path / files.LOGGED)
    sent = {name for entry in entries for name in entry.get("row", {})}
    assert {GAPS, *(medium.key for medium in media_of(run.start))} < sent  # every kind of table
    assert {PAIRS, SHARES, LINE} & sent == ({PAIRS, SHARES, LINE} if pairs else set())
    assert any("summary" in entry for entry in entries)
    assert of(path).ok
    assert of(path).detail == f"{len(entries)} entries made again"


def test_a_renewed_floor_that_was_changed_shows_in_what_was_logged(tmp_path: Path) -> None:
    run = with_renewals(make_run(windows=4, features=8), {1: 4.0})
    path, window = log(tmp_path / "run", run), run.windows[1]
    assert of(path).ok
    assert window.noise is not None
    files.write_record(files.step_file(path, window.step), replace(window, noise=louder(window.noise, 1e3)))
    assert not of(path).ok
    assert "smda/tables/features of step 4 differs" in of(path).detail


@pytest.mark.parametrize("log_text", ["none", "hash", "full"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"windows": 7, "not_finite": [1, 6], "failed": [3], "unattributed": [0, 4]},
        {"windows": 4, "unattributed": range(4)},
        {"windows": 3, "engine": "exact", "attributed": 2, "noise": False, "start_step": 10, "pair_text": False},
    ],
)
def test_pairs_are_made_again_whatever_was_measured_and_shown(
    tmp_path: Path, log_text: Any, arguments: dict[str, Any]
) -> None:
    path = log(tmp_path / "run", make_run(pairs=7, **arguments), log_text=log_text)
    assert of(path).ok, of(path).detail


def holds(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda entry: name in entry.get("row", {})


def put(name: str, value: float) -> Callable[[dict[str, Any]], Any]:
    return lambda entry: entry["row"].update({name: value})


def put_cell(name: str, column: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(entry: dict[str, Any]) -> None:
        table = entry["row"][name]
        table["data"][0][table["columns"].index(column)] = value

    return edit


def put_step(step: int) -> Callable[[dict[str, Any]], Any]:
    return lambda entry: entry.update({"step": step})


@pytest.mark.parametrize(
    ("pick", "edit", "fault"),
    [
        (holds(METRIC), put(METRIC, 0.5), f"{METRIC} at step 8"),
        (holds(METRIC), lambda e: e["row"].pop(METRIC), "was logged as None but is"),
        (holds(METRIC), put("more", 1.0), "more at step 8"),
        (holds(METRIC), put_step(99), "step 99 was logged but has no window"),
        (lambda e: "summary" in e, lambda e: e["summary"].update({"smda/summary/total": 0.5}), "the summary of step 8"),
        (holds(TABLE), put_cell(TABLE, "coef", 0.5), "differs"),
        (holds(TABLE), lambda e: e["row"][TABLE]["data"].pop(), f"{TABLE} of step 8 differs"),
        (holds(TABLE), put_step(99), "cannot be made from the store"),
        (lambda e: set(e.get("row", {})) == {ALERT, STEP}, put_step(6), "the store has 0"),
        (holds(LINE), put(LINE, 0.5), f"{LINE} at step 8"),
        (holds(LINE), put("smda/pairs/flagged", 3.0), "smda/pairs/flagged at step 8"),
        (lambda e: "summary" in e, lambda e: e["summary"].update({"smda/summary/pairs_flagged": 6.0}), "pairs_flagged"),
        (lambda e: "summary" in e, lambda e: e["summary"].pop("smda/summary/refusal_unexplained"), "as None but is"),
        (holds(PAIRS), put_cell(PAIRS, "effect", 0.5), f"{PAIRS} of step 8 differs"),
        (holds(PAIRS), put_cell(PAIRS, "rows", "77"), f"{PAIRS} of step 8 differs"),
        (holds(SHARES), put_cell(SHARES, "column_kind", "benign?"), f"{SHARES} of step 8 differs"),
        (holds(SHARES), put_step(7), f"{SHARES} of step 7 cannot be made from the store"),
    ],
)
def test_a_changed_log_is_found(
    logged: Path, pick: Callable[[dict[str, Any]], bool], edit: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    edit_logged(logged, pick, edit)
    assert not of(logged).ok
    assert fault in of(logged).detail
