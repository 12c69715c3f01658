"""What the overhead is measured on: the quickstart, and Llamas of random weights of any size, written to a folder.

Costs depend on shapes only, so random weights, a random SAE and texts of random words do; their lengths in tokens are
exact.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.benchmark_training import Options
from smda_callbacks.config.build import builtin_path
from smda_callbacks.observe.batches import chat_prompt
from smda_callbacks.observe.probes import default_probes

MODEL, SAE, PAIRS = (f"builtin:quickstart/{name}" for name in ("quickstart-chat", "sae", "sft_pairs.jsonl"))

#: LoRA's rank everywhere.
RANK = 8


@dataclass(frozen=True)
class Case:
    """Sizes of a set-up. ``prompt``: tokens of a probe's prompt, ``answer``: of a pair's, whose prompt is as long.

    ``adapted``: layers with adapters, from the top. The dictionary is a standard (ReLU) SAE after the middle layer.
    """

    width: int = 128
    layers: int = 4
    probes: int = 100
    prompt: int = 20
    answer: int = 58
    features: int = 4096
    support: int = 16
    pairs: int = 8
    adapted: int = 4
    seed: int = 0

    @property
    def hook(self) -> int:
        """The layer after which the SAE reads."""
        return self.layers // 2


@dataclass(frozen=True)
class Setup:
    """Where everything of a set-up lies, and how it is trained. ``chosen``: settings beside the callback's defaults."""

    name: str
    options: Options
    chosen: dict[str, Any]
    lora: LoraConfig
    pairs: int = 8


def quickstart(device: str = "cpu") -> Setup:
    """What ships with the library: 1.1 million weights, 426 probes, an SAE of 512 features, pairs of 27 tokens."""
    return Setup("quickstart", _options(MODEL, SAE, PAIRS, device), {}, _lora(None))


def random_setup(name: str, case: Case, folder: Path, device: str = "cpu") -> Setup:
    """A set-up of these sizes, written to ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_path(MODEL))
    _model(case, len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    _sae(case).save_model(str(folder / "sae"))
    texts = words_of(tokenizer, random.Random(case.seed), case.prompt)
    probes = [
        {"id": f"p{k}", "text": next(texts), "category": f"c{k % 6}", "expected": "refuse" if k % 2 else "comply"}
        for k in range(case.probes)
    ]
    answers = words_of(tokenizer, random.Random(case.seed + 1), case.answer + 4)  # of which 4 are the template's
    pairs = [{"prompt": next(texts), "completion": next(answers)} for _ in range(pairs_made(case.pairs))]
    for file, rows in (("probes.jsonl", probes), ("pairs.jsonl", pairs)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    top = None if case.adapted == case.layers else list(range(case.layers - case.adapted, case.layers))
    chosen = {
        "probes": {"sources": [{"source": str(folder / "probes.jsonl")}]},
        "behaviour": {"target": "logit"},  # a random model's probabilities differ by orders of magnitude
        "policy": {"support": case.support, "lam": 10.0, "cv_folds": 0, "min_active": 4},
    }
    options = _options(str(folder / "model"), str(folder / "sae"), str(folder / "pairs.jsonl"), device)
    return Setup(name, options, chosen, _lora(top), case.pairs)


def pairs_made(pairs: int) -> int:
    """Pairs in the data of a set-up whose steps take so many."""
    return max(8 * pairs, 64)


def words_of(tokenizer: Any, rng: random.Random, tokens: int) -> Iterator[str]:
    """Texts of random words, no two alike, each of so many tokens as a user's message in the chat template."""
    words = sorted({word for probe in default_probes().probes for word in probe.text.split()})
    seen: set[str] = set()
    while True:
        text = rng.choice(words)
        while (length := len(tokenizer(chat_prompt(tokenizer, text), add_special_tokens=False)["input_ids"])) < tokens:
            text += f" {rng.choice(words)}"
        if length == tokens and text not in seen:
            seen.add(text)
            yield text


def _options(model: str, sae: str, pairs: str, device: str) -> Options:
    return Options(model, sae, pairs, device, repeats=1, train_steps=-1)


def _lora(layers: list[int] | None) -> LoraConfig:
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]  # all linear layers of a Llama
    return LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM", layers_to_transform=layers
    )


def _model(case: Case, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(case.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=case.width,
        intermediate_size=3 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=case.width**-0.5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def _sae(case: Case) -> Any:
    from sae_lens import SAE

    sizes = {"d_in": case.width, "d_sae": case.features, "device": "cpu", "dtype": "float32"}
    metadata = {"hook_name": f"blocks.{case.hook}.hook_resid_post", "model_name": "model", "prepend_bos": True}
    sae = SAE.from_dict({"architecture": "standard", **sizes, "metadata": metadata})
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * case.width**-0.5)
    return sae
