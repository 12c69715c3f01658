"""What one measurement costs, and what each saving saves: the part of recipes/benchmark_overhead.py about readings.

* ``callback_over_probe_forward``: one whole measurement (reading, SAE, books, health, alerts; the sink is memory, pairs
  are not attributed) over a bare forward pass of the same padded tokens: no mask, no hook, no score; by the clock.
  ``..._cpu``, and all that follow: in processor time.
* ``..._no_trim``: without that saving (``measure.trim: false``), all else as before.
* ``..._top_half``: adapters on the layers from n/2 on, rounded up; ``..._no_keep`` computes the others every time, too.
* ``upper_layers_over_probe_forward``: what the adapted half, with the head, takes of that bare pass: more than half.
* ``..._system_prompt``: behind a system prompt, whose tokens all probes share; ``..._no_share_prefix`` reads it in
  every row. Pairs cannot be attributed by engine ghost with that saving.
* ``reading_...``: savings without a switch, see recipes/benchmark_readings.py.
* ``books_over_probe_forward_cpu``: what a measurement does when the model has been read: on a GPU, all that could be
  done beside the next step (health is the GPU's there); ``handed_to_the_host``: KiB that leave it per reading.
* ``padding_of_probes``: share of the columns without a token; ``kept_of_lower_layers``: MiB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model

from recipes.benchmark_maths import Figure, in_turns
from recipes.benchmark_readings import readings
from recipes.benchmark_training import Options, load, lora, settings, training_arguments
from smda_callbacks.config.build import build_plan
from smda_callbacks.observe.activations import decoder_layers
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.kept import begun_at
from smda_callbacks.observe.noise import trained_parameters
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.attribution_start import Trainer
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.monitor import Monitor

NAME = "callback_over_probe_forward"
SYSTEM = "You are a helpful assistant. Answer briefly, and say plainly when there is something that you will not do."


@dataclass(frozen=True)
class Case:
    """A way to measure: name of its figure behind ``NAME``, the configuration, and where the adapters are."""

    name: str
    chosen: dict[str, Any]
    top_half: bool = False
    target: str | None = None


CASES = (
    Case("", {}, target="<= 1.05"),
    Case("_no_trim", {"measure": {"trim": False}}),
    Case("_top_half", {}, True, "<= 0.5"),
    Case("_top_half_no_trim", {"measure": {"trim": False}}, True),
    Case("_top_half_no_keep", {"measure": {"keep_gib": 0}}, True),
    Case("_system_prompt", {"behaviour": {"system_prompt": SYSTEM}}),
    Case(
        "_system_prompt_no_share_prefix",
        {"behaviour": {"system_prompt": SYSTEM}, "measure": {"share_prefix": False}},
    ),
)


def measurements(options: Options, cases: tuple[Case, ...] = CASES) -> Iterator[Figure]:
    """The figures of all cases, and of readings without the savings that have no switch."""
    for case in cases:
        yield from measurement(options, case)
    monitor, adapted = watched(options, Case("", {}))
    yield from readings(monitor.instrument, adapted, options)


def measurement(options: Options, case: Case) -> Iterator[Figure]:
    """One measurement of the callback over a bare pass."""
    monitor, adapted = watched(options, case)
    turns = in_turns(_measure(monitor, adapted), _forward(monitor, adapted, options), options.repeats, options.device)
    if not case.name:
        yield Figure(NAME, [a.wall / b.wall for a, b in turns], case.target)
        yield Figure("padding_of_probes", [monitor.instrument.batches.padding], unit="share")
        yield from _books(monitor, adapted, options)
    yield Figure(f"{NAME}_cpu{case.name}", [a.cpu / b.cpu for a, b in turns], case.target)
    if case.name == "_top_half":
        yield Figure("kept_of_lower_layers", [monitor.instrument.savings.lower.bytes / 2**20], unit="MiB")
        upper = _forward(monitor, adapted, options, first=monitor.instrument.savings.lower.first)
        turns = in_turns(upper, _forward(monitor, adapted, options), options.repeats, options.device)
        yield Figure("upper_layers_over_probe_forward", [a.cpu / b.cpu for a, b in turns])


def _books(monitor: Monitor, adapted: Any, options: Options) -> Iterator[Figure]:
    """What is left of a measurement when the model has been read."""
    reading, bare = monitor.instrument.read(adapted), _forward(monitor, adapted, options)
    measure = _measure(monitor, adapted)

    def books() -> None:
        with patch.object(Instrument, "read", lambda *_, **__: reading):
            measure()

    turns = in_turns(books, bare, options.repeats, options.device)
    yield Figure("books_over_probe_forward_cpu", [a.cpu / b.cpu for a, b in turns])
    handed = reading.pre.numel() * 8 + reading.gate.numel() * 8 + reading.log_probs.nbytes
    yield Figure("handed_to_the_host", [handed / 2**10], unit="KiB")


def watched(options: Options, case: Case) -> tuple[Monitor, Any]:
    """The callback's monitor of a model with adapters, and the model."""
    model, tokenizer = load(options)
    adapted: Any = get_peft_model(model, _lora(model, case.top_half))
    plan = build_plan(settings(options, case.chosen))
    plan = replace(
        plan,
        distil=replace(plan.distil, cv_folds=0),  # the start is not timed
        make_sinks=lambda _: (MemorySink(),),
        noise_draws=0,
        on_error="raise",
        attribution=AttributionOptions(engine="off"),
    )
    trainer = Trainer(training_arguments(options, "unused"), None, None, tokenizer)
    return Monitor(plan, adapted.eval(), trainer, 0, 1e-3), adapted


def _lora(model: Any, top_half: bool) -> Any:
    config = lora()
    if top_half:
        layers = len(decoder_layers(model))
        config.layers_to_transform = list(range((layers + 1) // 2, layers))
        config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    return config


def _measure(monitor: Monitor, adapted: Any) -> Callable[[], None]:
    step = 0

    def measure() -> None:
        nonlocal step
        with torch.no_grad():
            for parameter in trained_parameters(adapted):  # as training does: every window sees other weights
                parameter.add_(torch.randn_like(parameter), alpha=1e-4)
        step += 1
        monitor.measure(adapted, step, step, (), {})

    return measure


def _forward(monitor: Monitor, adapted: Any, options: Options, *, first: int = 0) -> Callable[[], None]:
    """A bare pass, of the layers from ``first`` on."""
    batches, width = monitor.instrument.batches, adapted.get_input_embeddings().embedding_dim
    inputs, nodes = [batch.input_ids.to(options.device) for batch in batches.batches], len(batches.tree.tokens)

    @torch.no_grad()
    def forward() -> None:
        for rows in inputs:
            stream = torch.zeros(*rows.shape, width, device=rows.device, dtype=adapted.dtype)
            with begun_at(adapted, first, stream) if first else contextlib.nullcontext():
                adapted(input_ids=rows, logits_to_keep=nodes, use_cache=False)

    return forward
