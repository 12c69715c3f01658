"""How a sink comes to its W&B run, and what the run is told first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smda_callbacks.records import RunStart
from smda_callbacks.sinks import wandb_media, wandb_run, wandb_runs
from smda_callbacks.sinks.metrics import STEP, metric_names
from smda_callbacks.sinks.past import Past
from smda_callbacks.sinks.wandb_channel import Opening
from smda_callbacks.sinks.wandb_sent import Into


class Opener:
    """Finds or starts the run of ``start``; for the arguments see :class:`~smda_callbacks.sinks.wandb_sink.WandbSink`.

    ``guard(what, call)`` makes a call and keeps what it raises. Raises ValueError where two metrics would get one name.
    """

    def __init__(
        self,
        project: str | None,
        mode: str | None,
        past: Past | None,
        into: Into | None,
        guard: Callable[[str, Callable[[], object]], None],
    ) -> None:
        self.project, self.mode, self.past, self.into = project, mode, past, into
        self.before: Sequence[wandb_runs.Facts] = ()  # runs that the earlier part was sent to
        self._guard = guard
        self._start: RunStart | None = None
        self._logged: Path | None = None
        self._names: list[str] = []

    @property
    def opening(self) -> Opening:
        """For a :class:`~smda_callbacks.sinks.wandb_channel.Channel`."""
        return Opening(wandb_run.open_run, self._begin, self._introduce)

    def take(self, start: RunStart, logged: Path | None) -> None:
        """Take what the run begins with; ``logged``: its ``logged.jsonl``. W&B is not touched."""
        self._names = [*metric_names(start), *wandb_media.history_keys(start)]
        self._start, self._logged = start, logged

    def look_back(self) -> None:
        """Read which runs the earlier part was sent to."""
        self.before = wandb_runs.runs_before(self._logged, self.past)

    def _begin(self) -> Any:
        """A run of our own. May wait for the server."""
        assert self._start is not None
        known = self.before[-1] if self.before else None
        name = wandb_runs.run_name(self._start.manifest) if self._start.manifest.get("run_id") else None
        return wandb_run.start_run(self.project, self.mode, name, known, self.into)

    def _introduce(self, run: Any, own: bool) -> None:
        """Definitions, configuration and the note in the store; nothing here waits."""
        start = self._start
        assert start is not None
        if own:
            self._guard("defining the x axis", lambda: run.define_metric(STEP))
        self._guard("defining metrics", lambda: wandb_run.define(run, self._names))
        policy = {"lam": start.policy.lam, "features": len(start.policy.features)}
        facts = {"smda": dict(start.manifest), wandb_runs.POLICY_FACTS: policy, **wandb_runs.link(self.before, run)}
        self._guard("sending the configuration", lambda: run.config.update(facts, allow_val_change=True))
        if self.into is None:
            note = partial(wandb_runs.note_run, self._logged, self.before, run, own, self.past)
            self._guard("noting the run", note)
