"""Send a stored run to W&B, after the training or instead of the live run; what is there already is not sent again.

The W&B run has an id made from the run store's own, the one that a run of our own has live, too. Online the server is
asked what it has of it. Offline a new folder is written, once; the note in ``wandb.json`` says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smda_callbacks.records import Alert, RunEnd
from smda_callbacks.sinks import files, wandb_media, wandb_runs
from smda_callbacks.sinks.codec import decode
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_run import PROJECT
from smda_callbacks.sinks.wandb_sent import Into, Sent, SyncError, read_sent
from smda_callbacks.sinks.wandb_sink import WandbSink

#: How often, and after how many seconds each, the server is asked whether all rows have arrived.
ASKED, PAUSE = 5, 2.0


@dataclass(frozen=True)
class Synced:
    """Where a stored run is in W&B. ``rows``: of windows, sent now; ``of``: that the store has. ``anything``: whether
    anything was sent. ``folder``: of an offline run, None online."""

    id: str
    project: str
    entity: str | None
    url: str | None
    rows: int
    of: int
    anything: bool
    folder: Path | None


def sync_run(
    store: RunStore,
    *,
    project: str | None = None,
    entity: str | None = None,
    mode: str | None = None,
    run_id: str | None = None,
    patience: float = 600.0,
) -> Synced:
    """Send what W&B has not of ``store``: rows, tables, summary, alerts' counts, policy and store.

    ``project``, ``entity``: default as W&B's, then as the run was configured. ``run_id``: instead of the one from the
    store. Texts and artifacts are sent as the run's configuration says. ``patience``: seconds until it is given up.

    Raises SyncError where it cannot be sent, or not wholly; a run that is only partly there is completed by the next.
    """
    options = _mapping(_mapping(store.manifest.get("config")).get("wandb"))
    project = project or os.environ.get("WANDB_PROJECT") or options.get("project") or PROJECT
    name = run_id or wandb_runs.run_name(store.manifest)
    online = _is_online(mode)
    sent = _server_has(store, name, project, entity) if online else Sent()
    stamp = {"through": files.list_steps(store.path)[-1], "ended": store.end is not None}
    if not online and (known := _written(store, name)) is not None:
        return _again(store, known, stamp)
    sink = WandbSink(
        project,
        "online" if online else "offline",
        tables_every=int(options.get("tables_every") or 10),
        log_text=options.get("log_text") or "none",
        store_path=store.path if options.get("artifacts", True) else None,
        into=Into(name, project, entity, sent, patience),
        alerts=False,
        finish_timeout=patience,
        queue_size=1_000_000,
    )
    _replay(store, sink)
    if sink.failures:
        raise SyncError(f"not all of {store.path} was sent: {sink.first_failure}. {_advice(sink, name)}")
    steps = set(files.list_steps(store.path))
    new = len(steps - sent.rows)
    if sink.run is None:  # nothing was missing
        return Synced(name, project, entity, None, 0, len(steps), False, None)
    facts = {**wandb_runs.facts_of(sink.run), **stamp}
    folder = Path(sink.run.dir).parent if facts["offline"] else None
    if folder is None:
        _require_arrival(store, name, project, entity, steps)
    wandb_runs.note_synced(store.path, {**facts, "folder": None if folder is None else str(folder)})
    return Synced(name, facts["project"], facts["entity"], facts["url"], new, len(steps), True, folder)


def _replay(store: RunStore, sink: WandbSink) -> None:
    """Hand the sink the run again; what is not to be sent is left to it."""
    sink.open(store.start)
    step = store.baseline.step
    for step in files.list_steps(store.path)[1:]:
        sink.write(store.window(step))
    for row in files.read_rows(store.path / files.ALERTS):
        sink.alert(decode(Alert, row))
    sink.close(store.end or RunEnd(step, "interrupted", 0.0, 0.0, ()))


def _server_has(store: RunStore, name: str, project: str, entity: str | None) -> Sent:
    return read_sent(name, project, entity, wandb_media.history_keys(store.start))


def _require_arrival(store: RunStore, name: str, project: str, entity: str | None, steps: set[int]) -> None:
    """Raise SyncError unless the server has a row of every step; it may take a little to show them."""
    missing = steps
    for asked in range(ASKED):
        time.sleep(PAUSE if asked else 0.0)
        missing = steps - _server_has(store, name, project, entity).rows
        if not missing:
            return
    raise SyncError(
        f"W&B shows {len(steps) - len(missing)} of {len(steps)} rows of run {name!r} so far; it may be slow or have "
        "gone. Next step: run the same command again; it sends only what is missing."
    )


def _written(store: RunStore, name: str) -> Mapping[str, Any] | None:
    """The note of an offline run that is still there."""
    notes = (each for each in wandb_runs.synced_runs(store.path) if each["offline"] and each["id"] == name)
    return next((each for each in notes if each["folder"] and Path(each["folder"]).exists()), None)


def _again(store: RunStore, known: Mapping[str, Any], stamp: Mapping[str, Any]) -> Synced:
    """The offline run that was written before, if the store has not grown since."""
    folder = Path(known["folder"])
    if any(known.get(name) != value for name, value in stamp.items()):
        raise SyncError(
            f"{store.path} was written to {folder} when it reached step {known['through']}, and has grown since; an "
            f"offline run cannot be gone on with. Next step: delete that folder, or `wandb sync {folder}` and then "
            "smda wandb sync with --mode online."
        )
    count = len(files.list_steps(store.path))
    return Synced(known["id"], known["project"], known["entity"], known["url"], 0, count, False, folder)


def _is_online(mode: str | None) -> bool:
    import wandb

    found = mode or os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    if found not in ("online", "offline"):
        raise SyncError(f"W&B's mode is {found!r}; allowed are online and offline. Next step: give --mode.")
    return bool(found == "online")


def _advice(sink: WandbSink, name: str) -> str:
    if "deleted" in sink.first_failure:
        return f"W&B never takes the id of a deleted run again. Next step: give another one, as in --id {name}-2."
    return "Next step: run the same command again; it sends only what is missing."


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
