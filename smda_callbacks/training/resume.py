"""The run that a training from a checkpoint goes on with: what is left in the checkpoint, and how it is found.

The run store holds nearly all that is needed. The rest lies beside it: ``start.safetensors`` in the store (the probes'
residual stream at the start, which the SAE's health is compared with), and in every ``checkpoint-N`` of the trainer a
``smda.json`` that names the store. Where the last window ended before the checkpoint, ``smda.safetensors`` has what the
next window is compared with. ``trainer_state.json`` has nothing of ours. What is done with it stands in
:mod:`smda_callbacks.training.take_up`.
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

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from smda_callbacks.records import PolicyRecord, RunStart
from smda_callbacks.sinks import files
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.past import Past, read_past
from smda_callbacks.training.plan import Plan

if TYPE_CHECKING:
    from smda_callbacks.training.monitor import Monitor

logger = logging.getLogger("smda_callbacks")

NOTE, ARRAYS = "smda.json", "smda.safetensors"
NOTE_VERSION = 1


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
