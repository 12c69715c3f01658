"""Going on with a run that was stopped, from a checkpoint of the trainer.

The run store holds nearly all that is needed. The rest lies beside it: ``start.safetensors`` in the store (the probes'
residual stream at the start, which the SAE's health is compared with), and in every ``checkpoint-N`` of the trainer a
``smda.json`` that names the store. Where the last window ended before the checkpoint, ``smda.safetensors`` has what the
next window is compared with. ``trainer_state.json`` has nothing of ours.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from smda_callbacks.observe.health import HealthMeter
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.reading import Reading
from smda_callbacks.records import PolicyRecord, RunStart, policy_hash
from smda_callbacks.sinks import files
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.past import Past, read_past
from smda_callbacks.training.attribution_start import Attribution
from smda_callbacks.training.manifest import weights_hash
from smda_callbacks.training.plan import Plan

if TYPE_CHECKING:
    from smda_callbacks.training.monitor import Monitor

logger = logging.getLogger("smda_callbacks")

NOTE, ARRAYS = "smda.json", "smda.safetensors"
NOTE_VERSION = 1

#: How far a reading may be from that of the store at the same step, in standard deviations over the probes: with a note
#: in the checkpoint, where another device may round differently, and without one, where the reading is the only proof.
NEAR, SAME = 0.1, 1e-3


class NotContinuedError(ValueError):
    """The run in the store is not the one that training goes on with."""


@dataclass(frozen=True)
class Earlier:
    """A run up to a checkpoint.

    ``noted``: whether the checkpoint names it. ``start``: residual stream of the probes at the start ``[probe, d_in]``.
    ``hidden`` and ``weights``: residual stream and trained weights at the last ok window; None where that is where the
    checkpoint is. ``measured``: of the readings whose health counts. ``train_seconds``: so far. ``skipped`` and
    ``trainer``: what the callback has noted for the next window. ``budget``: of the overhead, so far.
    """

    past: Past
    noted: bool
    start: Tensor
    measured: int
    train_seconds: float = 0.0
    hidden: Tensor | None = None
    weights: tuple[Tensor, ...] | None = None
    skipped: tuple[int, ...] = ()
    trainer: Mapping[str, float] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)

    @property
    def policy(self) -> PolicyRecord:
        return self.past.store.policy

    @property
    def whole(self) -> bool:
        """Whether the last window ended where the checkpoint is, so that the next one is seen whole."""
        return self.past.last.step == self.past.step

    def run_start(self) -> RunStart:
        """What the sinks are opened with: the run's own start, with the step to go on from."""
        start = self.past.store.start
        return RunStart(**{**vars(start), "baseline": _at_step(start.baseline, self.past.step)})


def find_earlier(plan: Plan, args: Any, step: int) -> Earlier | None:
    """The run that a training at ``step`` goes on with; None for a new run. Says in the log why it is a new one.

    ``args``: the trainer's arguments.
    """
    if step == 0 or plan.reopen_sinks is None:
        return None
    checkpoints = [path for path in dict.fromkeys(_checkpoints(args, step)) if path.is_dir()]
    for checkpoint in checkpoints:
        if (checkpoint / NOTE).exists():
            try:
                return _noted(checkpoint, step)
            except (StoreError, NotContinuedError, SafetensorError, OSError, KeyError, TypeError) as error:
                tell_new_run(step, error)
                return None
    found = _left_by_a_kill(Path(args.output_dir), step)
    if found is None:
        tell_new_run(step, f"the checkpoint has no {NOTE}: it was written without the callback")
    return found


def tell_new_run(step: int, why: object) -> None:
    """Say that training goes on at ``step``, but with a run of its own."""
    logger.warning("training goes on at step %d, but as a new run with a store of its own: %s", step, why)


def write_note(
    monitor: Monitor,
    checkpoint: Path,
    booked: int,
    skipped: Sequence[int],
    trainer: Mapping[str, float],
    budget: Mapping[str, Any],
) -> None:
    """Leave in ``checkpoint`` what a training needs that goes on from it. Does nothing without a store.

    ``booked``, ``skipped``, ``trainer``, ``budget``: see :class:`Earlier`.
    """
    store = store_of(monitor.sinks)
    if store is None or not checkpoint.is_dir():
        return
    step, last = int(checkpoint.name.rpartition("-")[2]), monitor.snapshot.step
    if last != step:
        weights = {f"weight/{k:06d}": each for k, each in enumerate(monitor.meter.before)}
        _write_tensors(checkpoint / ARRAYS, {"hidden": monitor.hidden, **weights})
    store, folder = store.absolute(), checkpoint.absolute().parent
    files.write_json(
        checkpoint / NOTE,
        {
            "schema_version": NOTE_VERSION,
            "run_id": monitor.start.manifest["run_id"],
            "store": str(store.relative_to(folder)) if store.is_relative_to(folder) else str(store),
            "step": step,
            "last_ok": last,
            "booked": booked,
            "skipped": list(skipped),
            "trainer": dict(trainer),
            "measured": monitor.measured,
            "train_seconds": time.perf_counter() - monitor.began,
            "budget": dict(budget),
        },
    )


def keep_start(sinks: Sequence[Sink], hidden: Tensor) -> None:
    """Keep the residual stream at the start beside the records of a new run."""
    store = store_of(sinks)
    if store is not None:
        _write_tensors(store / files.START, {"hidden": hidden})


def store_of(sinks: Sequence[Sink]) -> Path | None:
    """The folder of the run store among ``sinks``; None where there is none."""
    paths = (getattr(sink, "path", None) for sink in sinks)
    return next((path for path in paths if isinstance(path, Path) and (path / files.MANIFEST).exists()), None)


def check_same_run(earlier: Earlier, plan: Plan, full: Instrument, model: nn.Module) -> None:
    """Raise NotContinuedError unless probes, SAE, model, scoring and policy are those of the run in the store."""
    manifest = earlier.past.store.manifest
    config = manifest.get("config") or {}
    pairs = {
        "probes": (manifest["probe_hash"], full.probes.hash),
        "the SAE": (manifest["sae"]["hash"], full.handle.hash),
        "the layer": (manifest["sae"]["hook_name"], full.handle.site.name),
        "the model's frozen weights": (manifest["model"]["hash"], weights_hash(model, team=full.team)),
        "behaviours": (list(manifest["behaviours"]), list(full.behaviours)),
        "the target": (manifest["target"], full.target),
        "the behaviour section of the configuration": (config.get("behaviour"), plan.config.get("behaviour")),
    }
    other = [name for name, (there, here) in pairs.items() if there != here]
    saved = manifest.get("policy_from") == "saved"
    if saved != (plan.policy is not None) or (plan.policy and policy_hash(plan.policy) != manifest["policy_hash"]):
        other.append("the policy")
    if other:
        raise NotContinuedError(f"{', '.join(other)} of the run in {earlier.past.store.path} differ from those here")


def check_same_pairs(earlier: Earlier, attribution: Attribution, most: int = 50) -> None:
    """Raise NotContinuedError where pairs are attributed in another way, or are numbers of other examples."""
    stored = earlier.past.store.manifest.get("attribution") or {}
    parts = ("engine", "functionals", "level")
    other = [name for name in parts if stored.get(name) != attribution.manifest.get(name)]
    if other:
        raise NotContinuedError(f"the {' and '.join(other)} of the attribution differ")
    if attribution.attributor is None:
        return
    for number, pair in sorted(earlier.past.pairs.items())[:most]:
        try:
            here = attribution.attributor.index.describe(number)
        except IndexError:
            continue  # known by its tokens alone, and not seen again yet
        if (here.rows, here.tokens) != (pair.rows, pair.tokens):
            raise NotContinuedError(f"the data set differs: pair {number} was rows {pair.rows} and is {here.rows}")


def check_same_state(earlier: Earlier, instrument: Instrument, reading: Reading) -> None:
    """Raise NotContinuedError where the model reads differently than the store says at the same step."""
    stored = earlier.past.last.snapshot
    if stored is None or not earlier.whole:
        return
    y = instrument.scores(reading)
    away, width = float(np.abs(y - stored.y).mean()), float(stored.y.std())
    if away > (NEAR if earlier.noted else SAME) * width:
        raise NotContinuedError(
            f"the probes' behaviour is {away:.2g} away on average from that in {earlier.past.store.path} at this step"
        )


def make_sinks(plan: Plan, args: Any, step: int, earlier: Earlier | None) -> Sequence[Sink]:
    """The sinks of a training that begins at ``step``, or goes on there with ``earlier``."""
    if step == 0 or plan.reopen_sinks is None:
        return plan.make_sinks(args)
    return plan.reopen_sinks(args, None if earlier is None else earlier.past)


def read_again(
    earlier: Earlier, plan: Plan, full: Instrument, model: nn.Module
) -> tuple[PolicyRecord, Instrument, Reading]:
    """The run's policy, the instrument of its features, and a reading of ``model`` as the checkpoint left it.

    Raises:
        NotContinuedError: it is another run; says what differs.
    """
    check_same_run(earlier, plan, full, model)
    instrument = full.of_features(earlier.policy.features)
    reading = instrument.read(model)
    check_same_state(earlier, instrument, reading)
    return earlier.policy, instrument, reading


def take_up(monitor: Monitor, earlier: Earlier, reading: Reading) -> None:
    """Give ``monitor`` the state that it had at the checkpoint, but for what pairs did: see :func:`take_up_pairs`."""
    past, device = earlier.past, reading.hidden.device
    assert past.last.snapshot is not None
    assert past.store.baseline.health is not None
    monitor.health = HealthMeter(monitor.instrument.handle, earlier.start.to(device))
    monitor.health_start, monitor.baseline = past.store.baseline.health, past.store.baseline
    monitor.window, monitor.snapshot, monitor.noise = past.last, past.last.snapshot, past.store.noise
    monitor.hidden = reading.hidden if earlier.hidden is None else earlier.hidden.to(device)
    monitor.measured, monitor.seconds = earlier.measured, past.seconds
    monitor.began -= earlier.train_seconds
    monitor.book.new(past.told)


def take_up_pairs(monitor: Monitor, earlier: Earlier) -> None:
    """Number windows and pairs on; raises NotContinuedError. Call before the first window is opened."""
    check_same_pairs(earlier, monitor.attribution)
    monitor.causes.noise = monitor.noise
    monitor.causes.add_all(earlier.past.windows())
    monitor.noise_meter.windows = earlier.past.measured
    if monitor.attributor is not None:
        monitor.attributor.continue_from(earlier.past.measured, earlier.past.pairs)


def take_up_window(monitor: Monitor, earlier: Earlier) -> None:
    """The window that was open at the checkpoint. Call after it was opened again."""
    if earlier.weights is not None:
        monitor.meter.start_from(earlier.weights)
    if not earlier.whole and monitor.attributor is not None:
        why = (
            f"the window open at step {earlier.past.step}, that of a checkpoint, began after step "
            f"{earlier.past.last.step}: what its pairs did before the checkpoint is not known"
        )
        monitor.attributor.pass_over(why)
        logger.warning("%s, so it is not attributed to pairs", why)


def continued_line(earlier: Earlier) -> str:
    """One line on what is gone on with."""
    past = earlier.past
    return f"going on at step {past.step} with run {past.store.manifest['run_id']} in {past.store.path}"


def _noted(checkpoint: Path, step: int) -> Earlier:
    note = files.read_json(checkpoint / NOTE)
    if note["schema_version"] != NOTE_VERSION or note["step"] != step:
        raise NotContinuedError(f"{checkpoint / NOTE} is of step {note['step']}, or of another version of the library")
    past = read_past(checkpoint.absolute().parent / note["store"], step)
    there = {"run_id": past.store.manifest["run_id"], "last_ok": past.last.step, "booked": past.booked}
    other = [f"{name} is {value!r} there and {note[name]!r} in the checkpoint" for name, value in there.items()]
    other = [text for text, name in zip(other, there, strict=True) if there[name] != note[name]]
    if other:
        raise NotContinuedError(f"the store {past.store.path} is not as it was at the checkpoint: {'; '.join(other)}")
    tensors = {} if past.last.step == step else load((checkpoint / ARRAYS).read_bytes())
    return Earlier(
        past,
        noted=True,
        start=_start_of(past),
        measured=int(note["measured"]),
        train_seconds=float(note["train_seconds"]),
        hidden=tensors.get("hidden"),
        weights=tuple(tensors[name] for name in sorted(tensors) if name != "hidden") or None,
        skipped=tuple(note["skipped"]),
        trainer=note["trainer"],
        budget=note.get("budget", {}),  # not in the notes of earlier versions
    )


def _left_by_a_kill(folder: Path, step: int) -> Earlier | None:
    """The newest store in ``folder`` that was not closed and has a window that ends at ``step``.

    A kill between the checkpoint and its note leaves it. The reading shows later whether it is the same run.
    """
    found = []
    for manifest in folder.glob(f"*/{files.MANIFEST}"):
        if (manifest.parent / files.END).exists():
            continue
        try:
            past = read_past(manifest.parent, step)
            if past.last.step == past.booked == step:
                found.append(Earlier(past, noted=False, start=_start_of(past), measured=past.measured))
        except (StoreError, OSError, KeyError, SafetensorError):
            continue  # no store of ours, or a damaged one
    return max(found, key=lambda each: str(each.past.store.manifest["created"]), default=None)


def _checkpoints(args: Any, step: int) -> Iterator[Path]:
    """Where the trainer may have resumed from: what it was called with, its argument, the folder of that step."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        named = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(named, str):
            yield Path(named)
        frame = frame.f_back
    if isinstance(args.resume_from_checkpoint, str):
        yield Path(args.resume_from_checkpoint)
    yield Path(args.output_dir) / f"checkpoint-{step}"


def _start_of(past: Past) -> Tensor:
    return load((past.store.path / files.START).read_bytes())["hidden"]


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    files.write_atomic(path, save({name: each.detach().cpu().contiguous() for name, each in tensors.items()}))


def _at_step(record: Any, step: int) -> Any:
    return type(record)(**{**vars(record), "step": step, "first_step": step})
