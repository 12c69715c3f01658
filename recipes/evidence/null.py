"""Runs in which nothing should happen: how often does the report call something above noise there?

The trained weights are moved at random, every one by ± the learning rate, which is what the noise floor is measured
with; other draws, and a floor from the usual few. A share of 1 - 2Φ(-2) = 0.046 is what a limit of twice the floor
gives where shifts are normal and the floor is known exactly.

* ``one step``: single moves from the start, as large as those of the floor;
* ``a thousandth``: the same, a thousand times smaller (a learning rate near 0), against the floor of that size;
* ``one step, trained model``: single moves from the model at the end of a training, against the floor of the start;
* ``one step, trained model, floor of half the run``: the same moves against a floor measured at the model halfway, as
  old as one in force can be where it is renewed (after 4, 8, 16, ... windows);
* ``one step, trained model, floor measured there``: the same moves against a floor measured at the trained model, as
  good as one in force can be;
* ``a run``: moves that follow on each other, the sums of a run against the summed floor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from smda_callbacks.maths.account import mean_by_group
from smda_callbacks.maths.pathways import State, split_shift
from smda_callbacks.maths.uncertainty import above_floor, step_floor, total_floor
from smda_callbacks.observe.guard import weights_restored
from smda_callbacks.observe.instrument import Instrument, arrays
from smda_callbacks.observe.noise import measure_noise, random_readings, trained_parameters
from smda_callbacks.observe.reading import Reading
from smda_callbacks.records import PATHWAYS, NoiseFloor, PolicyRecord

Array = NDArray[np.float64]

#: What a limit of twice the floor should give.
NOMINAL = 0.0455

#: Further names beside the parts of PATHWAYS: features above the floor in some part, and categories.
ANY, CATEGORIES = "feature, any part", "category"

TRAINED = "one step, trained model"
HALFWAY, RENEWED = f"{TRAINED}, floor of half the run", f"{TRAINED}, floor measured there"
KINDS = ("one step", "a thousandth", TRAINED, HALFWAY, RENEWED, "a run")


@dataclass(frozen=True)
class Watch:
    """A model to be moved, what reads it, and the floor that judges it."""

    model: Any
    instrument: Instrument
    policy: PolicyRecord
    size: float
    draws: int

    def state(self, reading: Reading) -> State:
        """The policy's features and the behaviours of a reading."""
        return State(*arrays(reading), self.instrument.scores(reading))

    def now(self) -> State:
        """Read the model as it is."""
        return self.state(self.instrument.read(self.model))

    def floor(self, seed: int) -> NoiseFloor:
        """The noise floor here, from as many draws as a run takes."""
        reading = self.instrument.read(self.model)
        return measure_noise(
            self.instrument,
            self.model,
            self.policy,
            self.instrument.snapshot(0, reading),
            size=self.size,
            draws=self.draws,
            seed=seed,
        )

    def changes(self, before: State, after: State) -> dict[str, Array]:
        """Shift of every part ``[feature]``, and change of every category's mean ``[category]``."""
        split = split_shift(before, after, scale=self.policy.scale, lam=self.policy.lam).as_dict()
        moved = mean_by_group(after.y - before.y, self.instrument.probes.groups)
        return {**{part: split[part][:, 0] for part in PATHWAYS}, CATEGORIES: moved[:, 0]}


def floors_of(noise: NoiseFloor, relative: float) -> dict[str, Array]:
    """Floor of everything in :meth:`Watch.changes` for a step of this size relative to the floor's own."""
    found = {part: step_floor(noise.random[part], noise.rounding[part], relative)[:, 0] for part in PATHWAYS}
    return {**found, CATEGORIES: step_floor(noise.behaviour_random, noise.behaviour_rounding, relative)[:, 0]}


def hits(changes: Mapping[str, Array], floors: Mapping[str, Array]) -> dict[str, float]:
    """Share above twice the floor, of features by part and in any, and of categories."""
    above = {name: above_floor(changes[name], floors[name]) for name in changes}
    some = np.any([above[part] for part in PATHWAYS], axis=0)
    return {**{name: float(each.mean()) for name, each in above.items()}, ANY: float(some.mean())}


def single_moves(watch: Watch, *, draws: int, seed: int, relative: float = 1.0) -> list[dict[str, Array]]:
    """:meth:`Watch.changes` by moves from the model as it is, each alone."""
    before = watch.now()
    readings = random_readings(
        watch.model, lambda: watch.instrument.read(watch.model), size=watch.size * relative, draws=draws, seed=seed
    )
    return [watch.changes(before, watch.state(each)) for each in tqdm(readings, total=draws, leave=False)]


def judged(moves: Sequence[Mapping[str, Array]], noise: NoiseFloor, *, relative: float = 1.0) -> list[dict[str, float]]:
    """:func:`hits` of every move against the floor of its size."""
    floors = floors_of(noise, relative)
    return [hits(each, floors) for each in moves]


def walk(watch: Watch, noise: NoiseFloor, *, steps: int, seed: int) -> dict[str, float]:
    """:func:`hits` of the sums over a run of random moves, as a report adds them up; the weights come back."""
    parameters, generator = trained_parameters(watch.model), torch.Generator().manual_seed(seed)
    with weights_restored(parameters):
        states = [watch.now(), *_walked(watch, parameters, generator, steps)]
    parts = [watch.changes(a, b) for a, b in pairwise(states)]
    one = floors_of(noise, 1.0)
    sums = {name: np.sum([each[name] for each in parts], axis=0) for name in one}
    return hits(sums, {name: total_floor([floor] * steps) for name, floor in one.items()})


def _walked(watch: Watch, parameters: Sequence[Any], generator: torch.Generator, steps: int) -> Iterator[State]:
    for _ in tqdm(range(steps), "random walk", leave=False):
        with torch.no_grad():
            for parameter in parameters:
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.add_(signs.to(parameter.dtype), alpha=watch.size)
        yield watch.now()


def false_positives(
    watch: Watch, halfway: Any, trained: Any, *, draws: int, floors: int, steps: int, walks: int
) -> dict[str, dict[str, float]]:
    """Kind of null -> what is above twice the floor: mean share over draws and over ``floors`` floors of their own.

    ``halfway``, ``trained``: the same model after half of a training, and at its end. Every row says how many runs or
    moves it is of.
    """
    seeds = range(1, floors + 1)
    noises = [watch.floor(seed) for seed in seeds]
    middle, later = replace(watch, model=halfway), replace(watch, model=trained)
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for seed, noise in zip(seeds, noises, strict=True):
        other = 1000 * seed  # no move of a floor is among those that it judges
        rows["one step"] += judged(single_moves(watch, draws=draws, seed=other), noise)
        small = single_moves(watch, draws=draws, seed=other + 1, relative=1e-3)
        rows["a thousandth"] += judged(small, noise, relative=1e-3)
        moves = single_moves(later, draws=draws, seed=other + 2)
        for kind, judge in ((TRAINED, noise), (HALFWAY, middle.floor(seed)), (RENEWED, later.floor(seed))):
            rows[kind] += judged(moves, judge)
    for number in range(walks):
        rows["a run"].append(walk(watch, noises[number % floors], steps=steps, seed=5000 + number))
    return {
        kind: {**{name: float(np.mean([each[name] for each in some])) for name in some[0]}, "of": len(some)}
        for kind, some in rows.items()
        if some
    }
