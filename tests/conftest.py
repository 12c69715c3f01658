"""Every test is offline, on one thread, and writes to its own folder only."""

from __future__ import annotations

import os

# Before torch and the Hugging Face libraries are imported: tiny models run faster on one thread, and no test may
# reach a network.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ)  # datasets puts a copy in its place when it maps in processes
    monkeypatch.delenv("COLUMNS", raising=False)
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))


def pytest_report_header() -> str:
    """The versions that the numbers were checked with."""
    from importlib.metadata import version

    return ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "sae-lens", "wandb")
    )
