"""Which W&B runs a run store was sent to, so that a training that goes on from a checkpoint goes on in W&B too."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smda_callbacks.sinks import files
from smda_callbacks.sinks.past import Past

logger = logging.getLogger("smda_callbacks")

Facts = Mapping[str, Any]

#: The entry of a W&B run's configuration that names the run it goes on from.
CONTINUES = "smda_continues"

#: The entry of a W&B run's configuration with what a policy came out as, to compare runs over.
POLICY_FACTS = "smda_policy"


def runs_before(logged: Path | None, past: Past | None) -> list[Facts]:
    """The W&B runs that the earlier part of the run was sent to, the last one last. ``logged``: ``logged.jsonl``."""
    path = _path(logged)
    if past is None or path is None or not path.exists():
        return []
    runs: list[Facts] = files.read_json(path).get("runs", [])
    return runs


def run_name(manifest: Facts) -> str:
    """The id, in W&B, of a run of our own: from that of the run store, so that the same run is found again.

    Raises StoreError for a manifest without a run id.
    """
    found = re.sub(r"[^A-Za-z0-9_-]", "-", str(manifest.get("run_id") or ""))[:64]
    if not found:
        raise files.StoreError("the manifest of the run has no run_id, so its W&B run has no name. Give one that has.")
    return f"smda-{found}"


def note_run(logged: Path | None, before: Sequence[Facts], run: Any, own: bool, past: Past | None) -> None:
    """Note beside ``logged`` that the run store is sent to ``run`` from now on; ``own``: whether we started it."""
    path = _path(logged)
    if path is None or not path.parent.is_dir():
        return
    now = {**facts_of(run), "own": own, "from_step": 0 if past is None else past.step}
    files.write_json(path, {**_notes(path), "runs": [*before, now]})


def synced_runs(store: Path) -> list[Facts]:
    """The W&B runs that the stored run was sent to afterwards."""
    found: list[Facts] = _notes(store / files.WANDB).get("synced", [])
    return found


def note_synced(store: Path, facts: Facts) -> None:
    """Note in the store that it was sent to the W&B run of ``facts``, in place of an older note of the same run."""
    others = [each for each in synced_runs(store) if (each["id"], each["offline"]) != (facts["id"], facts["offline"])]
    files.write_json(store / files.WANDB, {**_notes(store / files.WANDB), "synced": [*others, dict(facts)]})


def sent_to(store: Path) -> Facts | None:
    """The W&B run that shows the stored run: the last that was sent to, one on a server before one that is offline."""
    live: list[Facts] = _notes(store / files.WANDB).get("runs", [])
    found = [*live, *synced_runs(store)]
    online = [each for each in found if not each["offline"]]
    chosen = online or found
    return chosen[-1] if chosen else None


def facts_of(run: Any) -> dict[str, Any]:
    """What is noted of a W&B run: how to find it again."""
    facts = {name: getattr(run, name, None) for name in ("id", "project", "entity")}
    offline = bool(getattr(run, "offline", False))
    return {**facts, "url": None if offline else getattr(run, "url", None), "offline": offline}


def link(before: Sequence[Facts], run: Any) -> dict[str, Any]:
    """What the configuration of ``run`` says of the run before it; says in the log where the training goes on."""
    if not before:
        return {}
    last, name = before[-1], before[-1]["url"] or before[-1]["id"]
    if last["id"] == run.id:
        logger.info("W&B: going on in run %s; of two rows with the same step the newer one holds", name)
        return {}
    logger.info(
        "W&B: run %s goes on in run %s, which names it as %s. To go on in the same one, online, start with "
        "WANDB_RUN_ID=%s WANDB_RESUME=allow",
        name,
        run.id,
        CONTINUES,
        last["id"],
    )
    return {CONTINUES: {key: last[key] for key in ("id", "project", "entity", "url")}}


def _notes(path: Path) -> dict[str, Any]:
    return dict(files.read_json(path)) if path.exists() else {}


def _path(logged: Path | None) -> Path | None:
    return None if logged is None else logged.with_name(files.WANDB)
