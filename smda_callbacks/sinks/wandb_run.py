"""The calls to W&B: find or start a run, and hand it tables, plots, alerts and artifacts.

Measured with wandb 0.31: scalars, summary, configuration and definitions never wait for the server. Tables, plots and
artifacts do (19 s each when it is gone), so they belong into a thread of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, get_args

from smda_callbacks.records import Alert, RunStart
from smda_callbacks.sinks.metrics import STEP
from smda_callbacks.sinks.wandb_private import LogText, shown_files
from smda_callbacks.sinks.wandb_sent import Into
from smda_callbacks.sinks.wandb_tables import Table

PROJECT = "smda"
TITLE_LENGTH = 63
ANSWERS_WITHIN = 5.0  # seconds; a server that is gone shows as a call of 19 s

#: What a run of our own is started with where the user has set nothing: prompts that the program prints stay here, a
#: server may take a minute to be there (nobody waits for it), a kill loses 2 s of rows and not 15, the end is bounded.
DEFAULTS: Mapping[str, Any] = {
    "console": "off",
    "init_timeout": 60.0,
    "x_transaction_log_flush_interval": 2.0,
    "finish_timeout": 60.0,
}


#: Seconds that W&B may take to open the run that a stored run is sent into; here somebody waits.
START_WITHIN = 20.0


def check_options(mode: str | None, tables_every: int, log_text: str, finish_timeout: float, queue_size: int) -> None:
    """Raise ValueError for options of a WandbSink that are not allowed."""
    if mode not in (None, "online", "offline", "disabled"):
        raise ValueError(f"mode is {mode!r}; allowed are online, offline, disabled and None. None keeps W&B's default.")
    if log_text not in get_args(LogText):
        raise ValueError(f"log_text is {log_text!r}; allowed are {', '.join(get_args(LogText))}. The default is none.")
    if min(tables_every, queue_size) < 1 or finish_timeout < 0:
        raise ValueError(
            f"tables_every is {tables_every}, queue_size {queue_size}, finish_timeout {finish_timeout}; the first two "
            "must be at least 1 and the last at least 0. Leave them out for the defaults."
        )


def open_run() -> Any:
    """The run that is open in this process; None without one. W&B is not imported for it."""
    return getattr(sys.modules.get("wandb"), "run", None)


def start_run(
    project: str | None,
    mode: str | None,
    run_id: str | None = None,
    known: Mapping[str, Any] | None = None,
    into: Into | None = None,
) -> Any:
    """A run of our own: ``into``, else ``known`` if W&B can go on with it, else a new one. May wait for the server.

    W&B goes on with a run of its server by its id. Offline it would start the run's rows anew under the old id, so the
    old run is left as it is. A user's WANDB_RUN_ID goes before. ``run_id``: of a new run. Raises whatever W&B raises,
    and PermissionError without an API key, which nobody can be asked for here.
    """
    import wandb

    settings = own_settings(project, mode, None if known else run_id)
    again: dict[str, Any] = {}
    mode = settings.get("mode") or os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    online = mode in ("online", "shared")
    if into is not None:
        named = {"id": into.id, "project": into.project, "entity": into.entity, "resume": "allow"}
        again = {name: value for name, value in named.items() if value is not None}
        patient = {"init_timeout": START_WITHIN, "finish_timeout": into.patience}
        settings |= {name: value for name, value in patient.items() if name in settings}  # not what the user has set
        settings |= {} if "WANDB_SILENT" in os.environ else {"silent": True}
    elif known is not None and known["own"] and not known["offline"] and online and "WANDB_RUN_ID" not in os.environ:
        again = {"id": known["id"], "project": known["project"], "entity": known["entity"], "resume": "allow"}
    if online:
        _require_key()
    return wandb.init(settings=wandb.Settings(**settings), **again)


def _require_key() -> None:
    import wandb

    with suppress(TypeError):  # wandb before 0.31 cannot look without asking
        if not wandb.login(prompt=False, verify=False):
            raise PermissionError("no API key is known; log in with `wandb login`, or set WANDB_API_KEY or WANDB_MODE")


def own_settings(project: str | None, mode: str | None, run_id: str | None = None) -> dict[str, Any]:
    """Settings for a run of our own, without those that the user's environment or W&B settings file has set."""
    import wandb

    wanted = {"project": project or PROJECT, "mode": mode, "run_id": run_id, **DEFAULTS}
    known = set(wandb.setup().settings.model_fields_set)
    known |= {name for name in wanted if f"WANDB_{name.upper()}" in os.environ}
    offered = wandb.Settings.model_fields  # some of DEFAULTS came with wandb 0.31
    return {name: v for name, v in wanted.items() if v is not None and name not in known and name in offered}


def define(run: Any, names: Iterable[str]) -> None:
    """Plot every name over the optimizer step. Exact names only: W&B resolves overlapping wildcards at random."""
    for name in names:
        run.define_metric(name, step_metric=STEP)


def log_table(run: Any, key: str, table: Table, step: int) -> None:
    """Send one table. Waits for the server."""
    import wandb

    run.log({key: wandb.Table(columns=list(table.columns), data=[list(row) for row in table.data]), STEP: step})


def log_bars(run: Any, key: str, table: Table, step: int) -> None:
    """Send the first two columns of a table as a bar chart. Waits for the server."""
    import wandb

    label, value = table.columns[:2]
    inner = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.data])
    run.log({key: wandb.plot.bar(inner, label, value, title=key.rpartition("/")[2].replace("_", " ")), STEP: step})


def send_alert(run: Any, alert: Alert, reach_server: Callable[[], None]) -> None:
    """Raise an alert in W&B, if that is safe.

    An alert that is pending when the server is gone makes the run's finish hang, whatever its timeout (wandb 0.31).
    So, unless the run is offline (then the alert is kept until ``wandb sync``), ``reach_server`` makes a call that
    waits for the server first. Raises what it raises, and TimeoutError where it takes longer than 5 s: the alert is
    not sent then.
    """
    if not getattr(run, "offline", False):
        began = monotonic()
        reach_server()
        if (waited := monotonic() - began) > ANSWERS_WITHIN:
            raise TimeoutError(f"the W&B server took {waited:.0f} s to answer, so the alert was not sent")
    title = f"SMDA {alert.kind}" + (f": {alert.category}" if alert.category else "")
    run.alert(title=title[:TITLE_LENGTH], text=f"step {alert.step}: {alert.message}", level="WARN")


def log_store(run: Any, store: Path, start: RunStart, log_text: LogText) -> None:
    """Send the run store as an artifact, texts in it as ``log_text`` says. Waits for the server.

    See :func:`~smda_callbacks.sinks.wandb_private.shown_files`. Without ``probes.jsonl``, a store that is to be opened
    again needs the probe file from elsewhere.
    """
    artifact = _artifact(run, "store", start)
    for name, content in shown_files(store, start.probes, log_text):
        if isinstance(content, Path):
            artifact.add_file(str(content), name=name, skip_cache=True)
        else:
            with artifact.new_file(name, mode="wb") as file:
                file.write(content)
    run.log_artifact(artifact)


def _artifact(run: Any, kind: str, start: RunStart) -> Any:
    import wandb

    hashes = {name: start.manifest.get(name) for name in ("run_id", "probe_hash", "policy_hash")}
    return wandb.Artifact(f"{kind_of(kind)}-{run.id}", type=kind_of(kind), metadata=hashes)


def kind_of(content: str) -> str:
    """Type of the artifact with the ``policy`` or the ``store``."""
    return f"smda-{content}"
