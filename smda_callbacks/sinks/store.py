"""Write a run into a folder, append-only, so that a kill at any moment loses at most the step in flight.

The folder is described in :mod:`smda_callbacks.sinks.files` and read by
:class:`smda_callbacks.sinks.store_reader.RunStore`, also while it is being written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from smda_callbacks.records import (
    SCHEMA_VERSION,
    Alert,
    PolicyRecord,
    RunEnd,
    RunStart,
    WindowRecord,
    policy_hash,
    probe_hash,
)
from smda_callbacks.sinks import files
from smda_callbacks.sinks.codec import dumps, encode
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.resume import check_same_run, set_aside


class StoreSink:
    """The run store of one run, in the folder ``path``.

    ``resume=False`` takes a folder that is missing or empty. ``resume=True`` goes on with the store of the same run:
    the resumed step is ``start.baseline.step``; records up to it are kept, later ones are set aside under
    ``steps/superseded-N-*`` (likewise later alerts and logged rows, and ``end.json``), and everything that was written
    before training stays as it was, the baseline too. The next window must begin where the last kept one ended:
    :meth:`~smda_callbacks.sinks.store_reader.RunStore.last_ok` gives the state that its shift starts from.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        self.resume = resume
        self._last: int | None = None  # last step in the store; None before open
        self._closed = False

    def open(self, start: RunStart) -> None:
        """Create the store, or go on with it.

        Raises StoreError, before anything is written, as :func:`check_writable`; where the store to resume belongs to
        another run, or starts after the resumed step; and where a hash in the manifest is not that of its object.
        """
        if self._last is not None or self._closed:
            raise StoreError(f"this StoreSink of {self.path} was opened before; it takes one run. Make a new one.")
        check_writable(self.path, resume=self.resume)
        manifest = _manifest(start)
        if self.resume:
            check_same_run(self.path, manifest, start.baseline.step)
            set_aside(self.path, start.baseline.step)
        else:
            _write_head(self.path, start, manifest)
        self._last = files.list_steps(self.path)[-1]

    def write(self, window: WindowRecord) -> None:
        """Add the record of a window, whole or not at all.

        Raises StoreError if the sink is not open, or if the window does not end after the last one in the store.
        """
        last = self._opened()
        if window.step <= last:
            raise StoreError(
                f"the window ends at step {window.step}, but {self.path} already reaches step {last}; a store only "
                "grows. Write every window once and in order; to go back to a checkpoint, resume the store."
            )
        files.write_record(files.step_file(self.path, window.step), window)
        self._last = window.step

    def alert(self, alert: Alert) -> None:
        """Append an alert that belongs to no window. Raises StoreError if the sink is not open."""
        self._opened()
        files.append_row(self.path / files.ALERTS, encode(alert)[0])

    def close(self, end: RunEnd) -> None:
        """Write ``end.json`` and the tables. Does nothing the second time, or where ``open`` had refused."""
        if self._closed or self._last is None:
            return
        self._closed = True
        from smda_callbacks.sinks.tables import write_tables  # pyarrow is loaded when it is needed, not before

        files.write_json(self.path / files.END, encode(end)[0])
        write_tables(self.path)

    def _opened(self) -> int:
        if self._last is None or self._closed:
            state = "closed" if self._closed else "not open"
            raise StoreError(
                f"the store {self.path} is {state}; records go in between open and close. Call open(start) first."
            )
        return self._last


def check_writable(path: str | Path, *, resume: bool = False) -> None:
    """Refuse a folder in which a run cannot be recorded; writes nothing, so call it as early as you like.

    Raises StoreError: the path cannot be written to; it holds something that is no run store, or a store that was never
    finished being created; a store is there and ``resume`` is False, or none is and ``resume`` is True; the store has
    another schema version.
    """
    path = Path(path)
    if path.exists():
        _check_content(path, resume)
    elif resume:
        raise StoreError(
            f"there is no run store at {path} to resume. Check the path, or start a new run with resume=False."
        )
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise StoreError(
            f"the run store {path} cannot be written: {error.strerror or error} at {nearest}. Choose a folder in "
            "which this process may create files."
        ) from error


def _check_content(path: Path, resume: bool) -> None:
    if not path.is_dir():
        raise StoreError(f"{path} is a file; a run store is a folder of its own. Choose another path.")
    names = {item.name.removesuffix(".part") for item in path.iterdir()}
    if files.MANIFEST in {item.name for item in path.iterdir()}:
        files.read_manifest(path)
        if not resume:
            raise StoreError(
                f"{path} already holds a run, and a store is never overwritten. Choose another path (store.dir). "
                "A training that resumes from a checkpoint goes on with its store; a StoreSink does with resume=True."
            )
    elif names and names <= files.HEAD | {files.MANIFEST}:
        raise files.half_written(path)
    elif names:
        raise StoreError(
            f"{path} holds {', '.join(sorted(names)[:5])}, which is no run store; allowed is a missing or empty "
            "folder. Choose a folder of its own for every run."
        )
    elif resume:
        raise StoreError(
            f"{path} is empty; there is no run to resume. Check the path, or start a new run with resume=False."
        )


def _manifest(start: RunStart) -> dict[str, Any]:
    """The manifest as written: the schema version first, the hashes filled in or checked."""
    rest = {key: value for key, value in start.manifest.items() if key != "schema_version"}
    hashes = {"probe_hash": probe_hash(start.probes), "policy_hash": policy_hash(start.policy)}
    for name, found in hashes.items():
        if rest.setdefault(name, found) != found:
            raise StoreError(
                f"the manifest says {name} {rest[name]!r}, but that of the run's {name[:-5]} is {found!r}; they must "
                f"be the same. Make the manifest with records.{name}()."
            )
    return {"schema_version": SCHEMA_VERSION, **rest}


def write_policy(folder: Path, policy: PolicyRecord) -> None:
    """Save a policy, so that :func:`~smda_callbacks.sinks.store_reader.read_policy` reads it back bit for bit."""
    folder.mkdir(parents=True, exist_ok=True)
    value, arrays = encode(policy)
    files.write_atomic(folder / f"{files.POLICY}.safetensors", save(arrays))
    files.write_json(folder / f"{files.POLICY}.json", value)


def _write_head(path: Path, start: RunStart, manifest: Mapping[str, Any]) -> None:
    """Everything known before training. The manifest comes last: with it the folder becomes a store."""
    dumps([manifest, start.gaps])  # refuses what JSON cannot hold before the first file is there
    (path / files.STEPS).mkdir(parents=True, exist_ok=True)
    files.write_atomic(path / files.PROBES, "".join(dumps(vars(probe)) + "\n" for probe in start.probes).encode())
    write_policy(path, start.policy)
    if start.noise is not None:
        files.write_record(path / files.NOISE, start.noise)
    files.write_json(path / files.GAPS, list(start.gaps))
    files.write_record(files.step_file(path, start.baseline.step), start.baseline)
    files.write_json(path / files.MANIFEST, manifest)
