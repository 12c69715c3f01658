"""Where a run is read from: a run store, the folder that W&B keeps of a run, or a W&B server."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smda_callbacks.sinks import files
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_fetch import fetch_run
from smda_callbacks.sinks.wandb_log import WandbRun, read_wandb_folder

Kind = Literal["store", "W&B folder", "W&B"]


@dataclass(frozen=True)
class RunSource:
    """A run as it was given, and what was found of it: its store, or only what W&B has (``logged``).

    ``shown``: the store is the copy that W&B was sent, in which texts may be missing or be hashes. ``notes``: what a
    reader must know of how it was found.
    """

    given: str
    kind: Kind
    manifest: Mapping[str, Any]
    store: RunStore | None = None
    logged: WandbRun | None = None
    shown: bool = False
    notes: tuple[str, ...] = ()


def from_store(folder: Path, given: str) -> RunSource:
    """A run store. Raises StoreError where it is none."""
    store = RunStore.open(folder, shown=True)
    return RunSource(given, "store", store.manifest, store, shown=_is_shown(folder))


def from_wandb_folder(folder: Path, given: str, cache: Path) -> RunSource:
    """A W&B folder: the store that the run wrote, if it is where it was or near; else the copy of it that was logged
    from this machine; else the metrics.

    Raises WandbLogError: no W&B folder; StoreError: the run did not use this library.
    """
    logged = read_wandb_folder(folder)
    if not logged.manifest:
        raise StoreError(
            f"the W&B run in {folder} has no configuration of smda-callbacks: it was trained without the callback, or "
            "stopped before training began. Next step: give a run that was watched."
        )
    near = _store_near(folder, logged)
    if near is not None:
        store = RunStore.open(near, shown=True)
        note = f"read from its run store, {near}"
        return RunSource(given, "W&B folder", store.manifest, store, shown=_is_shown(near), notes=(note,))
    if logged.store_files:
        copied = _copy(logged, cache)
        note = "read from the copy of its run store that was logged to W&B"
        return _from_copy(copied, given, "W&B folder", note)
    return _from_metrics(logged, given, "W&B folder")


def from_server(path: str, cache: Path) -> RunSource:
    """A run of a W&B server, ``entity/project/run``. Raises WandbFetchError where W&B does not give it."""
    found = fetch_run(path, cache)
    if isinstance(found, Path):
        return _from_copy(found, path, "W&B", f"read from the run store that it logged to W&B, now in {found}")
    if not found.manifest:
        raise StoreError(
            f"the W&B run {path!r} has no configuration of smda-callbacks: it was trained without the callback. "
            "Next step: give a run that was watched."
        )
    return _from_metrics(found, path, "W&B")


def _from_copy(folder: Path, given: str, kind: Kind, note: str) -> RunSource:
    store = RunStore.open(folder, shown=True)
    return RunSource(given, kind, store.manifest, store, shown=_is_shown(folder), notes=(note,))


def _from_metrics(logged: WandbRun, given: str, kind: Kind) -> RunSource:
    note = (
        "no run store was found, only what W&B was sent: there are trajectories, cost and the summary, but no "
        "difference in policy, no pairs and no noise floor. Give its run store for those"
    )
    return RunSource(given, kind, logged.manifest, logged=logged, notes=(note,))


def _is_shown(folder: Path) -> bool:
    return not (folder / files.PROBES).exists()


def _store_near(folder: Path, logged: WandbRun) -> Path | None:
    """The store with the run's own id: where the configuration says it was, else in a folder around W&B's."""
    return next((each for each in _candidates(folder, logged) if _is_of(each, logged)), None)


def _candidates(folder: Path, logged: WandbRun) -> Iterator[Path]:
    around = list(dict.fromkeys(folder.resolve().parents))[:3]
    recorded = _mapping(_mapping(logged.manifest.get("config")).get("store")).get("dir")
    if recorded:
        yield from (base / recorded for base in (Path.cwd(), *around))
    for base in around[:2]:
        yield base
        for pattern in ("*", "*/*"):
            yield from (each.parent for each in sorted(base.glob(f"{pattern}/{files.MANIFEST}")))


def _is_of(store: Path, logged: WandbRun) -> bool:
    """Whether the store is that of the run: by the id that both carry."""
    try:
        manifest = json.loads((store / files.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("run_id") == logged.manifest.get("run_id") is not None


def _copy(logged: WandbRun, cache: Path) -> Path:
    """The logged copy of a store as a folder, below ``cache``."""
    names = sorted((name, str(path)) for name, path in logged.store_files.items())
    target = cache / "offline" / f"{logged.id}-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}"
    if not (target / files.MANIFEST).is_file():
        part = target.with_name(target.name + files.PART)
        shutil.rmtree(part, ignore_errors=True)
        for name, path in logged.store_files.items():
            to = part / name
            if not to.resolve().is_relative_to(part.resolve()):
                raise StoreError(f"the logged run store names a file outside of itself, {name!r}; it is not copied.")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    return target


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
