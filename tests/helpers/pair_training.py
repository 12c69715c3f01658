"""Real runs of TRL's trainer whose data tell their own row numbers, and a callback that notes which pairs it saw.

As a script it is one process of a distributed run: arguments are a folder for its notes and a number of rows.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from smda_callbacks.observe.sequences import BatchWatch, Sequence
from smda_callbacks.training.row_identity import PairIndex, build_index, find_trainer
from tests.helpers.tiny import tiny_model, tiny_tokenizer

#: The name of this argument changed in transformers 5.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in SFTConfig.__dataclass_fields__
)


def words(row: int) -> tuple[str, str]:
    """Prompt and answer of a row: of many lengths, the number in both."""
    return f"Row {row}:" + " tea?" * (row % 5), f" no {row}" + " rain" * (row * 7 % 11)


def user_data(kind: str, rows: int = 18) -> Dataset:
    """A data set as users have them: of ``kind`` text, prompt, chat prompt, chat or tokens."""
    found, tokenizer = [], tiny_tokenizer()
    for row in range(rows):
        prompt, answer = words(row)
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        content: dict[str, Any] = {
            "text": {"text": prompt + answer},
            "prompt": {"prompt": prompt, "completion": answer},
            "chat prompt": {"prompt": chat[:1], "completion": chat[1:]},
            "chat": {"messages": chat},
            "tokens": {"input_ids": tokenizer(prompt + answer)["input_ids"]},
        }[kind]
        if kind == "tokens":
            content["labels"] = content["input_ids"]
        found.append({**content, "kind": f"k{row % 3}", "serial": 100 + row, "note": "long " * 10 + str(row)})
    return Dataset.from_list(found)


class Noting(TrainerCallback):
    """Builds the index and notes the pairs of every optimizer step."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.steps: list[list[int]] = []
        self.examples: dict[int, Sequence] = {}
        self.index: PairIndex = None  # type: ignore[assignment]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.index = build_index(
            kwargs["train_dataloader"].dataset,
            tokenizer=kwargs["processing_class"],
            trainer_dataset=find_trainer().train_dataset,
            **self.options,
        )
        self._now: list[int] = []
        self.watch = BatchWatch(kwargs["model"], self._note)
        self.watch.attach()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(self._now)
        self._now = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.detach()

    def _note(self, examples: list[Sequence], shape: tuple[int, ...]) -> None:
        for each in examples:
            number = self.index.pair_of(each.key, each.tokens)
            self.examples[number] = each
            self._now.append(number)

    @property
    def seen(self) -> Counter[int]:
        """How often each pair was seen."""
        return Counter(number for step in self.steps for number in step)

    @property
    def rows(self) -> Counter[tuple[int, ...]]:
        """How often the user's rows were seen."""
        return Counter(self.index.describe(number).rows for step in self.steps for number in step)

    def row_steps(self) -> list[list[int]]:
        """The rows of every step; of runs in which each pair is one row."""
        return [[self.index.describe(number).rows[0] for number in step] for step in self.steps]


def make_trainer(data: Any, folder: Path, *callbacks: TrainerCallback, **options: Any) -> SFTTrainer:
    """A trainer on the tiny model: two epochs, batches of four."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "bf16": False,
        CHECKPOINTING: False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 64,
        "logging_steps": 1,
    }
    settings |= options
    torch.manual_seed(0)
    return SFTTrainer(
        model=tiny_model(num_hidden_layers=1),
        args=SFTConfig(**settings),
        train_dataset=data,
        eval_dataset=user_data("text", 4) if "eval_strategy" in options else None,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"),
        callbacks=list(callbacks),
    )


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    noting = Noting()
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    trainer = make_trainer(user_data("text", rows), folder, noting, **options)
    trainer.train()
    rank = trainer.args.process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(noting.row_steps()))


if __name__ == "__main__":
    main()
