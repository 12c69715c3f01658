"""The ways to train that are compared: watched by the library, by what one writes by hand, by peers, and not at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTTrainer

from recipes.benchmark_pairs import InTurns
from recipes.benchmark_training import be_silent, load, read_pairs, settings, training_arguments
from recipes.evidence.overhead_setups import Setup
from recipes.evidence.overhead_turns import Around
from smda_callbacks import SMDACallback
from smda_callbacks.config.build import build_probes, build_sae
from smda_callbacks.observe.activations import parse_hook
from smda_callbacks.observe.batches import chat_prompt

logger = logging.getLogger(__name__)

#: Settings of the callback by the name of the row: the step level, and both engines, at every step and at every tenth.
WATCHED: Mapping[str, Mapping[str, Any]] = {
    f"{name}{suffix}": {"attribution": {"engine": engine}, "measure": {"every": every}}
    for suffix, every in (("", 1), ("_every_10", 10))
    for name, engine in (("step", "off"), ("ghost", "ghost"), ("exact", "exact"))
}

#: Rows of this library, and what stands for not having it.
OURS = ("plain", *WATCHED, "capture", "by_hand")


@dataclass(frozen=True)
class Mode:
    """A way to train: its row's name, and the context that a peer needs, if it is one."""

    name: str
    around: Around | None = None


def peers() -> dict[str, Mode]:
    """Peers' rows; none where their contexts cannot be imported."""
    try:
        from recipes.evidence.peers_overhead import OVERHEAD_PEERS
    except ImportError as error:
        logger.warning("no peers: %s", error)
        return {}
    return {name: Mode(name, around) for name, around in OVERHEAD_PEERS.items()}


def make_trainer(setup: Setup, mode: Mode, folder: Path, steps: int) -> SFTTrainer:
    """TRL's trainer as the row's user has it; the same adapters and order of pairs whatever the row."""
    be_silent()
    set_seed(0)
    model, tokenizer = load(setup.options)
    args = training_arguments(setup.options, str(folder / mode.name))
    args.max_steps, args.logging_steps, args.num_train_epochs = steps, 1, 1000
    args.per_device_train_batch_size = setup.pairs
    set_seed(0)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=read_pairs(setup.options.pairs),
        processing_class=tokenizer,
        peft_config=setup.lora,
        callbacks=_callbacks(setup, mode, tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _callbacks(setup: Setup, mode: Mode, tokenizer: Any) -> list[TrainerCallback]:
    if mode.name in WATCHED:
        return [SMDACallback.from_config(settings(setup.options, _merged(setup.chosen, WATCHED[mode.name])))]
    config = settings(setup.options, setup.chosen)
    if mode.name == "capture":
        site = build_sae(config.sae).site
        return [CaptureOnly({"site": site, "readout": "last", "limit": 2**32}, setup.options.device, first=True)]
    if mode.name == "by_hand":
        return [ByHand.of(config, tokenizer)]
    return []


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {**first.get(key, {}), **second.get(key, {})} for key in {**first, **second}}


class CaptureOnly(InTurns):
    """Captures the gradients of single pairs at every step and does nothing with them."""

    def captures(self, steps_done: int) -> bool:
        return True


class ByHand(TrainerCallback):
    """What one writes without the library, at every step: every probe with every opening as a row of its own, padded on
    the left; all logits; all features of the dictionary; scikit-learn's Ridge. ``y``, ``x``, ``coef``: the last step's.
    """

    def __init__(self, texts: list[list[str]], openings: list[str], tokenizer: Any, sae: Any, layer: int) -> None:
        self.sae, self.layer, self.rows = sae, layer, 64
        self.per_probe = len(openings)
        prompts = [text for row in texts for text in row]
        self.lengths = self._opening_lengths(texts, openings, tokenizer)
        tokenizer.padding_side = "left"
        self.ids = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        tokenizer.padding_side = "right"

    @classmethod
    def of(cls, config: Any, tokenizer: Any) -> ByHand:
        """For the probes, openings and SAE of a configuration of the library."""
        handle, openings = build_sae(config.sae), list(config.behaviour.refusals)
        prompts = [chat_prompt(tokenizer, probe.text) for probe in build_probes(config.probes).probes]
        texts = [[prompt + opening for opening in openings] for prompt in prompts]
        return cls(texts, openings, tokenizer, handle.sae, parse_hook(handle.site.name).layer)

    @staticmethod
    def _opening_lengths(texts: list[list[str]], openings: list[str], tokenizer: Any) -> list[int]:
        def tokens(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        prompts = [row[0].removesuffix(openings[0]) for row in texts]
        return [tokens(text) - tokens(prompt) for prompt, row in zip(prompts, texts, strict=True) for text in row]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.read(kwargs["model"])

    @torch.no_grad()
    def read(self, model: Any) -> None:
        """One measurement."""
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        probabilities, hidden = [], []
        for at in range(0, len(self.lengths), self.rows):
            batch = {name: tensor[at : at + self.rows].to(device) for name, tensor in self.ids.items()}
            output = model(**batch, output_hidden_states=True, use_cache=False)
            log_probs = output.logits.float().log_softmax(dim=-1)
            for row, length in enumerate(self.lengths[at : at + self.rows]):
                probabilities.append(self._opening(log_probs[row], batch["input_ids"][row], length))
                if (at + row) % self.per_probe == 0:
                    hidden.append(output.hidden_states[self.layer + 1][row, -length - 1])
        model.train(was_training)
        self.y = torch.stack(probabilities).view(-1, self.per_probe).sum(dim=1).cpu().numpy()
        self.x = self.sae.to(device).encode(torch.stack(hidden).float()).cpu().numpy()
        self.coef = Ridge(alpha=10.0).fit(self.x, self.y).coef_

    @staticmethod
    def _opening(log_probs: Tensor, ids: Tensor, length: int) -> Tensor:
        """Probability of the last ``length`` tokens after what is before them."""
        places = torch.arange(len(ids) - length, len(ids), device=ids.device)
        return log_probs[places - 1, ids[places]].double().sum().exp()
