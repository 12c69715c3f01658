"""Whether what was sent to a tracker is what the run store says: every logged row, summary and table made again."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np

from smda_callbacks.records import WindowRecord
from smda_callbacks.sinks import wandb_media as media
from smda_callbacks.sinks.codec import dumps
from smda_callbacks.sinks.metric_values import Progress
from smda_callbacks.sinks.metrics import ALERTS, STEP, rows_of_window, summary_of_progress
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_private import LogText
from smda_callbacks.sinks.wandb_tables import Table, gaps_table

#: Recomputed numbers differ by rounding on another machine: relative, and absolute for what is rounding and no more.
RELATIVE, ABSOLUTE = 1e-8, 1e-12

#: The only column of a row that tells of an alert outside a window.
ALERT = ALERTS


def logged_faults(store: RunStore, records: list[WindowRecord]) -> tuple[int, list[str]]:
    """How many entries ``logged.jsonl`` has, and what is wrong with them, one line each.

    ``records``: the baseline and all windows. Numbers are compared to 1e-8, relative; words must be the same.
    """
    entries = store.logged()
    rows, at_moments = _sorted(store, records, entries)
    faults, now = [], Progress.at(store.start)
    for record in records if entries else ():  # one after another: a run's progress is too large to keep for all
        now = now.after(record)
        expected = _as_json(rows_of_window(record, store.start, now)) if record.step in rows else {}
        for row in rows.pop(record.step, []):
            faults += _differences(f"step {record.step}", row, expected)
        if record is now.last:
            for entry in at_moments.pop(record.step, []):
                faults += _moment_faults(store, now, entry)
    faults += [f"step {step} was logged but has no window" for step, some in rows.items() for _ in some]
    for entry in (entry for some in at_moments.values() for entry in some):
        faults += _moment_faults(store, None, entry)
    return len(entries), faults + _alert_faults(store, records, entries)


def _sorted(
    store: RunStore, records: list[WindowRecord], entries: list[dict[str, Any]]
) -> tuple[dict[int, list[dict[str, Any]]], dict[int, list[dict[str, Any]]]]:
    """Rows of metrics by the step of their window; tables and summaries by that of the ok record they show."""
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    moments: dict[int, list[dict[str, Any]]] = defaultdict(list)
    shown = [record.step for record in records if record.status == "ok"]
    for entry in entries:
        step = entry["step"]
        row = {name: value for name, value in entry.get("row", {}).items() if name != STEP}
        if "summary" in entry:
            moments[max(each for each in shown if each <= max(step, store.baseline.step))].append(entry)
        elif any(isinstance(value, Mapping) for value in row.values()):
            moments[step].append(entry)
        elif set(row) != {ALERT}:
            rows[step].append(row)
    return rows, moments


def _moment_faults(store: RunStore, progress: Progress | None, entry: Mapping[str, Any]) -> list[str]:
    """What is wrong with tables or a summary; ``progress``: where the run was then, None if it was nowhere."""
    step = entry["step"]
    if "summary" in entry and progress is not None:
        summary = _as_json(summary_of_progress(store.start, progress))
        return _differences(f"the summary of step {step}", entry["summary"], summary)
    named = [(name, value) for name, value in entry["row"].items() if name != STEP]
    return [fault for name, table in named for fault in _table_faults(store, progress, step, name, table)]


def _table_faults(store: RunStore, progress: Progress | None, step: int, name: str, table: Any) -> list[str]:
    found = False
    for each in _tables(store, progress, step, name):
        found = True
        if _same(table, _as_json(vars(each))):
            return []
    return [f"{name} of step {step} differs" if found else f"{name} of step {step} cannot be made from the store"]


def _tables(store: RunStore, progress: Progress | None, step: int, name: str) -> Iterator[Table]:
    """What the table ``name`` may hold at ``step``: texts are sent in one of several ways, gaps twice."""
    if name == media.GAPS:
        end = store.end
        moments = [(store.baseline.step, store.gaps_start)] + ([(end.step, end.gaps)] if end else [])
        yield from (gaps_table(gaps) for moment, gaps in moments if moment == step)
    elif progress is not None and name in media.BY_KEY:
        yield from (media.BY_KEY[name].build(store.start, progress, each) for each in get_args(LogText))


def _alert_faults(store: RunStore, records: list[WindowRecord], entries: list[dict[str, Any]]) -> list[str]:
    """Rows of alerts outside a window, one for every such alert at most."""
    told = Counter(entry["step"] for entry in entries if set(entry.get("row", ())) == {ALERT, STEP})
    raised = Counter(alert.step for alert in store.alerts())
    raised.subtract(Counter(alert.step for record in records for alert in record.alerts))
    return [
        f"{count} alerts outside a window were logged at step {step}, the store has {raised[step]}"
        for step, count in sorted(told.items())
        if count > raised[step]
    ]


def _differences(place: str, logged: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Names whose value differs, or that are on one side only."""
    return [
        f"{name} at {place} was logged as {logged.get(name)!r} but is {expected.get(name)!r}"
        for name in sorted(logged.keys() | expected.keys())
        if name not in logged or name not in expected or not _same(logged[name], expected[name])
    ]


def _same(logged: Any, expected: Any) -> bool:
    if isinstance(expected, Mapping):
        return (
            isinstance(logged, Mapping)
            and logged.keys() == expected.keys()
            and all(_same(logged[key], expected[key]) for key in expected)
        )
    if isinstance(expected, list):
        return isinstance(logged, list) and len(logged) == len(expected) and all(map(_same, logged, expected))
    if isinstance(expected, float) and isinstance(logged, int | float):
        return bool(np.isclose(logged, expected, rtol=RELATIVE, atol=ABSOLUTE))
    return bool(logged == expected)


def _as_json(value: Any) -> Any:
    """``value`` as it comes back from a file."""
    return json.loads(dumps(value))
