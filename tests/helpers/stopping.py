"""A small run that can be stopped and gone on with.

As a script, ``python -m tests.helpers.stopping FOLDER STEPS``, it starts a training for every line that it reads: a
process of its own, which goes on from the newest whole checkpoint in the folder, if there is one. It says the process's
number when training is about to begin and how the process ended after that.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from smda_callbacks.config.build import free_folder
from smda_callbacks.observe.distil import DistilOptions
from smda_callbacks.observe.sae import load_sae
from smda_callbacks.sinks.past import Past
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.plan import Plan
from tests.helpers.pair_training import CHECKPOINTING
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer

STEPS = 6

#: Sentences to train on; each is a row of its own.
ROWS = [
    {"text": f"Tell me about {word} number {k}. Sure, here is {word}, and again {word}."}
    for k in range(4)
    for word in ("tea", "rain", "cars", "soup", "trains")
]


class Stopped(RuntimeError):
    """The training was stopped on purpose."""


class Stop(TrainerCallback):
    """Breaks a training off at a step: after its checkpoint was written, or before."""

    def __init__(self, step: int, *, saved: bool = True) -> None:
        self.step, self.saved = step, saved

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.saved and state.global_step == self.step:
            raise Stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.saved and state.global_step == self.step:
            raise Stopped


def _free(args: Any) -> Path:
    return free_folder(Path(args.output_dir) / "smda")


def _reopen(args: Any, past: Past | None) -> list[StoreSink]:
    return [StoreSink(_free(args)) if past is None else StoreSink(past.store.path, resume=True)]


def make_plan(sae: Path, **options: Any) -> Plan:
    """A plan whose stores lie in the trainer's folder: ``smda``, ``smda-2`` and so on.

    All gradients are taken anew at every reading, and momentum stays in its line: the only two things that a pair's
    books are made of and that a checkpoint does not hold.
    """
    settings: dict[str, Any] = {
        "probes": many_probes(24),
        "load_sae": lambda: load_sae(sae),
        "distil": DistilOptions(support=6, min_active=3, cv_folds=3),
        "noise_draws": 1,
        "attribution": AttributionOptions("ghost", renew=None, momentum="line"),
        "make_sinks": lambda args: [StoreSink(_free(args))],
        "reopen_sinks": _reopen,
        "on_error": "raise",
    }
    return Plan(**{**settings, **options})


def make_trainer(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Any:
    """A trainer of six steps that leaves a checkpoint after each."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "bf16": False,
        CHECKPOINTING: False,
        "report_to": [],
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 64,
    }
    torch.manual_seed(0)
    return SFTTrainer(
        model=tiny_model(num_hidden_layers=2),
        args=SFTConfig(**{**settings, **options}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM"),
        callbacks=list(callbacks),
    )


def train(folder: Path, plan: Plan, *callbacks: TrainerCallback, start: int | None = None, **options: Any) -> None:
    """Train in ``folder``, from the checkpoint of the step ``start`` if given. ``Stopped`` ends it quietly."""
    trainer = make_trainer(folder, MeasuringCallback(plan), *callbacks, **options)
    with contextlib.suppress(Stopped):
        trainer.train(resume_from_checkpoint=None if start is None else str(folder / f"checkpoint-{start}"))


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints that a trainer can go on from; a kill may leave one half-written."""
    found = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):  # it is written last
        try:
            found.append(int(json.loads(state.read_bytes())["global_step"]))
        except ValueError:
            continue
    return sorted(found)


def go_on(folder: Path, steps: int) -> None:
    """Train to ``steps``, from the newest whole checkpoint in ``folder``."""
    checkpoints = whole_checkpoints(folder)
    train(folder, make_plan(folder / "sae"), start=checkpoints[-1] if checkpoints else None, max_steps=steps)


def main(folder: Path, steps: int) -> None:
    save_sae(tiny_sae(), folder / "sae")
    print("ready", flush=True)
    for _ in sys.stdin:
        pid = os.fork()  # a new process without the seconds that its imports would take
        if pid == 0:
            code = 1
            try:
                go_on(folder, steps)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
