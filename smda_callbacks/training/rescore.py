"""The influence of every training pair on a run's final state, from its recorded trajectory.

The run is checked by making steps of it again, the probes are read at its end, and the targets' gradients there are
taken back through the run, step by step (:mod:`smda_callbacks.observe.metagradient`). What is done so far is saved on
the way: a call that is stopped goes on where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.instrument import Instrument, arrays
from smda_callbacks.observe.metagradient import Adjoint, influence
from smda_callbacks.observe.probe_gradients import check_differentiable, slope_gradients
from smda_callbacks.records import Array, RunStart, policy_hash
from smda_callbacks.sinks.rescored import Rescored, Verified, write_rescored
from smda_callbacks.sinks.trajectory import TrajectoryFolder
from smda_callbacks.training.manifest import package_versions
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.policy_check import check_policy
from smda_callbacks.training.replay import Replay, as_trained
from smda_callbacks.training.replay_check import Which, backwards, chosen, verify
from smda_callbacks.training.rescore_partial import Partial, identity_of, read_partial, remove_partial, write_partial
from smda_callbacks.training.rescore_targets import Targets, default_targets, resolve
from smda_callbacks.training.trajectory_read import read_pairs, read_state

logger = logging.getLogger("smda_callbacks")

#: Called with what is being done (``check`` or ``rescore``), how many steps are done, and how many there are.
Tick = Callable[[str, int, int], object]


@dataclass(frozen=True)
class RescoreOptions:
    """How a run is rescored.

    ``targets``: names, none for :func:`~smda_callbacks.training.rescore_targets.default_targets`. ``verify``: how many
    steps are made again before; ``tolerance``: how far they may be from the recorded ones (0: not a bit). ``at_once``:
    targets per backward pass. ``memory_gib``: for the derivatives that are carried; more targets than fit are taken in
    several passes. ``save_every``: steps between saves.
    """

    targets: tuple[str, ...] = ()
    verify: Which = "some"
    tolerance: float = 0.0
    at_once: int = 4
    memory_gib: float = 4.0
    save_every: int = 25

    def __post_init__(self) -> None:
        if self.verify not in ("some", "all"):
            raise ValueError(f"verify is {self.verify!r}; allowed are some and all.")
        for name in ("at_once", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.tolerance < 0 or not self.memory_gib > 0:
            raise ValueError(f"tolerance is {self.tolerance}, memory_gib {self.memory_gib}; they cannot be below 0.")


@dataclass(frozen=True)
class _End:
    """The run's end: targets, their exact change, and their gradients by the weights."""

    targets: Targets
    measured: Array
    gradients: tuple[Tensor, ...]


def rescore(
    run: str | Path,
    plan: Plan,
    start: RunStart,
    options: RescoreOptions | None = None,
    *,
    model: str | Path | nn.Module | None = None,
    device: str | None = None,
    tick: Tick = lambda *_: None,
) -> Rescored:
    """Rescore the run in the store ``run``, write the result there and return it.

    Args:
        plan: the plan of the run, for probes, SAE and scorers; start: what the run's store was opened with.
        model: the base model, or where it lies, where that is not what the run recorded.
        device: the recorded one if None.

    Raises:
        TrajectoryError: the run has no trajectory, or is not the same when it is gone through again.
        TargetError: there is no target of a name.
    """
    options, run = options or RescoreOptions(), Path(run)
    folder = TrajectoryFolder.open(run)
    with as_trained(folder):
        replay = Replay(folder, model=model, device=device)
        try:
            instrument = _instrument(plan, start, replay)
            targets = resolve(options.targets or default_targets(instrument, start.policy), instrument, start.policy)
            verified = _verified(replay, options, tick)
            end = _end(replay, instrument, start, targets)
            record = _record(run, replay, start, end, options, verified, tick)
        finally:
            replay.close()
    write_rescored(run, record)
    remove_partial(run)
    return record


def _instrument(plan: Plan, start: RunStart, replay: Replay) -> Instrument:
    check_differentiable(replay.model)
    full = plan.instrument(replay.model, replay.trainer.processing_class, plan.load_sae())
    check_policy(start.policy, full)
    return full.of_features(start.policy.features)


def _verified(replay: Replay, options: RescoreOptions, tick: Tick) -> Verified:
    done = 0
    total = sum(last - first for first, last in chosen(replay.folder.states, options.verify))
    with tqdm(total=total, desc="checking the replay", unit="step", delay=2, leave=False, disable=None) as bar:

        def count() -> None:
            nonlocal done
            done += 1
            bar.update()
            tick("check", done, total)

        return verify(replay, options.verify, options.tolerance, count)


def _end(replay: Replay, instrument: Instrument, start: RunStart, targets: Targets) -> _End:
    assert start.baseline.snapshot is not None
    snapshot = start.baseline.snapshot
    replay.place(read_state(replay.folder.path, replay.folder.last))
    reading = instrument.read(replay.model)
    before = State(snapshot.pre, snapshot.gate, snapshot.y)
    after = State(*arrays(reading), instrument.scores(reading))
    slopes = targets.slopes(before, after, start.policy)
    gradients = slope_gradients(instrument, replay.model, replay.sites, slopes)
    return _End(targets, targets.measured(before, after, start.policy), gradients)


def _record(
    run: Path,
    replay: Replay,
    start: RunStart,
    end: _End,
    options: RescoreOptions,
    verified: Verified,
    tick: Tick,
) -> Rescored:
    folder = replay.folder
    seen = {number: read_pairs(folder.path, number) for number in range(folder.first + 1, folder.last + 1)}
    ids, exposures = np.unique([pair for pairs, _ in seen.values() for pair in pairs], return_counts=True)
    found = _go_back(run, replay, start, end, options, ids, tick)
    return Rescored(
        run_id=str(start.manifest.get("run_id", "")),
        targets=end.targets.names,
        ids=ids.astype(np.int64),
        influence=found.influence,
        exposures=exposures.astype(np.int64),
        measured=end.measured,
        first_step=folder.first,
        last_step=folder.last,
        seconds=found.seconds,
        train_seconds=float(sum(seconds for _, seconds in seen.values())),
        verified=verified,
        versions=package_versions(),
    )


def _go_back(
    run: Path,
    replay: Replay,
    start: RunStart,
    end: _End,
    options: RescoreOptions,
    ids: NDArray[np.int64],
    tick: Tick,
) -> Partial:
    folder, names = replay.folder, end.targets.names
    chunks = _chunks(len(names), sum(each.numel() for each in end.gradients) * 3 // len(names), end.gradients, options)
    identity = identity_of(folder, names, chunks, options.tolerance, options.at_once, policy_hash(start.policy))
    state = read_partial(run, identity) or Partial(0, folder.last, np.zeros((len(ids), len(names))), 0.0, None)
    length = folder.last - folder.first
    done, total = state.chunk * length + folder.last - state.step, len(chunks) * length
    with tqdm(total=total, initial=done, desc="rescoring", unit="step", delay=2, leave=False, disable=None) as bar:
        for number in range(state.chunk, len(chunks)):
            columns = slice(*chunks[number])
            at: Adjoint | Sequence[Tensor] = state.adjoint or [each[columns] for each in end.gradients]
            began = time.perf_counter() - state.seconds
            steps = backwards(replay, state.step, options.tolerance)
            for each in influence(steps, at, replay.losses, replay.parameters, at_once=options.at_once):
                pairs = np.searchsorted(ids, read_pairs(folder.path, each.number)[0])
                np.add.at(state.influence[:, columns], pairs, each.scores.cpu().numpy())
                seconds = time.perf_counter() - began
                state = Partial(number, each.number - 1, state.influence, seconds, each.adjoint)
                done += 1
                bar.update()
                tick("rescore", done, total)
                if (folder.last - each.number + 1) % options.save_every == 0:
                    write_partial(run, identity, state)
            state = Partial(number + 1, folder.last, state.influence, state.seconds, None)
            write_partial(run, identity, state)
    return state


def _chunks(
    targets: int, per_target: int, gradients: Sequence[Tensor], options: RescoreOptions
) -> tuple[tuple[int, int], ...]:
    """Which targets are taken back together: weights, first and second moments of each are held."""
    size = per_target * gradients[0].element_size()
    together = max(1, int(options.memory_gib * 2**30) // max(size, 1))
    return tuple((low, min(low + together, targets)) for low in range(0, targets, together))
