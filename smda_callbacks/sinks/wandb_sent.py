"""What a W&B run has of a run already, so that nothing is sent to it twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smda_callbacks.sinks.metrics import ALERTS, STEP, UNREADABLE

#: Seconds that one answer of the server may take.
TIMEOUT = 30


class SyncError(ValueError):
    """A stored run that cannot be sent to W&B."""


@dataclass(frozen=True)
class Sent:
    """What a W&B run has: steps of its ``rows`` of windows; number of ``alerts`` outside windows by step; ``tables`` by
    key in the history and step; types of its ``artifacts``; its ``summary``."""

    rows: frozenset[int] = frozenset()
    alerts: Mapping[int, int] = field(default_factory=dict)
    tables: frozenset[tuple[str, int]] = frozenset()
    artifacts: frozenset[str] = frozenset()
    summary: Mapping[str, Any] = field(default_factory=dict)

    def has_summary(self, values: Mapping[str, float]) -> bool:
        """Whether the run's summary says the same."""
        return all(name in self.summary and np.isclose(self.summary[name], value) for name, value in values.items())


@dataclass(frozen=True)
class Into:
    """The W&B run that a stored run is sent into, what it has already, and seconds that its end may take."""

    id: str
    project: str | None = None
    entity: str | None = None
    sent: Sent = field(default_factory=Sent)
    patience: float = 600.0


def read_sent(run_id: str, project: str, entity: str | None, keys: Iterable[str]) -> Sent:
    """What the W&B server has of the run ``run_id``; nothing where there is no such run. ``keys``: of tables.

    Raises SyncError where the server cannot be asked.
    """
    import wandb

    try:
        api = wandb.Api(timeout=TIMEOUT)
        path = f"{entity or api.default_entity}/{project}/{run_id}"
        run = _find(api, path)
        return Sent() if run is None else _sent(run, keys)
    except Exception as error:  # W&B raises errors of many kinds; the user can do the same about all of them
        raise SyncError(
            f"the W&B server cannot be asked what it has of run {run_id!r} ({type(error).__name__}: {error}). Nothing "
            "was sent. Next step: check wandb login and the network and try again, or write it with --mode offline."
        ) from error


def _find(api: Any, path: str) -> Any:
    try:
        run = api.run(path)
        run.load(force=True)
    except Exception as error:
        if "could not find run" in str(error).lower() or "not found" in str(error).lower():
            return None
        raise
    return run


def _sent(run: Any, keys: Iterable[str]) -> Sent:
    rows = frozenset(_steps(run, UNREADABLE))
    alerts = Counter(_steps(run, ALERTS))
    alerts.subtract(rows)
    return Sent(
        rows=rows,
        alerts=+alerts,
        tables=frozenset((key, step) for key in keys for step in _steps(run, key)),
        artifacts=frozenset(artifact.type for artifact in run.logged_artifacts()),
        summary=dict(run.summary.items()),
    )


def _steps(run: Any, key: str) -> list[int]:
    """Steps of the rows that have ``key``."""
    return [int(row[STEP]) for row in run.scan_history(keys=[STEP, key])]
