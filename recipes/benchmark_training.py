"""Training runs that recipes/benchmark_overhead.py times: the quickstart's, watched or not."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from recipes.benchmark_maths import Figure
from smda_callbacks import SMDACallback
from smda_callbacks.config.build import builtin_path
from smda_callbacks.config.load import check_config
from smda_callbacks.config.schema import SMDAConfig

#: Settings that attribute nothing to pairs.
NO_PAIRS: dict[str, Any] = {"attribution": {"engine": "off"}}


@dataclass(frozen=True)
class Options:
    """What is measured, and how often; training runs, which take long, three times at most."""

    model: str
    sae: str
    pairs: str
    device: str
    repeats: int
    train_steps: int  # -1: one epoch


def training(options: Options) -> Iterator[Figure]:
    """A whole run, watched in several ways, over the same run unwatched."""
    names: dict[str, dict[str, Any]] = {
        "train_with_over_without": {},
        "train_with_over_without_every_10": {"measure": {"every": 10}},
        "train_with_over_without_no_pairs": NO_PAIRS,
    }
    ratios: dict[str, list[float]] = {name: [] for name in names}
    train_runtime(options, None)
    for _ in range(min(options.repeats, 3)):
        for name, chosen in names.items():
            ratios[name].append(train_runtime(options, chosen) / train_runtime(options, None))
    for name, values in ratios.items():
        yield Figure(name, values)


def train_runtime(options: Options, chosen: dict[str, Any] | None) -> float:
    """Seconds that the trainer reports for a run, watched with these settings or (None) not at all."""
    return train(options, None if chosen is None else SMDACallback.from_config(settings(options, chosen)))


def be_silent() -> None:
    """No messages between the figures; new processes need it again."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # what TRL asks of transformers is not ours to change
    logging.getLogger("smda_callbacks").addHandler(logging.NullHandler())
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()


def train(options: Options, callback: TrainerCallback | None) -> float:
    """Seconds that the trainer reports for a run with this callback."""
    be_silent()
    set_seed(0)
    model, tokenizer = load(options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=training_arguments(options, folder),
            train_dataset=read_pairs(options.pairs),
            processing_class=tokenizer,
            peft_config=lora(),
            callbacks=[] if callback is None else [callback],
        )
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().metrics["train_runtime"])


def load(options: Options) -> tuple[Any, Any]:
    """Model and tokenizer."""
    source = builtin_path(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    return model.to(options.device), AutoTokenizer.from_pretrained(source)


def lora() -> LoraConfig:
    """The adapter that is trained."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def read_pairs(source: str) -> Dataset:
    """Prompts and completions of a JSONL file, as messages."""
    rows = [json.loads(line) for line in Path(builtin_path(source)).read_text(encoding="utf-8").splitlines()]
    roles = {"prompt": "user", "completion": "assistant"}
    return Dataset.from_list(
        [
            {
                key: [{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key]
                for key, role in roles.items()
            }
            for row in rows
        ]
    )


def settings(options: Options, chosen: dict[str, Any] | None = None) -> SMDAConfig:
    """The callback's configuration: defaults all through, but W&B is left out."""
    values = {"sae": {"source": options.sae}, "wandb": {"enabled": False}, **(chosen or {})}
    return check_config(values, "the benchmark's configuration")


def training_arguments(options: Options, folder: str) -> SFTConfig:
    """The quickstart's arguments."""
    return SFTConfig(
        output_dir=folder,
        num_train_epochs=1,
        max_steps=options.train_steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_length=128,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=options.device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
