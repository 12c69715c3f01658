"""Read a run back from the folder that W&B keeps of it, offline or online, without a server.

The file ``run-<id>.wandb`` is a log in LevelDB's framing: blocks of 32 KiB, records in pieces of a 7-byte header (CRC
of type and data, length, type) and data. A record is a message that W&B ships the description of. A run that was
killed, or that still goes on, ends in the middle of a record; what is whole before it is read.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smda_callbacks.sinks.metrics import STEP

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _LAST = 1, 2, 4
_BEGINNING = (b":W&B", 0xBEE1, 0)

#: Artifacts of this type are whole run stores (see wandb_run.log_store).
STORE_TYPE = "smda-store"

Rows = tuple[tuple[int, Mapping[str, float]], ...]


class WandbLogError(ValueError):
    """A file that is not the log of a W&B run."""


@dataclass(frozen=True)
class WandbRun:
    """What W&B has of a run that concerns this library.

    ``manifest``: that of the run store, which the configuration holds; empty where it was never sent. ``rows``:
    optimizer step and metrics, ascending; of two rows for one step the later one holds. ``store_files``: name in the
    store -> where the copy that was logged lies; empty where none was, or not from this machine.
    """

    id: str
    manifest: Mapping[str, Any]
    rows: Rows
    summary: Mapping[str, float]
    finished: bool
    store_files: Mapping[str, Path]


def log_file(folder: Path) -> Path | None:
    """The log in the folder of a W&B run; None where it is no such folder."""
    found = sorted(folder.glob("run-*.wandb")) if folder.is_dir() else []
    return found[0] if len(found) == 1 else None


def read_wandb_folder(folder: Path) -> WandbRun:
    """Read the run in ``folder``. Raises WandbLogError where there is no log, or another kind of file."""
    path = log_file(folder)
    if path is None:
        raise WandbLogError(f"{folder} holds no log of a W&B run. Next step: give a folder like wandb/offline-run-….")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    staged: dict[str, Path] = {}
    finished = False
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            _update(config, record.run.config.update)
        elif kind == "config":
            _update(config, record.config.update)
        elif kind == "summary":
            _update(summary, record.summary.update)
        elif kind == "history":
            history.append(_update({}, record.history.item))
        elif kind == "artifact" and record.artifact.type == STORE_TYPE:
            staged = {each.path: Path(each.local_path) for each in record.artifact.manifest.contents}
        elif kind == "exit":
            finished = record.exit.exit_code == 0
    there = staged if all(each.is_file() for each in staged.values()) else {}
    name = path.stem.removeprefix("run-")
    return WandbRun(name, config.get("smda") or {}, rows_of(history), numbers_of(summary), finished, there)


def rows_of(history: Iterable[Mapping[str, Any]]) -> Rows:
    """Our metrics of a run's history, in the order of logging: one row per optimizer step, ascending."""
    found: dict[int, dict[str, float]] = {}
    for row in history:
        numbers = numbers_of(row)
        if numbers and isinstance(row.get(STEP), int | float):
            found.setdefault(int(row[STEP]), {}).update(numbers)
    return tuple(sorted(found.items()))


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Those values of a row, or of a summary, that are numbers of ours."""
    return {
        name: float(value)
        for name, value in row.items()
        if name.startswith("smda/") and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _update(values: dict[str, Any], items: Iterable[Any]) -> dict[str, Any]:
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        place = values
        for key in outer:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[last] = json.loads(item.value_json)
    return values


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    for data in _payloads(path):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        yield record


def _payloads(path: Path) -> Iterator[bytes]:
    """The records' bytes, up to the first that is not whole."""
    content = path.read_bytes()
    if len(content) < _HEADER or struct.unpack_from("<4sHB", content) != _BEGINNING:
        raise WandbLogError(f"{path} is no log of a W&B run, or one of another version. Next step: give the run store.")
    at = _HEADER
    pieces: list[bytes] = []
    while at + _HEADER <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # no header fits: the block ends in zeros
            at += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", content, at)
        data = content[at + _HEADER : at + _HEADER + length]
        if kind == 0 or len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != crc:
            return
        at += _HEADER + length
        pieces = [data] if kind in (_FULL, _FIRST) else [*pieces, data]
        if kind in (_FULL, _LAST):
            yield b"".join(pieces)
            pieces = []
