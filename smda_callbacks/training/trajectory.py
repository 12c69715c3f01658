"""Recording a run so that it can be gone through again, bit by bit: what went in, and the states in between.

Driven by the callback's events. It copies what goes through; it draws no random number and changes nothing. A recording
that fails stops, is marked as stopped, and leaves training alone unless ``on_error`` is ``raise``.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from smda_callbacks.observe.activations import unwrap
from smda_callbacks.observe.lora import AttributionError, LoraSite, lora_sites
from smda_callbacks.observe.sequences import BatchWatch, Sequence
from smda_callbacks.observe.sharding import told
from smda_callbacks.sinks import files
from smda_callbacks.sinks import trajectory as layout
from smda_callbacks.sinks.codec import dumps
from smda_callbacks.training.manifest import package_versions, weights_hash
from smda_callbacks.training.row_identity import PairIndex
from smda_callbacks.training.trajectory_options import TrajectoryOptions
from smda_callbacks.training.trajectory_resume import cut, goes_on, remove, set_aside_rescored
from smda_callbacks.training.trajectory_state import inner, state_tensors

logger = logging.getLogger("smda_callbacks")

#: Arguments that a trainer adds to those of the batch.
ADDED = frozenset({"use_cache", "fused_lm_head", "num_items_in_batch", "output_router_logits", "return_dict"})

#: Settings of a group of parameters that the optimizer's arithmetic needs.
SETTINGS = ("lr", "weight_decay", "betas", "eps", "momentum")


@dataclass
class _Step:
    """What one optimizer step was made of, so far."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    batches: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    error: Exception | None = None


class Recorder:
    """Records one run into ``folder``.

    Making it writes what is known before training; see :mod:`smda_callbacks.training.trajectory_check`
    for what has to be checked before.

    Args:
        step: where training begins: above 0 it goes on from a checkpoint.
        training: whether the training that is recorded still runs.
    """

    def __init__(
        self,
        options: TrajectoryOptions,
        folder: Path,
        model: nn.Module,
        trainer: Any,
        optimizer: Any,
        index: PairIndex,
        *,
        step: int,
        training: Callable[[], bool] = lambda: True,
    ) -> None:
        self.options, self.folder, self.index = options, folder, index
        self.sites, self.model, self._training = lora_sites(model), model, training
        self.step = self._written = step
        self._now: _Step | None = None
        self._optimizer = optimizer
        self._described: set[int] = set()
        self._watch = BatchWatch(model, self._listen, self._wanted, inputs=self._see)
        self._open(trainer, optimizer)

    def begin_step(self) -> None:
        """Before the step's first forward pass."""
        self._now = _Step()
        self._watch.attach()

    def before_step(self, optimizer: Any) -> None:
        """After the backward passes: the settings of this step; after it the scheduler moves on."""
        if self._now is not None:
            self._now.groups = [
                {name: group[name] for name in SETTINGS if name in group} for group in inner(optimizer).param_groups
            ]

    def after_step(self, optimizer: Any) -> None:
        """After the optimizer's step: write it."""
        now, self._now = self._now, None
        if now is None:
            return
        if now.error is not None or not now.batches or not all("pairs" in batch for batch in now.batches):
            raise AttributionError(
                f"step {self.step + 1} was not seen whole: {now.error or 'its examples are unknown'}"
            )
        self.step += 1
        seconds = time.perf_counter() - now.began
        text = {"step": dumps({"batches": now.batches, "groups": now.groups, "seconds": seconds})}
        files.write_atomic(layout.step_file(self.folder, self.step), save(now.tensors, text))
        if self.step % self.options.every == 0:
            self._write_state(optimizer)
        self._optimizer = optimizer

    def last_step(self) -> None:
        """No step will follow: write the last state. Before the trainer may load its best checkpoint in its place."""
        if self._written != self.step:
            self._write_state(self._optimizer)

    def finish(self) -> None:
        """The training is over: take the hooks off."""
        self.close()

    def stop(self, why: str) -> None:
        """Recording could not go on: say so in the folder, if that can still be written to."""
        self.close()
        try:
            files.write_json(self.folder / layout.STOPPED, {"step": self.step, "why": why})
        except OSError as error:
            logger.warning("that recording stopped could not be noted in %s: %s", self.folder, told(error))

    def close(self) -> None:
        """Take the hooks off."""
        self._now = None
        self._watch.detach()

    def _open(self, trainer: Any, optimizer: Any) -> None:
        meta = describe(trainer, self.model, optimizer, self.sites)
        known = self.folder / layout.META
        set_aside_rescored(self.folder.parent)
        if known.exists() and goes_on(files.read_json(known), meta, self.folder, self.step):
            self._described = cut(self.folder, self.step)
            self.index.continue_from(max(self._described, default=-1) + 1)
        else:
            remove(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            adapters: Any = getattr(self.model, "peft_config", {})
            next(iter(adapters.values())).save_pretrained(str(self.folder / layout.ADAPTER))
            trainer.processing_class.save_pretrained(str(self.folder / layout.TOKENIZER))
            files.write_json(known, meta)
        self._write_state(optimizer)

    def _write_state(self, optimizer: Any) -> None:
        tensors = {
            name: each.detach().cpu().contiguous() for name, each in state_tensors(self.sites, optimizer).items()
        }
        files.write_atomic(layout.state_file(self.folder, self.step), save(tensors))
        self._written = self.step

    def _wanted(self) -> bool:
        if not self._training():
            self.close()
            return False
        return self._now is not None

    # An exception inside a hook would end the training: it is kept until the step is over.
    def _see(self, kwargs: Mapping[str, Any]) -> None:
        assert self._now is not None
        try:
            self._keep(self._now, kwargs)
        except Exception as error:
            self._now.error = error

    def _keep(self, now: _Step, kwargs: Mapping[str, Any]) -> None:
        number, plain = len(now.batches), {}
        for name, value in kwargs.items():
            if name in ADDED or value is None:
                continue
            if torch.is_tensor(value):
                now.tensors[f"{number}/{name}"] = value.detach().cpu().clone().contiguous()
            else:
                plain[name] = value
        now.tensors[f"{number}.random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            now.tensors[f"{number}.random/cuda"] = torch.cuda.get_rng_state()
        now.batches.append({"plain": plain})

    def _listen(self, examples: list[Sequence], shape: tuple[int, ...]) -> None:
        assert self._now is not None
        try:
            self._name(self._now, examples)
        except Exception as error:
            self._now.error = error

    def _name(self, now: _Step, examples: list[Sequence]) -> None:
        pairs = [self.index.pair_of(each.key, each.tokens) for each in examples]
        now.batches[-1]["pairs"] = pairs
        new = [number for number in dict.fromkeys(pairs) if number not in self._described]
        layout.append_pairs(self.folder, [self.index.describe(number) for number in new])
        self._described |= set(new)


def describe(trainer: Any, model: nn.Module, optimizer: Any, sites: tuple[LoraSite, ...]) -> dict[str, Any]:
    """What the trainer is, as far as it takes to build it again: the content of ``meta.json``."""
    base, config = unwrap(model), unwrap(model).config
    return {
        "version": layout.VERSION,
        "trainer": type(trainer).__name__,
        "args": json.loads(json.dumps(trainer.args.to_dict(), default=str)),
        "optimizer": type(inner(optimizer)).__name__,
        "max_grad_norm": float(trainer.args.max_grad_norm or 0.0),
        "model": {
            "id": str(getattr(config, "_name_or_path", "")),
            "class": type(base).__name__,
            "hash": weights_hash(model),
            "dtype": str(next(each for each in base.parameters() if not each.requires_grad).dtype).removeprefix(
                "torch."
            ),
            "attention": getattr(config, "_attn_implementation", None),
        },
        "adapter": next(iter(getattr(model, "peft_config", {})), "default"),
        "weights": [site.name for site in sites],
        "groups": group_numbers(sites, optimizer),
        "device": str(next(model.parameters()).device),
        "hardware": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }


def group_numbers(sites: tuple[LoraSite, ...], optimizer: Any) -> list[int]:
    """Which of the optimizer's groups every weight is in."""
    groups = inner(optimizer).param_groups
    where = {id(weight): number for number, group in enumerate(groups) for weight in group["params"]}
    return [where[id(site.weight)] for site in sites]
