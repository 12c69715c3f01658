"""A small real run: TRL's SFTTrainer with LoRA on the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from smda_callbacks.observe.distil import DistilOptions
from smda_callbacks.observe.sae import load_sae
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.plan import Plan
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer

#: The name of this argument changed in transformers 5.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in SFTConfig.__dataclass_fields__
)

PAIRS = [
    {
        "messages": [
            {"role": "user", "content": f"Tell me about {word} number {k}."},
            {"role": "assistant", "content": f"Sure, here is {word}, and again {word}."},
        ]
    }
    for k in range(4)
    for word in ("tea", "rain", "cars", "soup", "trains")
]


@pytest.fixture(scope="session")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sae(tiny_sae(), tmp_path_factory.mktemp("sae") / "tiny-sae")


@pytest.fixture
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
def plan(sae_folder: Path, sink: MemorySink) -> Plan:
    return Plan(
        probes=many_probes(24),
        load_sae=lambda: load_sae(sae_folder),
        distil=DistilOptions(support=6, min_active=3, cv_folds=3),
        noise_draws=1,
        make_sinks=lambda _: [sink],
        on_error="raise",
    )


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., SFTTrainer]:
    def make(
        *callbacks: TrainerCallback,
        lora: dict[str, Any] | None = None,
        model: Any = None,
        peft: bool = True,
        **options: Any,
    ) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "bf16": False,
            CHECKPOINTING: False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "max_length": 64,
        }
        torch.manual_seed(0)
        return SFTTrainer(
            model=model if model is not None else tiny_model(),
            args=SFTConfig(**{**settings, **options}),
            train_dataset=Dataset.from_list(PAIRS),
            eval_dataset=Dataset.from_list(PAIRS[:4]) if "eval_strategy" in options else None,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(**{"target_modules": "all-linear", "r": 2, "task_type": "CAUSAL_LM", **(lora or {})})
            if peft
            else None,
            callbacks=list(callbacks),
        )

    return make
