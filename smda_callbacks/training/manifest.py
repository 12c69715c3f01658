"""Where a run comes from: everything that two runs must share to be compared, and what is needed to repeat one."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch
from torch import nn

from smda_callbacks.observe.activations import unwrap
from smda_callbacks.observe.divided import shape_of
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.sharding import Team, whole_weights
from smda_callbacks.records import SCHEMA_VERSION, PolicyRecord, policy_hash
from smda_callbacks.training.plan import Plan

_PACKAGES = ("numpy", "torch", "transformers", "trl", "peft", "sae-lens", "accelerate", "wandb", "smda-callbacks")


def build_manifest(
    plan: Plan,
    instrument: Instrument,
    policy: PolicyRecord,
    model: nn.Module,
    args: Any,
    attribution: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of a run: configuration, versions, git commit, seeds; hashes of probes, SAE, policy and model."""
    handle = instrument.handle
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": uuid.uuid4().hex[:12],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dict(plan.config),
        "versions": package_versions(),
        "git_sha": _git_sha(),
        "seeds": {"smda": plan.seed, "trainer": args.seed, "data": args.data_seed},
        "probe_hash": instrument.probes.hash,
        "sae": {
            "id": handle.id,
            "hash": handle.hash,
            "hook_name": handle.site.name,
            "architecture": handle.architecture,
            "d_in": handle.d_in,
            "d_sae": handle.d_sae,
        },
        "model": {"id": policy.model_id, "hash": weights_hash(model, team=instrument.team), "class": class_name(model)},
        "adapter": _adapter(model),
        "policy_hash": policy_hash(policy),
        "policy_from": "distilled" if plan.policy is None else "saved",
        "behaviours": list(policy.behaviours),
        "target": policy.target,
        "trainer": _trainer(args),
        **({"scored_by": "preference"} if instrument.by_preference else {}),
        **({"attribution": dict(attribution)} if attribution else {}),
    }


def weights_hash(model: nn.Module, sample: int = 4096, team: Team | None = None) -> str:
    """SHA-256 over names, shapes and the first ``sample`` values of every frozen weight: tells models apart quickly.

    Trained weights are left out: they are what the run changes. ``team``: helps where weights are divided over it.
    """
    digest = hashlib.sha256()
    frozen = {name: each for name, each in sorted(model.named_parameters()) if not each.requires_grad}
    starts = whole_weights(model, list(frozen.values()), team, lambda whole: whole.flatten()[:sample].cpu().clone())
    for (name, parameter), values in zip(frozen.items(), starts, strict=True):
        digest.update(f"{name}{tuple(shape_of(parameter))}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def class_name(model: nn.Module) -> str:
    """The class of the Hugging Face model; FSDP2 makes one of its own out of it."""
    kind = type(unwrap(model))
    return str(kind.__mro__[2].__name__ if hasattr(kind, "unshard") else kind.__name__)


def _adapter(model: nn.Module) -> dict[str, Any]:
    configs = getattr(model, "peft_config", {})
    return {name: _plain(config.to_dict()) for name, config in configs.items()}


def _trainer(args: Any) -> dict[str, Any]:
    names = (
        "learning_rate",
        "lr_scheduler_type",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "optim",
        "weight_decay",
        "warmup_steps",
        "max_grad_norm",
        "bf16",
        "fp16",
        "activation_checkpointing",
        "gradient_checkpointing",  # its name before transformers 5.23
    )
    return {"class": type(args).__name__, **{name: _plain(getattr(args, name, None)) for name in names}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain(item) for item in items]
    value = getattr(value, "value", value)  # enums such as the scheduler's name
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_sha() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
