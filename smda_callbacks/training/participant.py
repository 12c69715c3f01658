"""The part of the processes that do not lead: read when the first one says so. They keep no books and no sinks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.noise import RandomMoves, trained_parameters
from smda_callbacks.observe.reading import Part
from smda_callbacks.observe.sharding import Command, ProcessError, Team, told
from smda_callbacks.training.plan import Plan


class Participant:
    """One process beside the leading one."""

    def __init__(self, plan: Plan, model: nn.Module, tokenizer: Any, team: Team) -> None:
        self.plan, self.model, self.tokenizer, self.team = plan, model, tokenizer, team
        self._full: Instrument | None = None
        self._narrowed: Instrument | None = None
        self._moves = RandomMoves(trained_parameters(model))

    def serve(self) -> None:
        """Do what the leading process asks for, until it goes on with training.

        Raises:
            ProcessError: the leading process gave up; training cannot go on without it.
        """
        while (command := self.team.hear()).what == "read":
            self.team.answer(lambda asked=command: self._read(asked))  # type: ignore[misc]
        if command.what == "stop":
            raise ProcessError(f"the main process stopped: {command.text}")

    def _read(self, command: Command) -> list[Part]:
        instrument = self._instrument(command.features)
        moved = contextlib.nullcontext() if command.move is None else self._moves.applied(command.move)
        with moved:
            return instrument.read_share(self.model)

    def _instrument(self, features: tuple[int, ...] | None) -> Instrument:
        """Made at the first reading: the leading process has the SAE by then, so only one downloads it."""
        if self._full is None:
            full = self.plan.instrument(self.model, self.tokenizer, self.plan.load_sae())
            self._full = full.with_team(self.team)
        if features is None:
            return self._full
        if self._narrowed is None or self._narrowed.command.features != features:
            self._narrowed = self._full.of_features(np.array(features, dtype=np.int64))
        return self._narrowed


@contextlib.contextmanager
def leading(team: Team | None) -> Iterator[None]:
    """Context of everything that the leading process may read at one event of the trainer.

    On leaving it the others go on with training; where it raises, they raise too, instead of waiting for ever.
    """
    try:
        yield
    except Exception as error:
        if team is not None:
            with contextlib.suppress(Exception):
                team.tell(Command("stop", text=told(error)))
        raise
    if team is not None:
        team.tell(Command("done"))
