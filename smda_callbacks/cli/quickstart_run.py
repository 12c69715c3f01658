"""The run behind ``smda quickstart``: what a user's own script does, in order. Imports the training libraries."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from threadpoolctl import threadpool_limits
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from smda_callbacks.cli.inputs import load_model
from smda_callbacks.config.build import builtin_path
from smda_callbacks.config.callback import SMDACallback
from smda_callbacks.config.load import check_config
from smda_callbacks.training.lines import group_means, opening_line

SEED = 0
PROJECT = "smda-quickstart"
MODEL, SAE, PAIRS = (f"builtin:quickstart/{name}" for name in ("quickstart-chat", "sae", "sft_pairs.jsonl"))

#: How many lines of progress a run prints.
LINES = 8


@dataclass(frozen=True)
class Work:
    """A trainer that is ready to start."""

    trainer: SFTTrainer
    callback: SMDACallback
    parameters: int
    trained: int
    pairs: int


def build(folder: Path, *, seed: int = SEED) -> Work:
    """Model, LoRA adapter, pairs and the callback, in a trainer. ``seed``: of adapter and order of the pairs.

    Raises:
        ProbeError, InputError, SAEError: what ships with the library is not there.
    """
    config = check_config(settings(folder), "the quickstart's configuration")
    model, tokenizer = load_model(config)
    callback = SMDACallback.from_config(config)
    pairs = [as_chat(json.loads(line)) for line in Path(builtin_path(PAIRS)).read_text(encoding="utf-8").splitlines()]
    datasets.disable_progress_bars()
    set_seed(seed)  # the adapter's weights are drawn before the trainer sets its own seed
    trainer = SFTTrainer(
        model=model,
        args=arguments(folder, seed),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log to standard output
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return Work(trainer, callback, sum(p.numel() for p in trainer.model.parameters()), trained, len(pairs))


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """A pair as messages: TRL trains plain strings without the chat template."""
    if not isinstance(row.get("prompt"), str):
        return row
    return {
        **row,
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def settings(folder: Path) -> dict[str, Any]:
    """The configuration, as a YAML file would hold it."""
    return {
        "model": {"id": MODEL, "dtype": "float32"},
        "sae": {"source": SAE},
        "store": {"dir": str(folder / "run")},
        "trajectory": {"keep": True},  # for smda rescore
        "wandb": {"project": PROJECT, "mode": "offline"},
        "seed": SEED,
    }


def arguments(folder: Path, seed: int = SEED) -> SFTConfig:
    """The trainer's arguments: float32 on one thread, one epoch, every step logged."""
    names = SFTConfig.__dataclass_fields__  # this argument changed its name in transformers 5.23
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return SFTConfig(
        output_dir=str(folder / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_length=128,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=["wandb"],
        **{checkpointing: False},
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
    )


@dataclass(frozen=True)
class Outcome:
    """``wandb``: what to do to see the run in W&B, a command or an address; None where W&B is switched off."""

    steps: int
    wandb: str | None


def train(work: Work, tell: Callable[[str], None], warn: Callable[[str], None]) -> Outcome:
    """Train; ``tell`` hears how it goes, ``warn`` every alert."""
    work.trainer.add_callback(_Narrator(work.callback, tell))
    with _alerts(warn), _one_thread():
        try:
            work.trainer.train()
        finally:
            view = _finish_wandb()
    return Outcome(int(work.trainer.state.global_step), view)


@contextmanager
def environment(folder: Path) -> Iterator[None]:
    """W&B offline, wholly inside ``folder`` and without messages, where the user has not said otherwise."""
    wanted = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_DATA_DIR": str(folder / "wandb"),
        "WANDB_CACHE_DIR": str(folder / "wandb"),
        "WANDB_PROJECT": PROJECT,
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "TOKENIZERS_PARALLELISM": "false",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        with warnings.catch_warnings():
            # Transformers reads its own deprecated names.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class _Narrator(TrainerCallback):
    """Tells how training goes, a few times."""

    def __init__(self, watched: SMDACallback, tell: Callable[[str], None]) -> None:
        self.watched, self.tell = watched, tell
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watched.monitor is not None:
            self.tell(opening_line(self.watched.monitor))
        self._tell(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.loss = float(logs["loss"])
            if state.global_step % max(1, state.max_steps // LINES) == 0 or state.global_step == state.max_steps:
                self._tell(state)

    def _tell(self, state: Any) -> None:
        if self.watched.monitor is not None:
            harmful, benign = group_means(self.watched.monitor)
            loss = "" if self.loss is None else f", loss {self.loss:.2f}"
            self.tell(
                f"step {state.global_step:>3} of {state.max_steps}: refusal {harmful:.2f} on probes to refuse, "
                f"{benign:.2f} on the others{loss}"
            )


@contextmanager
def _alerts(warn: Callable[[str], None]) -> Iterator[None]:
    """Hand the library's warnings to ``warn`` instead of the log."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warn(record.getMessage())

    logger, handler = logging.getLogger("smda_callbacks"), Handler(logging.WARNING)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small are multiplied faster by one thread than by several, in torch as in numpy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def _finish_wandb() -> str | None:
    """End the run that the trainer opened and would leave open, and say how to look at it."""
    import wandb

    run = wandb.run
    if run is None:
        return None
    folder = Path(run.dir).parent.parent
    here = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    view = f"wandb leet {here}" if run.offline else run.url
    run.finish()
    return None if run.disabled else view
