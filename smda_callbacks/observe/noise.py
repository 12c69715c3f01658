"""How much would chance move? Readings under random LoRA updates of the size of an optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from smda_callbacks.maths.pathways import State, split_shift
from smda_callbacks.maths.uncertainty import rms_floor
from smda_callbacks.observe.divided import own_part, part_like, shape_of
from smda_callbacks.observe.guard import weights_restored
from smda_callbacks.observe.instrument import Instrument, arrays
from smda_callbacks.observe.reading import Reading
from smda_callbacks.observe.sharding import Move, Team, whole_weights
from smda_callbacks.observe.zero3 import let_go
from smda_callbacks.records import Array, NoiseFloor, PolicyRecord, Snapshot

#: Size of the second perturbation, relative to the first: small enough that only rounding is left.
ROUNDING_SCALE = 1e-3


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that training changes, in the order of their names."""
    return [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]


def random_readings(
    model: nn.Module, take: Callable[[], Reading], *, size: float, draws: int, seed: int = 0
) -> Iterator[Reading]:
    """Readings of ``model`` with every trained weight moved by ±``size`` at random; the weights come back bit for bit.

    AdamW moves a weight by about the learning rate per step whatever the gradient, so ``size`` = peak learning rate is
    an update as large as an optimizer step with all meaning taken out of its direction.

    Raises:
        ValueError: ``size`` or ``draws`` not positive.
    """
    if size <= 0 or draws <= 0:
        raise ValueError(f"size and draws must be positive, got size={size} and draws={draws}.")
    moves = RandomMoves(trained_parameters(model))
    for draw in range(draws):
        with moves.applied(Move(size, seed, draw)):
            yield take()


class RandomMoves:
    """Random updates of ``parameters``, the same ones wherever they are drawn: on every process, in one order.

    Where a process holds a part of a weight, that part of the weight's update is its own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._generator = torch.Generator()  # its own: the global random state belongs to training
        self._next = (0, -1)  # seed, and the draw that comes next

    @contextlib.contextmanager
    def applied(self, move: Move) -> Iterator[None]:
        """Context in which the weights are moved by ``move``; they come back bit for bit."""
        seed, done = self._next
        self._next = (move.seed, -1)  # until it is drawn to its end
        if seed != move.seed or not 0 <= done <= move.draw:
            self._generator.manual_seed(move.seed)
            done = 0
        for _ in range(done, move.draw):
            for parameter in self._parameters:
                self._signs(parameter)
        parts = [own_part(parameter) for parameter in self._parameters]
        with contextlib.ExitStack() as restored, weights_restored(parts), torch.no_grad():
            for part, parameter in zip(parts, self._parameters, strict=True):
                signs = part_like(self._signs(parameter), parameter)
                part.add_(signs.to(part.device, part.dtype), alpha=move.size)
            self._next = (move.seed, move.draw + 1)
            let_go(self._parameters)  # also once they are back: what a pass gathers meanwhile has moved
            restored.callback(let_go, self._parameters)
            yield

    def _signs(self, parameter: nn.Parameter) -> torch.Tensor:
        return torch.randint(0, 2, shape_of(parameter), generator=self._generator) * 2 - 1


class UpdateMeter:
    """Root mean square change per trained weight since the last reset. Keeps one copy of the trained weights.

    ``team``: helps where the weights are divided over its processes.
    """

    def __init__(self, model: nn.Module, team: Team | None = None) -> None:
        self._model, self._team, self._parameters = model, team, trained_parameters(model)
        self._before: list[torch.Tensor]
        self.reset()

    @property
    def before(self) -> list[torch.Tensor]:
        """The trained weights at the last reset, in the order of their names."""
        return self._before

    def start_from(self, before: Sequence[torch.Tensor]) -> None:
        """Go on with a window that began at the weights ``before``."""
        pairs = zip(before, self._before, strict=True)
        self._before = [each.to(now.device, now.dtype) for each, now in pairs]

    def reset(self) -> None:
        """Start a new window here."""
        self._before = self._now()

    def rms(self) -> float:
        """Root mean square change per trained weight."""
        squares, count = 0.0, 0
        for now, before in zip(self._now(), self._before, strict=True):
            squares += (now - before).double().square().sum().item()
            count += now.numel()
        return float((squares / count) ** 0.5) if count else 0.0

    def _now(self) -> list[torch.Tensor]:
        return whole_weights(self._model, self._parameters, self._team)


def measure_noise(
    instrument: Instrument,
    model: nn.Module,
    policy: PolicyRecord,
    baseline: Snapshot,
    *,
    size: float,
    draws: int,
    seed: int = 0,
    measure: Callable[[State, State], Array] | None = None,
    start: NoiseFloor | None = None,
    tick: Callable[[], object] = lambda: None,
) -> NoiseFloor:
    """Noise floor of the policy's shifts and of every category's mean behaviour, from ``2 * draws`` readings.

    Rounding is that of moves a thousand times smaller. Given the floor of the ``start``, it is not measured but taken
    from there, grown as each random part has grown, for it goes through the same slopes: ``draws`` readings.

    Args:
        baseline: the snapshot of ``model`` as it is now.
        size: change of every trained weight, normally the peak learning rate.
        measure: further numbers ``[functional]`` of a change between two states, whose floors are wanted too.
        start: an earlier floor of the same run, of updates as large.
        tick: called after every reading, for a progress bar.
    """
    groups = instrument.probes.groups
    members = np.eye(groups.max() + 1)[:, groups]
    average = members / members.sum(axis=1, keepdims=True)  # [category, probe]
    before = State(baseline.pre, baseline.gate, baseline.y)

    def floors(scale: float, seed: int) -> tuple[dict[str, Array], Array, Array | None]:
        shifts, changes, others = [], [], []
        moves = (Move(size * scale, seed, draw) for draw in range(draws))
        for reading in random_readings(
            model, lambda: instrument.moved(next(moves)).read(model), size=size * scale, draws=draws, seed=seed
        ):
            after = State(*arrays(reading), instrument.scores(reading))
            shifts.append(split_shift(before, after, scale=policy.scale, lam=policy.lam).as_dict())
            changes.append(average @ (after.y - before.y))
            others.append(measure(before, after) if measure is not None else np.zeros(0))
            tick()
        functional = _root_mean_square(others) if measure is not None else None
        return rms_floor(shifts), _root_mean_square(changes), functional

    random = floors(1.0, seed)
    rounding = floors(ROUNDING_SCALE, seed + 1) if start is None else _grown(start, *random)
    return NoiseFloor(draws, size, random[0], rounding[0], random[1], rounding[1], random[2], rounding[2])


def _grown(
    start: NoiseFloor, random: Mapping[str, Array], behaviour: Array, functional: Array | None
) -> tuple[dict[str, Array], Array, Array | None]:
    """Rounding of the start, element by element as much larger as what random updates do.

    What was nothing but rounding there (a category that is always refused) says nothing of growth, and stays.
    """

    def grown(rounding: Array, before: Array, now: Array) -> Array:
        ratio = np.divide(now, before, out=np.ones_like(now), where=before > 2 * rounding)
        return rounding * ratio

    further = None
    if functional is not None and start.functional_random is not None and start.functional_rounding is not None:
        further = grown(start.functional_rounding, start.functional_random, functional)
    return (
        {part: grown(start.rounding[part], start.random[part], random[part]) for part in random},
        grown(start.behaviour_rounding, start.behaviour_random, behaviour),
        further,
    )


def _root_mean_square(draws: list[Array]) -> Array:
    found: Array = np.sqrt(np.mean(np.square(draws), axis=0))
    return found
