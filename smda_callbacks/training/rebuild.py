"""The trainer of a recorded run, built again from what its trajectory says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from smda_callbacks.sinks import trajectory as layout
from smda_callbacks.sinks.trajectory import TrajectoryError, TrajectoryFolder
from smda_callbacks.training.manifest import weights_hash
from smda_callbacks.training.trajectory_read import RecordedStep

#: Arguments that have to do with data, reports and checkpoints: batches come ready made, and nothing is reported.
_OTHER: dict[str, Any] = {
    "report_to": [],
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "resume_from_checkpoint": None,
    "disable_tqdm": True,
    "max_steps": 1,
    "packing": False,
    "padding_free": False,
    "assistant_only_loss": False,
    "completion_only_loss": None,
    "activation_checkpointing": False,  # computes the same; the passes backward through a backward pass cannot use it
    "gradient_checkpointing": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "eos_token": None,
    "pad_token": None,
    "model_init_kwargs": None,
}
_DROPPED = frozenset(
    {"chat_template_path", "logging_dir", "run_name", "hub_model_id", "push_to_hub_token", "hub_token"}
)


def load_base(meta: Mapping[str, Any], model: str | Path | nn.Module | None, device: str) -> Any:
    """The model without its adapter: ``model`` if it is one, else loaded from there, or from where the run had it.

    Raises:
        TrajectoryError: it cannot be loaded; says what to do.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(model, nn.Module):
        return model.to(device)
    known, load = meta["model"], cast(Any, AutoModelForCausalLM.from_pretrained)
    source = str(model or known["id"])
    try:
        found = load(source, dtype=getattr(torch, known["dtype"]), attn_implementation=known["attention"])
    except (OSError, ValueError) as error:
        raise TrajectoryError(
            f"the run's model cannot be loaded from {source!r}: {error}. Next step: say where it lies (model=...)."
        ) from error
    return found.to(device)


def rebuild_trainer(
    folder: TrajectoryFolder, model: str | Path | nn.Module | None, device: str, first: RecordedStep, output: Path
) -> Any:
    """A trainer with the recorded class, arguments, model and adapter, its optimizer made and its model prepared.

    ``output``: a folder that it may write to.

    Raises:
        TrajectoryError: the model is not that of the run.
    """
    from peft import PeftConfig, get_peft_model

    meta, path = folder.meta, folder.path
    config = PeftConfig.from_pretrained(str(path / layout.ADAPTER))
    config.inference_mode = False
    adapted = get_peft_model(load_base(meta, model, device), config, adapter_name=meta.get("adapter", "default"))
    found = weights_hash(adapted)
    if found != meta["model"]["hash"]:
        raise TrajectoryError(
            f"the model is not the one that was trained: its frozen weights have the hash {found[:12]}, those of the "
            f"run {meta['model']['hash'][:12]}. Next step: give the very model (model=...), without an adapter."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of data and padding, which are not prepared here
        trainer = _make(meta, adapted, path / layout.TOKENIZER, first, output, device)
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    return trainer


def _make(meta: Mapping[str, Any], model: Any, tokenizer: Path, first: RecordedStep, output: Path, device: str) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    arguments: type[Any]
    kind: type[Any]
    if meta["trainer"] == "SFTTrainer":
        from trl import SFTConfig, SFTTrainer

        kind, arguments = SFTTrainer, SFTConfig
    else:
        kind, arguments = Trainer, TrainingArguments
    given = {"output_dir": str(output), "use_cpu": torch.device(device).type == "cpu"}
    row = {name: first.batches[0].inputs[name][0].tolist() for name in ("input_ids", "labels")}
    trainer = kind(
        model=model,
        args=arguments(**_kept(arguments, meta["args"]) | given),
        train_dataset=Dataset.from_list([row]),
        processing_class=AutoTokenizer.from_pretrained(str(tokenizer)),
    )
    for callback in list(trainer.callback_handler.callbacks):
        trainer.remove_callback(callback)
    return trainer


def _kept(arguments: type[Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded arguments that are not at their default, but for :data:`_OTHER`."""
    known = {each.name: each for each in fields(arguments) if each.init}
    found = {}
    for name, value in recorded.items():
        each = known.get(name)
        hidden = value == f"<{name.upper()}>"  # tokens of services and of tokenizers are not written out
        if each is None or name in _OTHER or name in _DROPPED or hidden:
            continue
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if value is not None and value != getattr(default, "value", default):
            found[name] = value
    return found | {name: value for name, value in _OTHER.items() if name in known}
