"""Offline runs of W&B, and what its own reader finds of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import wandb

from smda_callbacks.records import Alert, RunEnd, RunStart, WindowRecord
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.wandb_sink import WandbSink


@contextmanager
def offline_wandb(root: Path) -> Iterator[None]:
    """W&B with nothing set but that it is offline and where it writes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
            patch.setenv(f"WANDB_{name}", str(root))
        patch.setenv("WANDB_MODE", "offline")
        for name in ("PROJECT", "CONSOLE", "INIT_TIMEOUT", "FINISH_TIMEOUT", "X_TRANSACTION_LOG_FLUSH_INTERVAL"):
            patch.delenv(f"WANDB_{name}", raising=False)
        wandb.teardown()  # an earlier test may have made W&B read another environment
        yield
        wandb.teardown()


@dataclass(frozen=True)
class Logged:
    """A run that was logged, and what W&B's reader found of it."""

    start: RunStart
    windows: list[WindowRecord]
    folder: Path
    store: Path
    records: list[dict[str, Any]]
    sink: WandbSink

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows, without what W&B adds itself."""
        rows = [each["history"]["item"] for each in self.records if each["type"] == "history"]
        return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics."""
        return [row for row in self.history if not any("/tables/" in name or "/plots/" in name for name in row)]

    def merged(self, kind: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for each in self.records:
            if each["type"] == kind:
                found |= each[kind].get("update", {})
        return found

    def table(self, key: str) -> list[dict[str, Any]]:
        """All versions of a table, as W&B keeps them."""
        paths = [row[f"{key}.path"] for row in self.history if f"{key}.path" in row]
        return [json.loads((self.folder / "files" / path).read_text()) for path in paths]

    def contents(self, kind: str) -> set[str]:
        """Names of the files in the artifact of type ``kind``."""
        artifacts = [each["artifact"] for each in self.records if each["type"] == "artifact"]
        found = next(artifact for artifact in artifacts if artifact["type"] == kind)
        return {each["path"] for each in found["manifest"]["contents"]}


def read_back(folder: Path) -> list[dict[str, Any]]:
    """All records of a finished run, by W&B's own reader."""
    program = shutil.which("wandb", path=sysconfig.get_path("scripts"))
    assert program is not None
    found = subprocess.run([program, "leet", "inspect", "--json", folder], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr or found.stdout[-2000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def log_records(
    store: Path, start: RunStart, windows: Iterable[WindowRecord], alerts: Iterable[Alert], end: RunEnd, **options: Any
) -> Logged:
    """Hand a run to a store and a sink with a run of its own; everything is closed twice."""
    sinks: list[Sink] = [StoreSink(store), WandbSink(store_path=store, **options)]
    records = list(windows)
    for sink in sinks:
        sink.open(start)
    for window in records:
        for sink in sinks:
            sink.write(window)
    assert isinstance(sinks[1], WandbSink)
    folder = Path(run_of(sinks[1]).dir).parent
    for sink in sinks:
        for alert in alerts:
            sink.alert(alert)
        sink.close(end)
        sink.close(end)
    wandb.teardown()  # without it the file may not be closed yet
    return Logged(start, records, folder, store, read_back(folder), sinks[1])


def run_of(sink: WandbSink) -> Any:
    """The run of a sink, which is opened in the background."""
    for _ in range(3000):
        if sink.run is not None:
            return sink.run
        time.sleep(0.01)
    raise AssertionError("no W&B run was opened")


def all_bytes(root: Path) -> bytes:
    """Everything below ``root``: the run and the staged artifacts, whatever their format."""
    return b"\n".join(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())
