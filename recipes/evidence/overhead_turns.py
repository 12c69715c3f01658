"""Trainings that make one optimizer step each in turn, in one process: a machine that slows down slows all of them
alike.

Each has a thread, and one at a time runs: a baton goes from step to step. The state of the random generators goes with
it, so that every training draws what it would draw alone. The order of the turns is turned round at every step.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from trl import SFTTrainer

#: Steps of a row, steps that warm up, steps of a block that a ratio is taken over. Rows that take long make few.
STEPS, FEW = (30, 10, 10), {"exact": (3, 1, 1), "by_hand": (3, 1, 1), "exact_every_10": (10, 0, 10)}

#: What a training runs inside of.
Around = Callable[[SFTTrainer], AbstractContextManager[None]]


class Racer(TrainerCallback):
    """One training, which waits for its first turn. Add no callback to the trainer after making it: it has to come
    last.

    ``seconds``: processor time of every step, from the end of the last to its own, all callbacks included; ``start``:
    what comes before the first. ``weights``: a digest of the trained weights after every step.
    """

    def __init__(self, name: str, trainer: SFTTrainer, around: Around | None = None) -> None:
        self.name, self.trainer = name, trainer
        self.around = around or (lambda _: contextlib.nullcontext())
        self.seconds: list[float] = []
        self.weights: list[str] = []
        self.start = 0.0
        self.error: Exception | None = None
        self.done = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._began = 0.0
        self._random = _random_state()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def turn(self) -> None:
        """Let it make a step, and wait for that; nothing where it has ended."""
        if not self.done:
            self._go.release()
            self._back.acquire()

    def _run(self) -> None:
        self._take()
        try:
            with self.around(self.trainer):
                # Only now: what a peer has added comes before.
                self.trainer.add_callback(self)
                self.trainer.train()
        except Exception as error:
            self.error = error
        finally:
            self.done = True
            self._back.release()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.seconds:
            now = time.process_time()
            self.start, self._began = now - self._began, now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._began)
        self.weights.append(_digest(kwargs["model"]))
        self._random = _random_state()
        self._back.release()
        self._take()

    def _take(self) -> None:
        self._go.acquire()
        _put_random_state(self._random)
        self._began = time.process_time()

    @property
    def losses(self) -> list[float]:
        """What the trainer logged, step by step."""
        return [row["loss"] for row in self.trainer.state.log_history if "loss" in row]


def race(racers: Sequence[Racer], tick: Callable[[], object] = lambda: None) -> None:
    """Let all of them run to their ends, a step each in turn."""
    before = _random_state()
    order = list(racers)
    while not all(racer.done for racer in order):
        for racer in order:
            racer.turn()
        order.reverse()
        tick()
    _put_random_state(before)


def unlike(racers: Sequence[Racer], plain: Racer) -> list[str]:
    """Names of those whose losses or weights are not the plain training's, bit for bit, at every step they made."""
    return [
        racer.name
        for racer in racers
        if racer.losses != plain.losses[: len(racer.losses)]
        or racer.weights != plain.weights[: len(racer.weights)]
        or len(racer.losses) != len(racer.weights)
    ]


def blocks(steps: int, warm: int, size: int) -> list[range]:
    """Blocks of step indices that figures are taken over, after a warm-up; all but the first step of a short run."""
    found = [range(at, at + size) for at in range(warm, steps - size + 1, size)]
    return found or [range(1, steps)]


def ratios(racer: Racer, plain: Racer, warm: int, size: int) -> list[float]:
    """Per block of steps, time of this training over that of the plain one."""
    made = len(racer.seconds)
    return [
        sum(racer.seconds[k] for k in block) / sum(plain.seconds[k] for k in block)
        for block in blocks(made, warm, size)
    ]


def _digest(model: Any) -> str:
    found = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _put_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
