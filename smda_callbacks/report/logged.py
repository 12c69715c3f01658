"""Whether what was sent to a tracker is what the run store says: every logged row, summary and table made again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np

from smda_callbacks.records import WindowRecord
from smda_callbacks.sinks import wandb_tables as tables
from smda_callbacks.sinks.codec import dumps
from smda_callbacks.sinks.metric_values import Progress
from smda_callbacks.sinks.metrics import STEP, rows_of_window, summary_of_progress
from smda_callbacks.sinks.store_reader import RunStore

#: Recomputed numbers differ by rounding on another machine: relative, and absolute for what is rounding and no more.
RELATIVE, ABSOLUTE = 1e-8, 1e-12

#: The only column of a row that tells of an alert outside a window.
ALERT = "smda/alerts/count"


def logged_faults(store: RunStore, records: list[WindowRecord]) -> tuple[int, list[str]]:
    """How many entries ``logged.jsonl`` has, and what is wrong with them, one line each.

    ``records``: the baseline and all windows. Numbers are compared to 1e-8, relative; words must be the same.
    """
    progress, expected = _replay(store, records)
    entries, faults = store.logged(), []
    for entry in entries:
        step = entry["step"]
        if "summary" in entry:
            last = max(each for each in progress if each <= max(step, store.baseline.step))
            summary = _as_json(summary_of_progress(store.start, progress[last]))
            faults += _differences(f"the summary of step {step}", entry["summary"], summary)
            continue
        row = {name: value for name, value in entry["row"].items() if name != STEP}
        if any(isinstance(value, Mapping) for value in row.values()):
            for name, table in row.items():
                faults += _table_faults(store, progress, step, name, table)
        elif step in expected and set(row) != {ALERT}:
            faults += _differences(f"step {step}", row, expected[step])
        elif set(row) != {ALERT}:
            faults.append(f"step {step} was logged but has no window")
    return len(entries), faults + _alert_faults(store, records, entries)


def _replay(store: RunStore, records: list[WindowRecord]) -> tuple[dict[int, Progress], dict[int, Any]]:
    """The run's progress by the step of its last ok record, and the metrics of every record by step."""
    now, progress, rows = Progress.at(store.start), {}, {}
    for record in records:
        now = now.after(record)
        progress[now.last.step] = now
        rows[record.step] = _as_json(rows_of_window(record, store.start, now.total))
    return progress, rows


def _table_faults(store: RunStore, progress: Mapping[int, Progress], step: int, name: str, table: Any) -> list[str]:
    candidates = [_as_json(vars(each)) for each in _tables(store, progress.get(step), step, name)]
    if not candidates:
        return [f"{name} of step {step} cannot be made from the store"]
    return [] if any(_same(table, each) for each in candidates) else [f"{name} of step {step} differs"]


def _tables(store: RunStore, progress: Progress | None, step: int, name: str) -> list[tables.Table]:
    """What the table ``name`` may hold at ``step``: probe texts are sent in one of several ways, gaps twice."""
    if name == tables.GAPS:
        end = store.end
        moments = [(store.baseline.step, store.gaps_start)] + ([(end.step, end.gaps)] if end else [])
        return [tables.gaps_table(gaps) for moment, gaps in moments if moment == step]
    if progress is None:
        return []
    if name == tables.PROBES:
        return [tables.probes_table(store.start, progress, log_text) for log_text in get_args(tables.LogText)]
    build = _BUILDERS.get(name)
    return [build(store.start, progress)] if build else []


_BUILDERS: Mapping[str, Callable[..., tables.Table]] = {
    tables.CATEGORIES: tables.categories_table,
    tables.FEATURES: tables.features_table,
    tables.FEATURE_PLOT: tables.feature_bars,
    tables.CATEGORY_PLOT: tables.category_bars,
}


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
