"""A tiny model, SAE, probes, pairs and configurations on disk, and training commands in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer

BIN = Path(sys.executable).parent
STEPS = 2


@dataclass(frozen=True)
class Desk:
    """Where everything lies that a training command is given."""

    folder: Path

    @property
    def smda(self) -> str:
        return str(self.folder / "smda.yaml")

    def recipe(self, output: Path, **changes: Any) -> str:
        """A YAML file for TRL's sft script, written beside ``output``; its path."""
        values = {
            "model_name_or_path": str(self.folder / "tiny"),
            "dtype": "float32",
            "dataset_name": str(self.folder / "pairs"),
            "use_peft": True,
            "lora_r": 2,
            "lora_target_modules": ["q_proj", "v_proj"],
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "output_dir": str(output),
        }
        path = output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
        return str(path)


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    tiny_model().save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    save_sae(tiny_sae(), folder / "sae")
    probes = [vars(probe) for probe in many_probes(16).probes]
    pairs = [{"prompt": f"Tell me about tea {k}.", "completion": f" Sure, here is tea {k}."} for k in range(12)]
    (folder / "pairs").mkdir()
    for name, rows in (("probes.jsonl", probes), ("pairs/train.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "probes": {"sources": [{"source": "./probes.jsonl"}]},
        "sae": {"source": "./sae"},
        "policy": {"support": 4, "min_active": 3, "cv_folds": 0},
        "measure": {"noise_draws": 0, "on_error": "raise"},
    }
    (folder / "smda.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return Desk(folder)


def launch(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, without what this process may have set of ours."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SMDA")}
    given = {"CUDA_VISIBLE_DEVICES": "", **(env or {})}
    return subprocess.run(
        command, cwd=cwd, env={**clean, **given}, capture_output=True, text=True, timeout=240, check=False
    )


def trained(
    done: subprocess.CompletedProcess[str], output: Path, steps: tuple[int, ...] = tuple(range(1, STEPS + 1))
) -> RunStore:
    """The run store that a command left, which must have gone through, with a window that ends at each of ``steps``."""
    assert done.returncode == 0, done.stderr[-3000:]
    store = RunStore.open(output / "smda")
    assert [(window.step, window.status) for window in store.windows()] == [(step, "ok") for step in steps]
    assert store.end is not None
    assert store.end.status == "finished"
    return store
