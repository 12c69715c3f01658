"""Files that survive a kill: written whole or not at all, or appended line by line; the layout of a run folder.

=============================  ==================================================================
``manifest.json``              schema version, configuration, versions, hashes; written last of the
                               files before training, so that its presence makes the folder a store
``probes.jsonl``               one probe a line
``policy.json, .safetensors``  the distilled policy: fields, and arrays
``noise.safetensors``          the noise floor around the start (absent if not measured); later ones are in ``steps``
``gaps.json``                  the gap table at the start
``start.safetensors``          the probes' residual stream at the start: a resumed run compares the SAE's health with it
``steps/000000000.safetensors``  one file per record, named by its last optimizer step: arrays, and all other
                               fields as JSON in the metadata. The lowest step is the baseline
``steps/superseded-N-*``       records that the N-th resume set aside; readers pass them over
``alerts.jsonl``               alerts outside a window
``logged.jsonl``               what was sent to a tracker
``wandb.json``                 the W&B runs that it was sent to, the last one last
``end.json``                   how the run ended; absent while it runs and after a kill
``tables/*.parquet``           derived from the above, written at close
``trajectory/``                the run's steps, where they are kept: see :mod:`smda_callbacks.sinks.trajectory`
``rescore/``                   influence on the run's end, where ``smda rescore`` wrote it
=============================  ==================================================================
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from smda_callbacks.records import SCHEMA_VERSION
from smda_callbacks.sinks.codec import Arrays, decode, dumps, encode

MANIFEST = "manifest.json"
PROBES = "probes.jsonl"
POLICY = "policy"
NOISE = "noise.safetensors"
GAPS = "gaps.json"
START = "start.safetensors"
WANDB = "wandb.json"
STEPS = "steps"
ALERTS = "alerts.jsonl"
LOGGED = "logged.jsonl"
END = "end.json"
TABLES = "tables"

#: Files that can be there before the manifest is: a folder of nothing else is a store whose writer was stopped early.
HEAD = frozenset({PROBES, f"{POLICY}.json", f"{POLICY}.safetensors", NOISE, GAPS, STEPS, ALERTS, LOGGED})

PART = ".part"
_STEP = re.compile(r"(\d{9,})\.safetensors")


class StoreError(ValueError):
    """A run folder that cannot be used as asked."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``path`` so that a kill leaves the old state or the new one: ``.part`` beside, fsync, rename."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as strict JSON (see :mod:`smda_callbacks.sinks.codec`), whole or not at all."""
    write_atomic(path, (dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote. Raises StoreError if the file is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise missing(path) from error
    except ValueError as error:
        raise damaged(path, error) from error


def write_record(path: Path, record: Any) -> None:
    """Write a record with its arrays into one safetensors file, whole or not at all."""
    value, arrays = encode(record)
    write_atomic(path, save(arrays, {"record": dumps(value)}))


def read_record(path: Path, kind: Any) -> Any:
    """The record of type ``kind`` that :func:`write_record` wrote. Raises StoreError if it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return decode(kind, json.loads(file.metadata()["record"]), arrays)
    except FileNotFoundError as error:
        raise missing(path) from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error


def read_arrays(path: Path) -> Arrays:
    """The arrays of a safetensors file. Raises StoreError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise missing(path) from error
    except (SafetensorError, ValueError) as error:
        raise damaged(path, error) from error


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append ``row`` as a line of strict JSON and flush; an unfinished last line, left by a kill, is cut off first."""
    with path.open("ab+") as file:
        end = file.tell()
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write((dumps(row) + "\n").encode())
        file.flush()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, none if it is missing; a last line without its line end is unfinished and left out.

    Raises StoreError where a finished line is not JSON.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise damaged(path, error) from error


def step_file(root: Path, step: int) -> Path:
    """Where the record of the window ending at ``step`` lies."""
    return root / STEPS / f"{step:09d}.safetensors"


def list_steps(root: Path) -> list[int]:
    """Steps of all records in the store, ascending, the baseline first; unfinished and superseded files left out."""
    names = (_STEP.fullmatch(path.name) for path in (root / STEPS).glob("*.safetensors"))
    return sorted(int(match[1]) for match in names if match)


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of the store at ``root``. Raises StoreError for a folder without one, and another schema version."""
    if not (root / MANIFEST).exists():
        if any((root / name).exists() for name in HEAD):
            raise half_written(root)
        raise StoreError(f"{root} is no run store: it has no {MANIFEST}. Give the folder that a StoreSink was given.")
    manifest: dict[str, Any] = read_json(root / MANIFEST)
    found = manifest.get("schema_version")
    if found != SCHEMA_VERSION:
        newer = isinstance(found, int) and found > SCHEMA_VERSION
        writer = (manifest.get("versions") or {}).get("smda-callbacks") or "that wrote it"
        advice = "Upgrade smda-callbacks." if newer else f"Read it with smda-callbacks {writer}."
        raise StoreError(
            f"{root} has schema version {found!r}, {'newer' if newer else 'older'} than this library's; it reads and "
            f"writes {SCHEMA_VERSION} only. {advice}"
        )
    return manifest


def remove_parts(root: Path) -> None:
    """Delete what a killed writer left unfinished."""
    for part in (*root.glob(f"*{PART}"), *root.glob(f"*/*{PART}")):
        part.unlink(missing_ok=True)


def half_written(root: Path) -> StoreError:
    """The error for a folder whose writer was stopped before the store was complete."""
    return StoreError(
        f"{root} is a half-written run store: it has no {MANIFEST}, so its writer stopped before training began, or "
        "is just starting. No step was measured: delete the folder and start again."
    )


def missing(path: Path) -> StoreError:
    """The error for a file of the store that is not there."""
    return StoreError(
        f"{path.name} is missing from the run store {path.parent}; every store has it. Restore the folder from a copy."
    )


def damaged(path: Path, error: Exception) -> StoreError:
    """The error for a file that cannot be read."""
    return StoreError(
        f"{path} cannot be read ({type(error).__name__}: {error}). Every file is written whole, so it was changed or "
        "damaged afterwards. Restore it from a copy."
    )
