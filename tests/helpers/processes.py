"""One small training on several processes, with and without the callback; started by torchrun, told by files.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.helpers.processes SAE OUT``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from smda_callbacks.observe import sharding
from smda_callbacks.observe.distil import DistilOptions
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.reading import Part
from smda_callbacks.observe.sae import load_sae
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.requirements import AdapterError, require_whole_model
from tests.helpers.tiny import many_probes, tiny_model, tiny_tokenizer
from tests.training.conftest import CHECKPOINTING, PAIRS

STEPS = 5


def make_plan(sae: Path, sinks: Sequence[Sink] = ()) -> Plan:
    """24 probes in five batches: the processes' shares differ in size."""
    return Plan(
        probes=many_probes(24),
        load_sae=lambda: load_sae(sae),
        distil=DistilOptions(support=6, min_active=3, cv_folds=3),
        batch_size=5,
        noise_draws=2,
        attribution=AttributionOptions(engine="off"),
        make_sinks=lambda _: sinks,
        on_error="warn",
    )


class Weights(TrainerCallback):
    """The trained weights after every step."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([p.detach().clone() for p in kwargs["model"].parameters() if p.requires_grad])


def train(
    folder: Path,
    *callbacks: TrainerCallback,
    rows_per_process: int = 1,
    dropout: float = 0.1,
    rows: int | None = None,
) -> list[list[torch.Tensor]]:
    """Train for a few steps; the same rows are in a step however many processes share them. Weights after each.

    ``rows``: train on so many rows only.
    """
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": rows_per_process,
        "learning_rate": 5e-3,
        "adam_epsilon": 1e-3,  # gradients near zero are not blown up: sums in another order stay close
        "bf16": False,
        CHECKPOINTING: False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 64,
    }
    if dist.is_initialized():
        options["ddp_backend"] = "gloo"
    weights = Weights()
    torch.manual_seed(0)
    SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(str(folder), **options),
        train_dataset=Dataset.from_list(PAIRS[:rows]),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear", r=2, lora_dropout=dropout, task_type="CAUSAL_LM"),
        callbacks=[*callbacks, weights],
    ).train()
    return weights.steps


class Alone(TrainerCallback):
    """Reads all probes on the main process after every step, and compares with what the processes read together."""

    def __init__(self, watching: MeasuringCallback) -> None:
        self.watching, self.same = watching, list[bool]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        monitor = self.watching.monitor
        if monitor is not None:
            alone = monitor.instrument.with_team(None)
            snapshot = alone.snapshot(state.global_step, alone.read(kwargs["model"]))
            pairs = ((getattr(snapshot, name), getattr(monitor.snapshot, name)) for name in ("pre", "gate", "y"))
            self.same.append(all(a.tobytes() == b.tobytes() for a, b in pairs))


def failing(real: Callable[..., list[Part]], faults: dict[tuple[int, int], str]) -> Callable[..., list[Part]]:
    """``Instrument.read_share`` that does what ``faults`` say of a process and the number of its call."""
    count = 0

    def broken(self: Instrument, model: Any, *visit: Any) -> list[Part]:
        nonlocal count
        count += 1
        what = faults.get((self.team.rank if self.team is not None else 0, count))
        if what == "raise":
            raise RuntimeError("out of luck")
        parts = real(self, model, *visit)
        return [replace(part, hidden=part.hidden * torch.nan) for part in parts] if what == "nan" else parts

    return broken


def main(sae: Path, out: Path) -> None:
    """All that the test looks at, as ``OUT/<rank>.pt``."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}

    def sinks(name: str) -> list[Sink]:
        return [StoreSink(out / name)] if rank == 0 else []

    train(out / "trainer", MeasuringCallback(make_plan(sae, sinks("store"))), dropout=0.0)

    found["without"] = train(out / "trainer")

    watching = MeasuringCallback(make_plan(sae))
    alone = Alone(watching)
    found["watched"] = train(out / "trainer", watching, alone)
    found["same"] = alone.same

    # Readings: distillation, four of the noise floor, then one per step.
    real = Instrument.read_share
    faults = {(1, 7): "raise", (1, 8): "nan", (0, 9): "raise"}
    Instrument.read_share = failing(real, faults)  # type: ignore[method-assign]
    watching = MeasuringCallback(make_plan(sae, sinks("failing")))
    found["failing"] = train(out / "trainer", watching)

    Instrument.read_share = failing(real, {(1, 3): "raise"})  # type: ignore[method-assign]
    try:
        train(out / "trainer", MeasuringCallback(make_plan(sae)))
    except sharding.ProcessError as error:
        found["refused"] = str(error)
    Instrument.read_share = real  # type: ignore[method-assign]

    divided = tiny_model()
    weight = distribute_tensor(divided.lm_head.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    divided.lm_head.weight = torch.nn.Parameter(weight)
    try:
        require_whole_model(divided)
    except AdapterError as error:
        found["divided"] = str(error)

    if rank == 0:
        try:
            sharding.join_team(join_seconds=1)
        except sharding.ProcessError as error:
            found["absent"] = str(error)
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
