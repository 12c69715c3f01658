"""Trainings whose answer is known: gradients of pairs are made up, everything behind them is real.

A tiny adapted model, its policy and functionals are real. A pair's gradient is a random direction of fixed size, of
which a planted pair gives a small part to a direction in weight space that moves one functional and no other. Real
optimizers step on the sums, and the library's own attribution books what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from smda_callbacks.maths.functionals import FunctionalSet, measured
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.distil import DistilOptions, distil
from smda_callbacks.observe.guard import weights_restored
from smda_callbacks.observe.instrument import arrays, build_instrument
from smda_callbacks.observe.lora import lora_sites
from smda_callbacks.observe.noise import measure_noise
from smda_callbacks.observe.pair_gradients import Captured
from smda_callbacks.observe.probe_gradients import gradient_reading
from smda_callbacks.observe.sae import load_sae
from smda_callbacks.observe.sequences import Sequence as Example
from smda_callbacks.records import Array, NoiseFloor, Pair, RunStart, Snapshot, WindowRecord
from smda_callbacks.training.attribution import Attributor
from smda_callbacks.training.attribution_start import functionals_of
from smda_callbacks.training.booking import book_window
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.exact import Exact
from smda_callbacks.training.ghost import Ghost
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer

Engine = Literal["ghost", "exact"]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

#: Root mean square per weight of a gradient and, at learning rate 1, of the update that it makes.
SIZE = 1e-4
BATCH = 8


@dataclass(frozen=True)
class Planted:
    """Pairs whose doing is known. They are trained on in order, ``BATCH`` in a step."""

    kinds: tuple[str, ...]  # [pair], for the reader
    intended: tuple[int, ...]  # [pair] the feature, as a position, that the pair's prompt activates
    gradients: torch.Tensor  # [pair, weight]

    def of(self, *kinds: str) -> np.ndarray:
        """Which pairs are of these kinds, bool ``[pair]``."""
        return np.isin(self.kinds, kinds)


class PlantedBench:
    """A tiny adapted model with its policy and functionals, and the directions that move one functional alone."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(tiny_model(), config).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        handle, tokenizer = load_sae(save_sae(tiny_sae("standard"), folder / "tiny-sae")), tiny_tokenizer()
        full = build_instrument(self.model, tokenizer, handle, many_probes(32), target="logit")
        self.policy, self.instrument, _ = distil(full, self.model, tokenizer, DistilOptions(5, 3, cv_folds=0))
        self.sites = lora_sites(self.model)
        self.parameters: list[Any] = [site.module.weight for site in self.sites]
        self.functionals = self.functionals_for("ghost")
        _, slopes = gradient_reading(
            self.instrument, self.model, self.sites, self.functionals, scale=self.policy.scale, lam=self.policy.lam
        )
        self.slopes: Array = torch.cat(slopes, dim=1).double().numpy()  # [functional, weight]

    def functionals_for(self, engine: Engine) -> FunctionalSet:
        return functionals_of(self.instrument, self.policy, None, exact=engine == "exact")

    def measure(self, engine: Engine) -> Callable[[State, State], Array]:
        return partial(measured, self.functionals_for(engine), scale=self.policy.scale, lam=self.policy.lam)

    def name(self, feature: int, pathway: str) -> str:
        return f"feature:{self.policy.features[feature]}:{pathway}"

    def state(self) -> State:
        reading = self.instrument.read(self.model)
        return State(*arrays(reading), self.instrument.scores(reading))

    def moved(self, direction: Array, size: float) -> State:
        """The state with every weight moved by ``size`` in root mean square along a direction of length 1."""
        step = torch.from_numpy(direction * size * len(direction) ** 0.5).float()
        with weights_restored(self.parameters), torch.no_grad():
            for parameter, part in zip(self.parameters, torch.split(step, self.sizes), strict=True):
                parameter += part.view_as(parameter)
            return self.state()

    def alone(self, *names: str) -> Array:
        """The direction of length 1 that raises these functionals' sum most while all others stay, to first order."""
        wanted = [self.functionals.index(name) for name in names]
        others = np.delete(self.slopes, wanted, axis=0)
        others = others / np.linalg.norm(others, axis=1, keepdims=True)
        _, sizes, basis = np.linalg.svd(others, full_matrices=False)
        basis = basis[sizes > 1e-5]  # a group's mean is one of its categories' means
        total = self.slopes[wanted].sum(axis=0)
        free = total - basis.T @ (basis @ total)
        found: Array = free / np.linalg.norm(free)
        return found

    def plant(self, plan: Sequence[tuple[str, int, Array | None]], part: float, seed: int) -> Planted:
        """Pairs of (kind, intended feature, planted direction or None), shuffled. All gradients have the same size.

        ``part``: length of the planted component, relative to the gradient's; the rest is random.
        """
        rng = np.random.default_rng(seed)
        rows = []
        for _, _, direction in plan:
            noise = rng.normal(size=self.slopes.shape[1])
            row = noise / np.linalg.norm(noise) * (1.0 if direction is None else (1 - part**2) ** 0.5)
            rows.append(row if direction is None else row - part * direction)  # a step goes against the gradient
        order = rng.permutation(len(plan))
        gradients = torch.from_numpy(np.array(rows)[order] * SIZE * self.slopes.shape[1] ** 0.5).float()
        return Planted(tuple(plan[k][0] for k in order), tuple(plan[k][1] for k in order), gradients)

    def prompt(self, feature: int) -> torch.Tensor:
        """A residual stream ``[token, d_model]`` on which this feature of the policy is active, and no other is."""
        with torch.no_grad():
            origin = self.instrument.encode(torch.zeros(1, 1, 32))[0][0, 0]
            rows = self.instrument.encode(torch.eye(32).unsqueeze(0))[0][0] - origin  # the encoder is affine
            wanted = torch.where(torch.arange(len(origin)) == feature, 1.0, -1.0)
            stream: torch.Tensor = torch.linalg.lstsq(rows.T, (wanted - origin).unsqueeze(1)).solution.T
            return stream

    def noise(self, engine: Engine, draws: int = 20) -> NoiseFloor:
        state = self.state()
        baseline, measure = Snapshot(0, state.pre, state.gate, state.y), self.measure(engine)
        return measure_noise(
            self.instrument, self.model, self.policy, baseline, size=SIZE, draws=draws, measure=measure
        )

    @property
    def sizes(self) -> list[int]:
        return [parameter.numel() for parameter in self.parameters]

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        rows: torch.Tensor,
        max_norm: float = 0.0,
        *,
        before: Callable[[Any], object] = lambda _: None,
        after: Callable[[Any], object] = lambda _: None,
    ) -> None:
        """An optimizer step on the sum of ``rows`` ``[pair, weight]``, clipped to ``max_norm``; 0: not at all."""
        for parameter, part in zip(self.parameters, torch.split(rows.sum(dim=0), self.sizes), strict=True):
            parameter.grad = part.clone().view_as(parameter)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, max_norm)
        before(optimizer)
        optimizer.step()
        after(optimizer)
        optimizer.zero_grad()

    def train(
        self,
        planted: Planted,
        noise: NoiseFloor,
        make_optimizer: MakeOptimizer,
        *,
        engine: Engine = "ghost",
        max_norm: float = 0.0,
        every: int = 1,
    ) -> tuple[RunStart, list[WindowRecord]]:
        """Train on the pairs, in windows of ``every`` steps; the weights come back."""
        with weights_restored(self.parameters):
            return _Training(self, planted, engine, max_norm).run(make_optimizer(self.parameters), noise, every)


class _Training:
    """Drives the real attributor as the callback does; stands in for the hooks and for the table of pairs."""

    def __init__(self, bench: PlantedBench, planted: Planted, engine: Engine, max_norm: float) -> None:
        self.bench, self.planted, self.engine, self.max_norm = bench, planted, engine, max_norm
        self.prompts = {feature: bench.prompt(feature) for feature in set(planted.intended)}
        functionals, given = bench.functionals_for(engine), (bench.instrument, bench.sites)
        engines: dict[str, Callable[[], Ghost | Exact]] = {
            "ghost": lambda: Ghost(*given, functionals, bench.policy, carry=True, limit=2**30),
            "exact": lambda: Exact(*given, bench.measure("exact")),
        }
        self.attributor = Attributor(
            engines[engine](), AttributionOptions(), bench.instrument, bench.policy, functionals, bench.sites,
            self, self, max_norm,  # type: ignore[arg-type]
        )  # fmt: skip
        self.names = functionals.names
        self.batch = range(0)

    def run(
        self, optimizer: torch.optim.Optimizer, noise: NoiseFloor, every: int
    ) -> tuple[RunStart, list[WindowRecord]]:
        bench, steps = self.bench, len(self.planted.kinds) // BATCH
        self.attributor.open(bench.model)
        before = self._snapshot(0, bench.instrument.read(bench.model))
        baseline, windows = WindowRecord(0, 0, (), "ok", 0.0, snapshot=before), []
        for step in range(1, steps + 1):
            self.batch = range((step - 1) * BATCH, step * BATCH)
            self._step(optimizer)
            if step % every == 0:
                after = self._snapshot(step, self.attributor.read(bench.model))
                booked = self.attributor.book(bench.model, before, after)
                assert booked is not None
                moved = book_window(before, after, bench.policy, bench.instrument.probes.groups).fields()
                books: dict[str, Any] = {"snapshot": after, "pairs": booked[0], "pairs_seen": booked[1]}
                windows.append(WindowRecord(step, step - every + 1, (), "ok", 0.0, **books, **moved))
                self.attributor.open(bench.model)
                before = after
        manifest = {"kind": "run", "attribution": {"engine": self.engine, "functionals": list(self.names)}}
        return RunStart(manifest, bench.instrument.probes.probes, bench.policy, baseline, (), noise), windows

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        self.attributor.begin_step()
        rows, ask = self.planted.gradients[list(self.batch)], self.attributor
        self.bench.step(optimizer, rows, self.max_norm, before=ask.before_step, after=ask.after_step)

    def _snapshot(self, step: int, reading: Any) -> Snapshot:
        return Snapshot(step, *arrays(reading), self.bench.instrument.scores(reading))

    # What the attributor asks of its hooks
    def attach(self) -> None: ...

    stop = detach = attach

    def release(self) -> None: ...

    def take(self) -> Captured:
        rows = torch.split(self.planted.gradients[list(self.batch)], self.bench.sizes, dim=1)
        tokens = np.zeros(1, dtype=np.int64)
        examples = tuple(Example(0, 0, 1, tokens, pair.to_bytes(4, "big"), 0) for pair in self.batch)
        return Captured(examples, rows, tuple(self.prompts[self.planted.intended[pair]] for pair in self.batch))

    # What it asks of the table of pairs
    def pair_of(self, key: bytes, tokens: Any) -> int:
        return int.from_bytes(key, "big")

    def describe(self, number: int) -> Pair:
        return Pair(number, (number,), "row", {"kind": self.planted.kinds[number]}, None, 1)
