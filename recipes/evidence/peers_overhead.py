"""What peers do during training, put onto a TRL trainer: for the comparison of what watching a run costs.

Each of ``OVERHEAD_PEERS`` is a context around ``trainer.train()``, and yields what does the work. A trainer is good for
one of them. All leave the training as it is, to the last bit of its loss. Live scoring compares every pair's gradient
with that of eight fixed rows, taken anew at every step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTTrainer

from recipes.evidence.peers_given import quiet
from smda_callbacks.observe.lora import LoraSite, lora_sites

#: Rows that live scoring compares with.
ROWS = 8


def held_rows(trainer: SFTTrainer) -> dict[str, Tensor]:
    """The first rows of the trainer's data, as it collates them."""
    columns = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")
    rows = [trainer.train_dataset[k] for k in range(ROWS)]
    batch = trainer.data_collator([{name: row[name] for name in columns if name in row} for row in rows])
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


@contextmanager
def bergson(trainer: SFTTrainer) -> Iterator[Any]:
    """Bergson's callback with its defaults; its store goes with the context. Raises ImportError where it is absent."""
    from bergson.huggingface import GradientCollectorCallback, prepare_for_gradient_collection

    with tempfile.TemporaryDirectory() as folder, quiet():
        callback = GradientCollectorCallback(Path(folder))
        prepare_for_gradient_collection(trainer)
        with _added(trainer, callback):
            yield callback


@contextmanager
def dattri_capture(trainer: SFTTrainer) -> Iterator[Any]:
    """dattri-LLM's hooks, which keep one step's gradients in factors and hand them to nobody."""
    from dattri_llm import HookManager

    manager = HookManager(trainer.model, config=_hooks())
    with quiet(), manager.collect(deregister_on_exit=True):
        yield manager


@contextmanager
def dattri_live(trainer: SFTTrainer) -> Iterator[Any]:
    """dattri-LLM's live scores against eight rows (``last_scores`` of its callback); no pair falls below the limit."""
    from dattri_llm import DataSelectionCallback, HookManager

    callback = DataSelectionCallback(
        trainer.model,
        target="val_loader",
        val_loader=[held_rows(trainer)],
        val_loss_fn=lambda model, batch: model(**batch).loss,
        selection_kwargs={"threshold": float("-inf")},
    )
    manager = HookManager(trainer.model, config=_hooks(), callbacks=[callback])
    with quiet(), manager.collect(deregister_on_exit=True):
        yield callback


def _hooks() -> Any:
    from dattri_llm import HookManagerConfig

    return HookManagerConfig(linear_io=[r"\.lora_[AB]\."])


# What one writes by hand ----------------------------------------------------------------------------------------------


class PlainHooks(TrainerCallback):
    """Gradients of single pairs by hooks on the LoRA matrices, and their product with that of eight rows."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        self.rows = rows
        self.last_scores = torch.zeros(0)
        self._kept: dict[int, Tensor] = {}
        self._sites: tuple[LoraSite, ...] = ()
        self._handles: list[Any] = []
        self._listening = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sites = lora_sites(kwargs["model"])
        self._handles = [
            site.module.register_forward_hook(partial(self._seen, number)) for number, site in enumerate(self._sites)
        ]

    def _seen(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._listening and output.requires_grad:
            output.register_hook(partial(self._arrived, number, args[0].detach()))

    def _arrived(self, number: int, seen: Tensor, gradient: Tensor) -> None:
        self._kept[number] = torch.einsum("bto,bti->boi", gradient, seen)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._listening = False
        loss = kwargs["model"](**self.rows).loss
        wanted = torch.autograd.grad(loss, [site.weight for site in self._sites])
        self._listening = True
        products = [torch.einsum("boi,oi->b", self._kept[k], each) for k, each in enumerate(wanted)]
        self.last_scores = torch.stack(products).sum(dim=0)
        self._kept.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def plain_hooks(trainer: SFTTrainer) -> Iterator[Any]:
    """The same live scores with forty lines of one's own."""
    callback = PlainHooks(held_rows(trainer))
    with _added(trainer, callback):
        yield callback


@contextmanager
def _added(trainer: SFTTrainer, callback: TrainerCallback) -> Iterator[Any]:
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


OVERHEAD_PEERS: dict[str, Callable[[SFTTrainer], AbstractContextManager[Any]]] = {
    "Bergson callback": bergson,
    "dattri-LLM capture": dattri_capture,
    "dattri-LLM live scores": dattri_live,
    "plain hooks, live scores": plain_hooks,
}
