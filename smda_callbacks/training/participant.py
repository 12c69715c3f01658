"""The part of the processes that do not lead: read when the first one says so. They keep no books and no sinks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import nn

from smda_callbacks.observe.divided import BrokenPassError, is_divided
from smda_callbacks.observe.gradient_share import GradientShare
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.lora import lora_sites
from smda_callbacks.observe.noise import RandomMoves, trained_parameters
from smda_callbacks.observe.pair_gradients import PairCapture
from smda_callbacks.observe.pair_team import PairSender
from smda_callbacks.observe.reading import Part
from smda_callbacks.observe.sharding import Command, Move, ProcessError, Team, help_with_weights, told
from smda_callbacks.observe.zero3 import let_go
from smda_callbacks.training.attribution_start import make_capture
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.row_identity import training_runs


class Participant:
    """One process beside the leading one."""

    def __init__(self, plan: Plan, model: nn.Module, tokenizer: Any, team: Team) -> None:
        self.plan, self.model, self.tokenizer, self.team = plan, model, tokenizer, team
        self._full: Instrument | None = None
        self._narrowed: Instrument | None = None
        self._moves = RandomMoves(trained_parameters(model))
        self._divided = is_divided(model)
        # Asked now, in the trainer's own loop: later it is a loop over an epoch, which ends before the training does.
        self._training = training_runs()
        self._sender = PairSender(self._capture, team)
        self._sends = False
        self._share = GradientShare(model, team)

    def serve(self) -> None:
        """Do what the leading process asks for, until it goes on with training.

        Raises:
            ProcessError: the leading process gave up; training cannot go on without it.
        """
        while (command := self.team.hear()).what not in ("done", "stop"):
            self._do(command)
        self._share.forget()
        if command.what == "stop":
            raise ProcessError(f"the main process stopped: {command.text}")
        self._sends = command.capture
        if not self._sends:
            self._sender.end()

    def _do(self, command: Command) -> None:
        """One thing that is done together; what goes wrong with a reading is sent, not raised."""
        if command.what == "weights":
            help_with_weights(self.model, command.names)
        elif command.what == "sum":
            self._add_up()
        else:
            self.team.answer(lambda: self._read(command), divided=self._divided)

    def _add_up(self) -> None:
        with contextlib.suppress(ProcessError):  # the main process has the same, and tells
            self._share.add_up()

    def begin_step(self) -> None:
        """Capture the gradients of this process's examples, where they are wanted; likewise the other two."""
        if self._sends:
            self._sender.begin_step()

    def before_step(self, optimizer: Any) -> None:
        if self._sends:
            self._sender.before_step()

    def after_step(self, optimizer: Any) -> None:
        if self._sends:
            self._sender.after_step()

    def _capture(self) -> PairCapture:
        assert self._full is not None  # the baseline was read
        sites = lora_sites(self.model)
        return make_capture(
            self.model, sites, self._full, self.plan.attribution, self.tokenizer, training=self._training
        )

    def _read(self, command: Command) -> list[Part]:
        instrument = self._instrument(command.features)
        if command.what != "read":
            return self._share.parts(command, instrument)
        self._share.forget()
        moved = contextlib.nullcontext() if command.move is None else self._moved(command.move)
        with moved:
            return instrument.read_share(self.model)

    @contextlib.contextmanager
    def _moved(self, move: Move) -> Iterator[None]:
        """Weights moved. Where that fails, what is gathered is let go of, as the main process does after every move."""
        try:
            with self._moves.applied(move):
                yield
        except Exception:
            let_go(trained_parameters(self.model))
            raise

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
def leading(team: Team | None, captures: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Context of everything that the leading process may read at one event of the trainer.

    On leaving it the others go on with training, and capture their examples if ``captures`` says so; where it raises,
    they raise too, instead of waiting for ever.
    """
    try:
        yield
    except BrokenPassError:  # the others are not listening: they end with this process
        raise
    except Exception as error:
        if team is not None:
            with contextlib.suppress(Exception):
                team.tell(Command("stop", text=told(error)))
        raise
    if team is not None:
        team.tell(Command("done", capture=captures()))
