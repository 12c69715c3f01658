"""Finding the run store that a path means, or the run that W&B has."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from smda_callbacks.sinks.files import HEAD

if TYPE_CHECKING:
    from smda_callbacks.sinks.run_source import RunSource

_ON_SERVER = re.compile(r"\w[\w.-]*/\w[\w.-]*/\w[\w.-]*")


class RunError(ValueError):
    """There is no run at a path."""


def run_folder(path: Path) -> Path:
    """``path``, if there is something to read; a store that lies just below is named in the message.

    Raises:
        RunError: no such folder, or one without a manifest.
    """
    if (path / "manifest.json").is_file():
        return path
    if not path.exists():
        raise RunError(f"run {str(path)!r} does not exist. Next step: give a run store, the folder of store.dir.")
    if path.is_dir() and HEAD & {each.name for each in path.iterdir()}:
        return path  # half-written: the reader says what that means
    below = sorted(each.parent for each in path.glob("*/manifest.json")) if path.is_dir() else []
    near = f"give {' or '.join(map(str, below[:3]))}" if below else "give the folder of store.dir"
    raise RunError(f"{path} is no run store: it has no manifest.json. Next step: {near}.")


def run_source(text: str, cache: Path) -> RunSource:
    """A run store, the folder that W&B keeps of a run, or ``entity/project/run`` of a W&B server; ``cache``: downloads.

    A path that is there goes before a name on the server, unless it is an empty folder: W&B leaves such ones behind.

    Raises:
        RunError: no such run.
        StoreError, WandbLogError, WandbFetchError: it cannot be read, or was not watched by this library.
    """
    from smda_callbacks.sinks.run_source import from_server, from_store, from_wandb_folder
    from smda_callbacks.sinks.wandb_log import log_file

    path = Path(text)
    if path.is_file() and path.suffix == ".wandb":
        path = path.parent
    if _ON_SERVER.fullmatch(text) and (not path.exists() or (path.is_dir() and not any(path.iterdir()))):
        return from_server(text, cache)
    if log_file(path) is not None:
        return from_wandb_folder(path, text, cache)
    logs = sorted(path.glob("*-run-*/run-*.wandb")) if path.is_dir() else []
    if logs and not (path / "manifest.json").exists():
        near = " or ".join(str(each.parent) for each in logs[:3])
        raise RunError(f"{path} holds {len(logs)} W&B run{'s' * (len(logs) > 1)}. Next step: give {near}.")
    return from_store(run_folder(path), text)


def cache_folder() -> Path:
    """Where downloads are kept if nothing is said: ``smda`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smda"
