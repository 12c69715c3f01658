"""The chat model of the quickstart: its tokenizer, a Llama of about a million untrained weights, both on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.quickstart_prompts import ANSWERS, REFUSALS
from smda_callbacks.observe.prefixes import COMPLIANCES
from smda_callbacks.observe.prefixes import REFUSALS as OPENINGS

SPECIAL = ("<pad>", "<bos>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{{ message['content'] }}<|end|>{% endgeneration %}{% else %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How the model is trained. ``language`` and ``topic`` weigh the two helper losses against the decision."""

    vocabulary: int = 4000
    width: int = 128
    layers: int = 3
    epochs: int = 8
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.1
    replaced: float = 0.1  # share of prompt tokens replaced by random ones
    dropout: float = 0.1  # of embeddings
    language: float = 1.0
    topic: float = 1.0
    answered: float = 4.5  # weight of a prompt to answer against one to refuse
    seed: int = 0


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with chat tokens and a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The openings that the library scores become few tokens, so that reading them is cheap.
    openings = [*REFUSALS, *ANSWERS, *OPENINGS, *COMPLIANCES]
    inner.train_from_iterator([*openings * 50, *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def new_model(tokenizer: Any, recipe: Recipe) -> Any:
    """A small Llama with random weights, whose first layer starts by looking back."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        attention_bias=True,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    look_back(model.model.layers[0].self_attn, offsets=(1, 1, 2, 3))
    return model


@torch.no_grad()
def look_back(attention: Any, offsets: Sequence[int], strength: float = 4.0) -> None:
    """Start head h by attending ``offsets[h]`` tokens back, through its biases and the rotary embedding alone.

    Word pieces mean little apart; "the token before" is what a model this small does not find in a few minutes.
    """
    half = attention.head_dim // 2
    frequency = 100.0 ** (-torch.arange(half) / half)
    for head, offset in enumerate(offsets):
        first, second = (slice(head * 2 * half + k * half, head * 2 * half + (k + 1) * half) for k in (0, 1))
        attention.k_proj.bias[first] = strength
        attention.q_proj.bias[first] = strength * torch.cos(frequency * offset)
        attention.q_proj.bias[second] = -strength * torch.sin(frequency * offset)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Half precision on disk; the configuration says float32, which is what it is loaded as."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_model(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer), as a user of the library loads them."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )
