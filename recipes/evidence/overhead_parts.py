"""The callback taken apart: a step of training made, captured, measured and attributed, each a call to be timed."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from recipes.benchmark_overhead import first_batch
from recipes.benchmark_pairs import Step
from recipes.benchmark_training import load, settings, training_arguments
from recipes.evidence.cost_model import Lora, Shape, Tokens, Work
from recipes.evidence.overhead_setups import Setup
from smda_callbacks.config.build import build_plan
from smda_callbacks.maths.local_slopes import basis_size
from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.observe.noise import trained_parameters
from smda_callbacks.records import PolicyRecord
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.attribution_start import Trainer
from smda_callbacks.training.engine import AttributionOptions, EngineName
from smda_callbacks.training.monitor import Monitor

MIB = 2**20

#: Earlier steps whose momentum is followed at AdamW's default: 0.9 to this power is above the limit of
#: training/ghost.py.
CARRIED = 21

#: Refits in a turn: one alone is too short to be timed.
REFITS = 20


class Parts:
    """One model with LoRA and three monitors of it: one that attributes nothing, engine ghost, engine exact.

    ``carried``: earlier steps whose momentum is followed when engine ghost is timed; never more than ``CARRIED``.
    """

    def __init__(self, setup: Setup, carried: int = CARRIED) -> None:
        self.setup, self.device, self.carried = setup, setup.options.device, carried
        model, tokenizer = load(setup.options)
        self.shape = Shape.of(model.config)
        self.model: Any = get_peft_model(model, setup.lora).eval()
        self._start_adapters()
        self.batch, dataset = first_batch(setup.options, tokenizer, setup.pairs)
        self.step = Step(self.model, self.batch)
        args = training_arguments(setup.options, "unused")
        self.trainer = Trainer(args, self.step.optimizer, torch.utils.data.DataLoader(dataset), tokenizer)
        self.off = self._monitor("off", None)
        self.ghost, self.exact = (self._monitor(engine, self.off.policy) for engine in ("ghost", "exact"))
        self._number = 0

    @torch.no_grad()
    def _start_adapters(self) -> None:
        """A matrix B of zeros would keep the gradients of A at zero: what is timed is the middle of a training."""
        generator = torch.Generator().manual_seed(0)
        for parameter in trained_parameters(self.model):
            noise = torch.randn(parameter.shape, generator=generator) * 1e-3
            parameter.add_(noise.to(parameter))

    def _monitor(self, engine: EngineName, policy: PolicyRecord | None) -> Monitor:
        plan = replace(
            build_plan(settings(self.setup.options, self.setup.chosen)),
            make_sinks=lambda _: (MemorySink(),),
            noise_draws=0,
            on_error="raise",
            policy=policy,
            attribution=AttributionOptions(engine=engine),
        )
        return Monitor(plan, self.model, self.trainer, 0, 1e-3)

    def default_engine(self) -> str:
        """The engine that the callback's defaults come to here."""
        return self._monitor("auto", self.off.policy).attribution.choice.engine

    def train(self) -> None:
        """A plain step."""
        self.step.plain()

    def train_captured(self, monitor: Monitor | None = None) -> None:
        """A step whose pairs' gradients are captured, and whose update is split over them."""
        attributor = (monitor or self.ghost).attributor
        assert attributor is not None
        attributor.begin_step()
        self.step._gradients()
        attributor.before_step(self.step.optimizer)
        self.step.optimizer.step()
        attributor.after_step(self.step.optimizer)
        self.step.optimizer.zero_grad()

    @torch.no_grad()
    def forward(self) -> None:
        """A bare pass over the probes' tokens: no mask, no hook, no score."""
        nodes = len(self.off.instrument.batches.tree.tokens)
        self.model.eval()  # once: it walks over all modules
        for batch in self.off.instrument.batches.batches:
            self.model(input_ids=batch.input_ids.to(self.device), logits_to_keep=nodes, use_cache=False)

    def measure(self) -> None:
        """One measurement that attributes nothing."""
        self._measure(self.off)

    def measure_ghost(self) -> None:
        """One by engine ghost, after steps of ``train_captured``."""
        assert self._measure(self.ghost).pairs is not None

    def measure_exact(self) -> None:
        """One by engine exact, after steps of ``train_captured(self.exact)``."""
        assert self._measure(self.exact).pairs is not None

    def unhook(self) -> None:
        """Take the hooks off that see the training's pairs, which would slow a plain step."""
        for monitor in (self.ghost, self.exact):
            if monitor.attributor is not None:
                monitor.attributor.end()

    def refit(self) -> None:
        """The policy alone, so often that it can be timed."""
        snapshot, policy = self.off.snapshot, self.off.policy
        for _ in range(REFITS):
            fit_ridge(snapshot.x, snapshot.y, policy.lam, scale=policy.scale)

    def _measure(self, monitor: Monitor) -> Any:
        self._number += 1
        return monitor.measure(self.model, self._number, self._number, (), {})

    def warm_up(self) -> None:
        """As many captured steps as momentum is followed over: engine ghost then costs what it does in mid-training."""
        for _ in range(self.carried + 1):
            self.train_captured()
        self.measure_ghost()

    def work(self) -> Work:
        """What a step computes, for the cost model."""
        batches, attributor = self.off.instrument.batches, self.ghost.attributor
        assert attributor is not None
        nodes = len(batches.tree.tokens)
        probes = [(len(each.index), each.input_ids.shape[1]) for each in batches.batches]
        rows, columns = self.batch["input_ids"].shape
        adapted = self.setup.lora.layers_to_transform
        saving = self.off.instrument.saving(self.model, gradients=False)
        return Work(
            shape=self.shape,
            lora=Lora(self.setup.lora.r, self.shape.layers if adapted is None else len(adapted)),
            train=(Tokens(rows, columns, rows * columns),),
            pairs=rows,
            probes=tuple(Tokens(rows, columns, rows * nodes) for rows, columns in probes),
            nodes=nodes,
            hook=self.off.instrument.handle.site.layer,
            features=self.off.instrument.handle.d_sae,
            support=len(self.off.policy.features),
            basis=basis_size(attributor.functionals),
            functionals=len(attributor.functionals),
            renewed=AttributionOptions().renew or 0,
            carried=self.carried,
            kept=0 if saving.lower is None else saving.lower.first,
            prefix=saving.skip,
            trim=saving.trim,
        )


@dataclass(frozen=True)
class Timed:
    """Processor seconds of parts, each repeated, and MiB that a part takes at most beyond what is held before it."""

    seconds: Mapping[str, Sequence[float]]
    mib: Mapping[str, float]


def timed_parts(parts: Parts, repeats: int, *, exact: int) -> Timed:
    """All parts in turn, ``repeats`` times, engine exact ``exact`` times. What is extra to another part is its
    difference to it within a turn. Names as in recipes/evidence/cost_parts.py.
    """
    _turn(parts, exact=False)  # warms up and does not count
    found: dict[str, list[float]] = {}
    for number in range(repeats):
        for name, value in _turn(parts, exact=number < exact).items():
            found.setdefault(name, []).append(value)
    calls = {"train": parts.train, "measure": parts.measure}
    mib = {name: peak_of(call) for name, call in calls.items()}
    parts.train_captured()
    parts.unhook()
    mib["ghost"] = peak_of(parts.measure_ghost)
    return Timed(found, mib)


def _turn(parts: Parts, *, exact: bool) -> dict[str, float]:
    train, captured = seconds(parts.train, parts.device), seconds(parts.train_captured, parts.device)
    parts.unhook()
    forward, measure = seconds(parts.forward, parts.device), seconds(parts.measure, parts.device)
    ghost = seconds(parts.measure_ghost, parts.device)
    refit = seconds(parts.refit, parts.device) / REFITS
    turn = {"train": train, "capture": captured - train, "forward": forward, "measure": measure}
    turn |= {"ghost": ghost - measure, "refit": refit}
    if exact:
        parts.train_captured(parts.exact)
        parts.unhook()
        turn["exact"] = seconds(parts.measure_exact, parts.device) - measure
    return turn


def seconds(call: Callable[[], object], device: str) -> float:
    """Of the processor, or by the clock after a GPU's work."""
    if device == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_of(call: Callable[[], object]) -> float:
    """MiB that ``call`` takes at most beyond what is held before it (Linux; on a GPU what torch allocates)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - held) / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed but kept would hide as much of the peak
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest so far
    held = _status("VmRSS")
    call()
    return (_status("VmHWM") - held) / 1024


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1])  # type: ignore[index]


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)
