"""Going on with a run that stopped: is it the same run, and what of it came after the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smda_callbacks.sinks import files
from smda_callbacks.sinks.codec import dumps
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.wandb_media import GAPS

#: Where two manifests must agree to be one run.
IDENTITY = ("run_id", "probe_hash", "policy_hash", "model.hash", "sae.hash")


def check_same_run(path: Path, manifest: Mapping[str, Any], step: int) -> None:
    """Raise StoreError unless the store at ``path`` is that of ``manifest`` and starts at ``step`` or before."""
    stored = files.read_manifest(path)
    pairs = {name: (_look_up(stored, name), _look_up(manifest, name)) for name in IDENTITY}
    other = [f"{name} {old!r} there and {new!r} here" for name, (old, new) in pairs.items() if old != new]
    if other:
        raise StoreError(
            f"{path} is the store of another run: {'; '.join(other)}. To resume, all of {', '.join(IDENTITY)} must be "
            "the same. Load run id and policy from the store and use its probes and model, or start a new run in "
            "another folder."
        )
    first = files.list_steps(path)[0]
    if step < first:
        raise StoreError(
            f"training resumes at step {step}, but {path} starts at step {first}; what came before was never measured. "
            f"Resume from a checkpoint of step {first} or later, or start a new run in another folder."
        )


def set_aside(path: Path, step: int) -> None:
    """Set aside what the store at ``path`` knows of later than ``step``, under ``superseded-N-*`` names; nothing is
    lost.

    The latest records go first, so that a kill in between leaves a store without holes. Derived tables are deleted.
    """
    files.remove_parts(path)
    prefix = f"superseded-{_count(path) + 1}-"
    for later in reversed([each for each in files.list_steps(path) if each > step]):
        file = files.step_file(path, later)
        file.rename(file.with_name(prefix + file.name))
    end = path / files.END
    if end.exists():
        end.rename(path / (prefix + end.name))
    first = files.list_steps(path)[0]
    for name in (files.ALERTS, files.LOGGED):
        _set_rows_aside(path / name, step, first, prefix)
    for table in (path / files.TABLES).glob("*.parquet"):
        table.unlink()


def clear_unfinished(path: Path) -> None:
    """Delete what a writer left that was stopped before its store was one: the files before training, and no window.

    Does nothing to a folder that is a store, or that holds anything else.
    """
    if not path.is_dir() or (path / files.MANIFEST).exists():
        return
    found = [item for item in path.rglob("*") if not item.is_dir()]
    head = files.HEAD | {files.MANIFEST, files.step_file(path, 0).name}
    if all(item.name.removesuffix(files.PART) in head for item in found):
        for item in found:
            item.unlink()
        if (path / files.STEPS).is_dir() and not any((path / files.STEPS).iterdir()):
            (path / files.STEPS).rmdir()


def _set_rows_aside(path: Path, step: int, first: int, prefix: str) -> None:
    rows = files.read_rows(path)
    later = [row["step"] > step or (row["step"] > first and _is_of_the_end(row)) for row in rows]
    if any(later):
        aside = [row for row, late in zip(rows, later, strict=True) if late]
        files.write_atomic(path.with_name(prefix + path.name), _lines(aside))
        files.write_atomic(path, _lines([row for row, late in zip(rows, later, strict=True) if not late]))


def _is_of_the_end(row: Mapping[str, Any]) -> bool:
    """Whether a logged row tells how the run ended, which is no longer so: the summary, and the gap table."""
    return "summary" in row or GAPS in row.get("row", {})


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(dumps(row) + "\n" for row in rows).encode()


def _count(path: Path) -> int:
    """Number of the last resume that set something aside."""
    found = [*path.glob("superseded-*"), *(path / files.STEPS).glob("superseded-*")]
    return max((int(file.name.split("-")[1]) for file in found), default=0)


def _look_up(manifest: Mapping[str, Any], name: str) -> Any:
    value: Any = manifest
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
