"""Trainers other than SFT, each on a few rows of its own kind, with LoRA on the tiny model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.training.conftest import CHECKPOINTING

STEPS = 2

_PREFERENCES: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"Tell me about rain {k}."}],
        "chosen": [{"role": "assistant", "content": "Sure, here it is."}],
        "rejected": [{"role": "assistant", "content": f"No, never {k}."}],
    }
    for k in range(8)
]


def make_trainer(kind: str, folder: Path, callbacks: Sequence[TrainerCallback]) -> Any:
    """A trainer of ``kind``: plain, DPO, KTO, GRPO or Reward. Dropout, so that a stray random number shows."""
    torch.manual_seed(0)
    return _MAKERS[kind](str(folder), list(callbacks))


def _options(**more: Any) -> dict[str, Any]:
    common = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": []}
    return {**common, "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, **more}


def _lora(task: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.2, task_type=task)


def _plain(folder: str, callbacks: list[TrainerCallback]) -> Any:
    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer([f"hello {k} there" for k in range(8)])["input_ids"]]
    args = TrainingArguments(folder, **_options())
    model = get_peft_model(tiny_model(), _lora())
    return Trainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=callbacks)


def _of_trl(name: str, rows: list[dict[str, Any]], **options: Any) -> Callable[[str, list[TrainerCallback]], Any]:
    def make(folder: str, callbacks: list[TrainerCallback]) -> Any:
        reward = name == "Reward"
        arguments = {"reward_funcs": _length} if name == "GRPO" else {}
        model = tiny_model()
        if reward:
            model.config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
        return getattr(trl, f"{name}Trainer")(
            model,
            args=getattr(trl, f"{name}Config")(folder, **_options(**{CHECKPOINTING: False}, **options)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
            peft_config=_lora("SEQ_CLS" if reward else "CAUSAL_LM"),
            callbacks=callbacks,
            **arguments,
        )

    return make


def _length(completions: Any, **_: Any) -> list[float]:
    return [float(len(messages[0]["content"])) for messages in completions]


_MAKERS: dict[str, Callable[[str, list[TrainerCallback]], Any]] = {
    "plain": _plain,
    "DPO": _of_trl("DPO", _PREFERENCES),
    "KTO": _of_trl(
        "KTO",
        [{"prompt": r["prompt"], "completion": r["chosen"], "label": k % 2 == 0} for k, r in enumerate(_PREFERENCES)],
    ),
    "GRPO": _of_trl(
        "GRPO", [{"prompt": r["prompt"]} for r in _PREFERENCES], num_generations=2, max_completion_length=6
    ),
    "Reward": _of_trl(
        "Reward", [{name: r["prompt"] + r[name] for name in ("chosen", "rejected")} for r in _PREFERENCES]
    ),
}
