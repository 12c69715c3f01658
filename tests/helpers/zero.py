"""Trainings under DeepSpeed's ZeRO on two CPU processes; started by torchrun, told by files.

``DS_ACCELERATOR=cpu python -m torch.distributed.run --nproc-per-node 2 -m tests.helpers.zero SAE OUT CASE``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from smda_callbacks.observe.zero3 import is_zero3
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from tests.helpers.divided import Weights, broken_pass, measured, train
from tests.helpers.processes import make_plan
from tests.helpers.tiny import tiny_model
from tests.training.conftest import CHECKPOINTING

#: How many numbers a weight may have that ZeRO-3 keeps whole between passes: none, all LoRA matrices, its default.
PERSISTENT = {"zero3": 0, "kept": 200, "default": 100_000}

#: Name -> options of the adapter, whether embeddings are tied, options of the trainer.
SETUPS: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    "bf16": ({}, False, {"bf16": True}),
    "checkpointing": ({}, False, {CHECKPOINTING: True}),
    "accumulation": ({}, False, {"gradient_accumulation_steps": 2}),
    "DoRA": ({"use_dora": True}, False, {}),
    "tied": ({}, True, {}),
}


def configured(stage: int, persistent: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration; the rest is the trainer's."""
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    zero = {"stage": stage, "stage3_param_persistence_threshold": persistent}
    return {**auto, "bf16": {"enabled": "auto"}, "zero_optimization": zero}


def under(case: str, *given: Any, tied: bool = False, **options: Any) -> Weights:
    """Train as ``case`` says.

    ``zero1``, ``zero2``, those of ``PERSISTENT``: by the trainer's arguments. ``launched``: ZeRO-3 as ``accelerate
    launch`` configures it. ``loading``: ZeRO-3, and the model is cut to pieces as it is loaded.
    """
    unset_hf_deepspeed_config()  # of a training before: a model would be made in pieces, of other numbers
    stage = int(case[-1]) if case[-1] in "12" else 3
    config = configured(stage, PERSISTENT.get(case, 0))
    if case == "loading":
        counts = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        held = HfDeepSpeedConfig({**config, **counts})  # weakly, by transformers
        model = AutoModelForCausalLM.from_pretrained(Path(given[0]).parent / "tiny")
        assert held.is_zero3()
        assert all(map(is_zero3, model.parameters()))
    else:
        model = tiny_model(tie_word_embeddings=tied)
    return train(*given, model=model, **({} if case == "launched" else {"deepspeed": config}), **options)


def whole(run: Callable[..., Weights], sae: Path, out: Path, store: Callable[[str], list[Sink]]) -> dict[str, Any]:
    """What the test looks at where every process has the whole model."""
    plan = replace(make_plan(sae, store("store")), attribution=AttributionOptions())
    run(out / "trainer", MeasuringCallback(plan), lora={"lora_dropout": 0.0})
    without = run(out / "trainer")
    watched = run(out / "trainer", MeasuringCallback(make_plan(sae)))
    divided = without.divided, without.trained_divided
    return {"without": without.steps, "watched": watched.steps, "divided": divided}


def set_ups(sae: Path, out: Path) -> dict[str, tuple[bool, int, list[str]]]:
    """Of every set-up: whether weights are those without the callback, how many are divided, and what windows say."""
    found = {}
    for name, (lora, tied, more) in SETUPS.items():
        sink = MemorySink()
        plan = make_plan(sae, [sink] if os.environ["RANK"] == "0" else [])
        watched, without = (
            under("zero3", out / "trainer", *each, tied=tied, lora=lora, **more)
            for each in ([MeasuringCallback(plan)], [])
        )
        steps = [(a, b) for x, y in zip(watched.steps, without.steps, strict=True) for a, b in zip(x, y, strict=True)]
        same = len(steps) > 0 and all(torch.equal(a, b) for a, b in steps)
        found[name] = same, watched.divided, [window.status for window in sink.windows]
    return found


def main(sae: Path, out: Path, case: str) -> None:
    """All that the test looks at, as ``OUT/<rank>.pt``."""
    rank = int(os.environ["RANK"])

    def store(name: str) -> list[Sink]:
        return [StoreSink(out / name)] if rank == 0 else []

    def run(*given: Any, **options: Any) -> Weights:
        return under(case, *given, **options)

    if case.startswith("broken"):
        broken_pass(rank=int(case[-1]), at=2)
        under("zero3", out / "trainer", MeasuringCallback(make_plan(sae)))
    if case == "launched":
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    if case == "set-ups":
        found: dict[str, Any] = set_ups(sae, out)
    else:
        found = (whole if case in ("zero1", "zero2", "launched") else measured)(run, sae, out, store)
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
