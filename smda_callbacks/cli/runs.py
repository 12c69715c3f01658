"""Finding the run store that a path means."""

from __future__ import annotations

from pathlib import Path

from smda_callbacks.sinks.files import HEAD


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
