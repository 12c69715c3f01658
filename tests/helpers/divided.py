"""Trainings of a model that FSDP2 divides over two processes; started by torchrun, told by files.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.helpers.divided SAE OUT CASE``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from smda_callbacks.observe import reading
from smda_callbacks.observe.divided import is_part, put_together
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.noise import RandomMoves, trained_parameters
from smda_callbacks.observe.sharding import Move, ProcessError
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from tests.helpers.processes import failing, make_plan
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.training.conftest import CHECKPOINTING, PAIRS

STEPS = 5

#: Name -> options of FSDP2, of the adapter, whether embeddings are tied, options of the trainer.
SETUPS: dict[str, tuple[dict[str, Any], dict[str, Any], bool, dict[str, Any]]] = {
    "bf16": ({}, {}, False, {"bf16": True}),
    "checkpointing by FSDP2": ({"activation_checkpointing": True}, {}, False, {}),
    "checkpointing by the trainer": ({}, {}, False, {CHECKPOINTING: True}),
    "accumulation": ({}, {}, False, {"gradient_accumulation_steps": 2}),
    "DoRA": ({}, {"use_dora": True}, False, {}),
    "tied": ({}, {}, True, {}),
}

SHAPES = ((3, 5), (1, 4), (4, 2), (7,))


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Context in which accelerate takes its FSDP2 way on the CPU too, where it would quietly take DDP instead."""
    real = AcceleratorState.__init__

    def init(self: Any, *given: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        real(self, *given, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = real


class Weights(TrainerCallback):
    """The trained weights after every step, and how many weights of the model are divided."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []
        self.divided = self.trained_divided = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = trained_parameters(kwargs["model"])
        self.steps.append([put_together(each).detach().clone() for each in trained])
        self.divided = sum(map(is_part, kwargs["model"].parameters()))
        self.trained_divided = sum(map(is_part, trained))


def train(
    folder: Path,
    *callbacks: TrainerCallback,
    model: Any = None,
    fsdp: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    **more: Any,
) -> Weights:
    """Train for a few steps; ``fsdp``: divided by accelerate, with this configuration."""
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "learning_rate": 5e-3,
        "adam_epsilon": 1e-3,
        "bf16": False,
        CHECKPOINTING: False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 64,
        "ddp_backend": "gloo",
    }
    if fsdp is not None:
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **fsdp}
        options |= {"fsdp": True, "fsdp_config": wrapped}
    weights = Weights()
    args = SFTConfig(str(folder), **{**options, **more})
    lora = {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **(lora or {})}
    torch.manual_seed(0)
    SFTTrainer(
        model=tiny_model() if model is None else model,
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**lora),
        callbacks=[*callbacks, weights],
    ).train()
    return weights


def broken_pass(rank: int, at: int) -> None:
    """From now on the pass number ``at`` over a batch of probes breaks off within the model on process ``rank``."""
    real = reading.tree_pass
    count = 0

    def broken(model: Any, *given: Any) -> Any:
        nonlocal count
        count += 1
        if count != at or int(os.environ["RANK"]) != rank:
            return real(model, *given)

        def give_up(*_: Any) -> None:
            raise torch.OutOfMemoryError("no memory left")

        layer = model.get_base_model().model.layers[1]
        handle = layer.self_attn.register_forward_pre_hook(give_up)
        try:
            return real(model, *given)
        finally:
            handle.remove()

    reading.tree_pass = broken


def late_fault(rank: int, at: int) -> None:
    """From now on what comes after the pass number ``at`` over a batch fails on process ``rank``."""
    real = reading._features
    count = 0

    def fails(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == at and int(os.environ["RANK"]) == rank:
            reading._features = real
            raise RuntimeError("out of sorts")
        return real(*given)

    reading._features = fails


def moved_alike() -> list[bool]:
    """Whether parts of weights are moved as the whole ones are, and come back; some processes hold nothing of some."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for shape in SHAPES]
    parts = [torch.nn.Parameter(distribute_tensor(each.detach(), mesh, [Shard(0)])) for each in whole]
    moves, found = (RandomMoves(whole), RandomMoves(parts)), []
    for draw in (0, 2):
        move = Move(0.1, 5, draw)
        with moves[0].applied(move), moves[1].applied(move):
            found += [torch.equal(put_together(part), each) for part, each in zip(parts, whole, strict=True)]
    before = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES]
    return found + [torch.equal(put_together(part), each) for part, each in zip(parts, before, strict=True)]


def measured(run: Callable[..., Weights], sae: Path, out: Path, store: Callable[[str], list[Sink]]) -> dict[str, Any]:
    """What the test looks at of one way of dividing a model."""
    found: dict[str, Any] = {}
    plan = replace(make_plan(sae, store("store")), attribution=AttributionOptions())
    run(out / "trainer", MeasuringCallback(plan), lora={"lora_dropout": 0.0})
    without = run(out / "trainer")
    found["without"], found["divided"] = without.steps, (without.divided, without.trained_divided)
    # Readings: distillation, four of the noise floor, then one per step, of three rounds each.
    late_fault(rank=1, at=5 * 3 + 2)
    real = Instrument.read_share
    Instrument.read_share = failing(real, {(1, 7): "raise", (1, 8): "nan", (0, 9): "raise"})  # type: ignore[method-assign]
    found["failing"] = run(out / "trainer", MeasuringCallback(make_plan(sae, store("failing")))).steps
    Instrument.read_share = real  # type: ignore[method-assign]
    plan = make_plan(sae)
    try:  # three rounds on the first process, four on the second
        run(out / "trainer", MeasuringCallback(replace(plan, batch_size=5 if int(os.environ["RANK"]) == 0 else 3)))
    except ProcessError as error:
        found["differ"] = str(error)
    found["moved"] = moved_alike()
    return found


def set_ups(sae: Path, out: Path) -> dict[str, tuple[bool, int, list[str]]]:
    """Of every set-up: whether weights are those without the callback, how many are divided, and what windows say."""
    found = {}
    for name, (fsdp, lora, tied, more) in SETUPS.items():
        sink = MemorySink()
        plan = make_plan(sae, [sink] if os.environ["RANK"] == "0" else [])
        with_and_without = [
            train(out / "trainer", *each, model=tiny_model(tie_word_embeddings=tied), fsdp=fsdp, lora=lora, **more)
            for each in ([MeasuringCallback(plan)], [])
        ]
        steps = [tensor for run in with_and_without for step in run.steps for tensor in step]
        half = len(steps) // 2
        same = half > 0 and all(torch.equal(a, b) for a, b in zip(steps[:half], steps[half:], strict=True))
        found[name] = same, with_and_without[0].divided, [window.status for window in sink.windows]
    return found


def main(sae: Path, out: Path, case: str) -> None:
    """All that the test looks at, as ``OUT/<rank>.pt``."""
    rank = int(os.environ["RANK"])

    def store(name: str) -> list[Sink]:
        return [StoreSink(out / name)] if rank == 0 else []

    def accelerated(*given: Any, **options: Any) -> Weights:
        return train(*given, fsdp={"reshard_after_forward": case != "kept"}, **options)

    def at_loading(*given: Any, **options: Any) -> Weights:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(fsdp_size=2)
        model = AutoModelForCausalLM.from_pretrained(out / "tiny", distributed_config=config)
        return train(*given, model=model, **options)

    with fsdp_on_cpu():
        if case.startswith("broken"):
            broken_pass(rank=int(case[-1]), at=2)
            accelerated(out / "trainer", MeasuringCallback(make_plan(sae)))
        if case == "set-ups":
            torch.save(set_ups(sae, out), out / f"{rank}.pt")
            return
        found = measured(at_loading if case == "loading" else accelerated, sae, out, store)
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
