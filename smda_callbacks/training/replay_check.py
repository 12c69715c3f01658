"""Is a recorded run gone through again as it was? Checked before anything is computed from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from smda_callbacks.observe.metagradient import TrajectoryStep, step_gradient
from smda_callbacks.sinks.rescored import Verified
from smda_callbacks.sinks.trajectory import TrajectoryError
from smda_callbacks.training.replay import Replay
from smda_callbacks.training.trajectory_read import RecordedStep, RunState, read_state, same

Which = Literal["some", "all"]

#: How far the plain loss's gradient may be from the trainer's, relative: in full precision, and in mixed.
GRADIENT, GRADIENT_MIXED = 1e-4, 5e-2

#: How many stretches between recorded states are checked beside the first and the last.
BETWEEN = 3


class NotTheSameRunError(TrajectoryError):
    """The run, gone through again, is another one."""


def stretches(states: tuple[int, ...]) -> list[tuple[int, int]]:
    """From one recorded state to the next."""
    return list(pairwise(states))


def chosen(states: tuple[int, ...], which: Which) -> list[tuple[int, int]]:
    """The stretches to check: all, or the first, the last, and a few in between."""
    every = stretches(states)
    if which == "all" or len(every) <= BETWEEN + 2:
        return every
    places = {round(k * (len(every) - 1) / (BETWEEN + 1)) for k in range(BETWEEN + 2)}
    return [every[place] for place in sorted(places)]


def verify(
    replay: Replay, which: Which = "some", tolerance: float = 0.0, tick: Callable[[], object] = lambda: None
) -> Verified:
    """Make recorded steps again and compare bit by bit with what was recorded, and the plain loss with the trainer's.

    ``tolerance``: how far weights may be from the recorded ones, over how far the stretch moved them; 0: not at all.

    Raises:
        NotTheSameRunError: they differ by more; says where, by how much, and what to look at.
    """
    steps: list[int] = []
    worst, worst_step, exact, worst_gradient = 0.0, None, True, 0.0
    for first, last in chosen(replay.folder.states, which):
        for state, recorded in replay.walk(first, last):
            steps.append(recorded.number)
            end = state, recorded
            tick()
        after, gradient = replay.step(*end)
        away, equal = check_end(replay, first, after, tolerance)
        exact = exact and equal
        if away > worst:
            worst, worst_step = away, last
        worst_gradient = max(worst_gradient, check_gradient(replay, *end, gradient))
    return Verified(tuple(steps), exact, worst, worst_step, worst_gradient)


def check_end(replay: Replay, first: int, after: RunState, tolerance: float) -> tuple[float, bool]:
    """How far ``after``, reached from the state ``first``, is from the recorded state, and whether it is the same."""
    wanted = read_state(replay.folder.path, after.step)
    if same(after, wanted):
        return 0.0, True
    start = read_state(replay.folder.path, first)
    away = _distance(after.weights, wanted.weights) / max(_distance(wanted.weights, start.weights), 1e-300)
    if not away <= tolerance or tolerance == 0:
        meta = replay.meta
        raise NotTheSameRunError(
            f"gone through again, the run is another one: after step {after.step} the weights are {away:.2g} of what "
            f"steps {first + 1} to {after.step} moved them away from the recorded ones (0: it is the optimizer's state "
            f"that differs). Look at versions (torch {meta['versions']['torch']}, transformers "
            f"{meta['versions']['transformers']} then), threads ({meta['threads']} then) and hardware "
            f"({meta['hardware']} then). Next step: go where they are the same, or allow a tolerance, which makes "
            "influences of a run close by."
        )
    return away, False


def check_gradient(replay: Replay, state: RunState, recorded: RecordedStep, gradient: tuple[Tensor, ...]) -> float:
    """Relative distance of the plain loss's gradient from ``gradient``, the trainer's.

    Raises:
        NotTheSameRunError: it is too far: the run's loss is another one.
    """
    replay.place(state)
    found = step_gradient(replay.shares(recorded), replay.losses, replay.parameters)
    error = _distance(found, gradient) / max(_distance(gradient, tuple(map(torch.zeros_like, gradient))), 1e-300)
    whole = all(each.dtype in (torch.float32, torch.float64) for each in replay.model.parameters())
    limit = GRADIENT if whole and not replay.trainer.args.bf16 else GRADIENT_MIXED
    if not error <= limit:
        raise NotTheSameRunError(
            f"the gradient of the plain loss (cross-entropy over the trained tokens) is {error:.2g} away from the "
            f"trainer's in step {recorded.number}, allowed is {limit:g}: the run was trained with another loss. "
            "Influences can be had for trainings with the plain loss."
        )
    return error


def backwards(replay: Replay, last: int, tolerance: float = 0.0) -> Iterator[TrajectoryStep]:
    """The run's steps, from ``last`` to the first, each as it started.

    Where not every state was recorded, those in between are computed again, a stretch at a time, and checked.
    """
    for first, end in reversed(stretches(replay.folder.states)):
        if first >= last:
            continue
        walked = list(replay.walk(first, min(end, last)))
        if end - first > 1 and end <= last:
            after, _ = replay.step(*walked[-1])
            check_end(replay, first, after, tolerance)
        for state, recorded in reversed(walked):
            yield replay.trajectory_step(state, recorded)


def _distance(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> float:
    return float(
        sum(float((a.double() - b.double()).square().sum()) for a, b in zip(first, second, strict=True)) ** 0.5
    )
