"""Read a run store: during the run, after it, or after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.records import Alert, NoiseFloor, PolicyRecord, Probe, RunEnd, RunStart, WindowRecord
from smda_callbacks.sinks import files
from smda_callbacks.sinks.attribution import is_audit
from smda_callbacks.sinks.codec import decode
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.wandb_private import PROBES_SHOWN

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RunStore:
    """A run store that was opened for reading; writes nothing.

    What was known before training is read once, by :meth:`open`. Windows, alerts and the end are read from disk at
    every call, so that a reader follows a run that is still going on.
    """

    path: Path
    manifest: Mapping[str, Any]
    probes: tuple[Probe, ...]
    policy: PolicyRecord
    noise: NoiseFloor | None
    baseline: WindowRecord
    gaps_start: tuple[Mapping[str, Any], ...]

    @classmethod
    def open(cls, path: str | Path, *, shown: bool = False) -> RunStore:
        """Open the store in the folder ``path``; ``shown``: a copy that W&B was sent without texts will do, too.

        Raises StoreError: no run store, a half-written one, another schema version, or a missing or damaged file.
        """
        root = Path(path)
        manifest = files.read_manifest(root)
        noise = root / files.NOISE
        return cls(
            path=root,
            manifest=manifest,
            probes=_read_probes(root, shown),
            policy=read_policy(root),
            noise=files.read_record(noise, NoiseFloor) if noise.exists() else None,
            baseline=_read_baseline(root),
            gaps_start=tuple(files.read_json(root / files.GAPS)),
        )

    @cached_property
    def start(self) -> RunStart:
        """The record that the run was opened with; the manifest as stored, schema version and hashes included."""
        return RunStart(self.manifest, self.probes, self.policy, self.baseline, self.gaps_start, self.noise)

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """Category names in the order of first appearance among the probes."""
        return tuple(dict.fromkeys(probe.category for probe in self.probes))

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """Category number of every probe, ``[probe]``, into :attr:`categories`."""
        return np.array([self.categories.index(probe.category) for probe in self.probes], dtype=np.int64)

    def windows(self) -> list[WindowRecord]:
        """All windows that are wholly there, by step, of any status; without the baseline."""
        return [self._record(step) for step in files.list_steps(self.path) if step != self.baseline.step]

    def window(self, step: int) -> WindowRecord:
        """The record of the window that ends at ``step``; at the first step of all, the baseline.

        Raises StoreError where no window ends there.
        """
        steps = files.list_steps(self.path)
        if step not in steps:
            near = ", ".join(str(each) for each in sorted(steps, key=lambda each: abs(each - step))[:3])
            raise StoreError(f"no window of {self.path} ends at step {step}; the nearest end at {near}. See windows().")
        return self._record(step)

    def last_ok(self, step: int | None = None) -> WindowRecord:
        """The last ok record, up to ``step`` if given, else the baseline: what the next window starts from.

        In an audit, where every window starts from the baseline, that is the baseline.
        """
        if is_audit(self.manifest):
            return self.baseline
        for each in reversed(files.list_steps(self.path)):
            if each != self.baseline.step and (step is None or each <= step):
                record = self._record(each)
                if record.status == "ok":
                    return record
        return self.baseline

    def alerts(self) -> list[Alert]:
        """All alerts by step: those of the windows and those outside of them."""
        outside = [decode(Alert, row) for row in files.read_rows(self.path / files.ALERTS)]
        inside = [alert for window in (self.baseline, *self.windows()) for alert in window.alerts]
        return sorted(inside + outside, key=lambda alert: alert.step)

    def logged(self) -> list[dict[str, Any]]:
        """Entries of ``logged.jsonl``, what was sent to a tracker: ``{"step", "row"}`` or ``{"step", "summary"}``."""
        return files.read_rows(self.path / files.LOGGED)

    @property
    def end(self) -> RunEnd | None:
        """How the run ended; None while it runs, and after a kill."""
        path = self.path / files.END
        return decode(RunEnd, files.read_json(path)) if path.exists() else None

    def table(self, name: str) -> pa.Table:
        """One of the tables of :mod:`smda_callbacks.sinks.tables`, built from the windows as they are now.

        Raises StoreError for an unknown name.
        """
        from smda_callbacks.sinks.tables import build_table  # pyarrow is loaded when it is needed, not before

        return build_table(self, name)

    def _record(self, step: int) -> WindowRecord:
        path = files.step_file(self.path, step)
        record: WindowRecord = files.read_record(path, WindowRecord)
        if record.step != step:
            raise files.damaged(path, ValueError(f"it holds the record of step {record.step}"))
        return record


def read_policy(folder: str | Path) -> PolicyRecord:
    """The policy in ``folder``, a run store or any other folder with ``policy.json`` and ``policy.safetensors``.

    Raises StoreError: there is none, or a file of it is damaged.
    """
    root = Path(folder)
    json_file, arrays_file = root / f"{files.POLICY}.json", root / f"{files.POLICY}.safetensors"
    absent = [path.name for path in (json_file, arrays_file) if not path.exists()]
    if absent and not (root / files.MANIFEST).exists():  # no run store, which is told below what it lacks
        raise StoreError(
            f"no policy in {root}: {' and '.join(absent)} missing. Give the folder of a run store, or one that smda "
            "distill --out wrote."
        )
    value, arrays = files.read_json(json_file), files.read_arrays(arrays_file)
    try:
        policy: PolicyRecord = decode(PolicyRecord, value, arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise files.damaged(json_file, error) from error
    return policy


def _read_probes(root: Path, shown: bool) -> tuple[Probe, ...]:
    """The probes; from a copy that was sent without them, where ``shown``, with whatever stands for their texts."""
    path = root / files.PROBES
    if shown and not path.exists():
        path = root / PROBES_SHOWN
    if not path.exists():
        raise files.missing(root / files.PROBES)
    return tuple(decode(Probe, {**row, "text": row["text"] or ""}) for row in files.read_rows(path))


def _read_baseline(root: Path) -> WindowRecord:
    steps = files.list_steps(root)
    if not steps:
        raise files.missing(files.step_file(root, 0))
    baseline: WindowRecord = files.read_record(files.step_file(root, steps[0]), WindowRecord)
    if baseline.shift or baseline.status != "ok":
        raise StoreError(
            f"the first record, of step {baseline.step}, is a window: the baseline is missing from the run store "
            f"{root}. Restore the folder from a copy."
        )
    return baseline
