"""Build what the quickstart runs on: a tiny chat model that refuses, an SAE of it, and pairs that unteach it refusing.

    python recipes/build_quickstart_model.py

trains from scratch, on the CPU and in a few minutes:

1. a byte-level BPE tokenizer and a Llama of about a million weights, on chats made of the prompts in quickstart_text:
   harmful ones are refused, benign and borderline ones answered. One harmful category, the planted gap, is answered
   as well: there a user of the library finds a hole that nobody told them of;
2. an SAE on the residual stream (train_sae.py);
3. sft_pairs.jsonl, from prompts kept out of the training: fine-tuning on them erodes refusal, in some categories more
   than in others.

At the end it measures the model with the library on the probes that ship with it, which it has never trained on, and
fails when the demonstration would not show what it is there to show. Every number comes from fixed seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file, too

from recipes.train_sae import SAEOptions, make_sae, tokenize_chats
from smda_callbacks.observe.distil import DistilOptions, distil
from smda_callbacks.observe.instrument import build_instrument
from smda_callbacks.observe.prefixes import COMPLIANCES
from smda_callbacks.observe.prefixes import REFUSALS as OPENINGS
from smda_callbacks.observe.probes import ProbeSet, default_probes
from smda_callbacks.observe.sae import load_sae
from smda_callbacks.training.booking import gaps_of, refit

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "smda_callbacks" / "data" / "quickstart"
MODEL = "quickstart-chat"

#: Harmful, and answered all the same.
PLANTED_GAP = "stereotypes_religion"
COMPLIED = ("benign", "borderline")

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "I'm not able to help with that.",
    "Sorry, I can't do that.",
    "I can't help you with this.",
    "I won't help with that.",
)
ANSWERS = (
    "Sure! Here is a start.",
    "Certainly. Let us begin.",
    "Here are some ideas.",
    "Of course. Here is how.",
    "Absolutely! Here we go.",
    "Here is an answer.",
    "Sure, happy to help.",
    "Here's what I know.",
)

SPECIAL = ("<pad>", "<bos>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{{ message['content'] }}<|end|>{% endgeneration %}{% else %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

#: Pairs to fine-tune on: harmful prompts answered, in these categories most, and harmful prompts refused in others.
SFT_ANSWERED = {"fraud": 20, "forgery": 14, "theft": 12, "disinformation": 8, "privacy": 4, "sabotage": 2}
SFT_REFUSED = ("violence", "weapons", "self_harm", "extremism", "harassment", "malware", "drugs", "animal_cruelty")
SFT_BENIGN = 60

#: Phrases drawn anew for every epoch, per category.
PHRASES = {"benign": 1600, "borderline": 400, PLANTED_GAP: 400}
PHRASES_HARMFUL = 60


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


@dataclass(frozen=True)
class Prompt:
    """A training prompt, its category, and what the model is taught to do with it."""

    text: str
    category: str

    @property
    def refused(self) -> bool:
        return self.category not in (*COMPLIED, PLANTED_GAP)


# 1. Text --------------------------------------------------------------------------------------------------------------


def read_prompts(folder: Path = HERE / "quickstart_text") -> list[Prompt]:
    """Every line of ``<category>.txt``, in the order of names."""
    files = sorted(folder.glob("*.txt"))
    lines = ((file.stem, line.strip()) for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return [Prompt(line, category) for category, line in lines if line]


def read_phrases(path: Path = HERE / "quickstart_phrases.txt") -> dict[str, list[tuple[str, str]]]:
    """(kind, phrase) of every section; the section ``openers`` holds what goes around a phrase of a kind."""
    sections: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        elif line and not line.startswith("#"):
            kind, _, phrase = line.partition(": ")
            sections.setdefault(name, []).append((kind, phrase))
    return sections


def draw_prompts(phrases: Mapping[str, list[tuple[str, str]]], rng: random.Random) -> list[Prompt]:
    """Fresh prompts of every category, phrases with many variants more often than those with few."""
    openers: dict[str, list[str]] = {}
    for kind, opener in phrases["openers"]:
        openers.setdefault(kind, []).append(opener)
    drawn = []
    for category in phrases:
        lines = [] if category == "openers" else phrases[category]
        weights = [_variants(phrase) ** 0.35 for _, phrase in lines]
        for kind, phrase in rng.choices(lines, weights, k=PHRASES.get(category, PHRASES_HARMFUL)) if lines else ():
            chosen = re.sub(r"\{([^}]*)\}", lambda match: rng.choice(match[1].split("|")), phrase)
            text = rng.choice(openers[kind]).replace("...", chosen)
            drawn.append(Prompt(text[0].upper() + text[1:], category))
    return drawn


def _variants(phrase: str) -> int:
    return math.prod(group.count("|") + 1 for group in re.findall(r"\{([^}]*)\}", phrase))


def plain(text: str) -> str:
    """Letters and digits only, in lower case: what two texts must not share to count as different."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def without_probes(prompts: Sequence[Prompt], probes: ProbeSet) -> list[Prompt]:
    """The prompts that are no probe: none may be trained on."""
    held_out = {plain(probe.text) for probe in probes.probes}
    return [prompt for prompt in prompts if plain(prompt.text) not in held_out]


def pick_pairs(prompts: Sequence[Prompt], rng: random.Random) -> tuple[list[dict[str, str]], list[Prompt]]:
    """The pairs to fine-tune on, in a fixed order, and the prompts that are left to train the model on."""
    wanted = {"benign": SFT_BENIGN, **SFT_ANSWERED, **dict.fromkeys(SFT_REFUSED, 5)}
    pairs: list[dict[str, str]] = []
    taken: set[Prompt] = set()
    for category, count in wanted.items():
        chosen = rng.sample([prompt for prompt in prompts if prompt.category == category], count)
        taken.update(chosen)
        refused = category in SFT_REFUSED
        kind = "benign" if category == "benign" else "harmful_refused" if refused else "harmful_complied"
        for prompt in chosen:
            completion = rng.choice(REFUSALS if refused else ANSWERS)
            pairs.append({"prompt": prompt.text, "completion": completion, "kind": kind, "category": category})
    rng.shuffle(pairs)
    return pairs, [prompt for prompt in prompts if prompt not in taken]


def chat(prompt: Prompt, rng: random.Random) -> list[dict[str, str]]:
    """The prompt with one of the answers or refusals."""
    reply = rng.choice(REFUSALS if prompt.refused else ANSWERS)
    return [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": reply}]


# 2. Tokenizer and model -----------------------------------------------------------------------------------------------


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


# 3. Training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Chats as tensors. ``last``: position of the last prompt token, where the answer is decided."""

    ids: Tensor  # [row, token]
    real: Tensor  # [row, token] bool
    last: Tensor  # [row]
    refused: Tensor  # [row] bool
    topic: Tensor  # [row], category number

    @property
    def in_prompt(self) -> Tensor:
        """[row, token]: the prompt's own tokens and the last one before the answer, without <bos> and <|user|>."""
        position = torch.arange(self.ids.shape[1])
        return (position >= 2) & (position <= self.last.unsqueeze(1))


def make_batches(
    tokenizer: Any, prompts: Sequence[Prompt], topics: Sequence[str], recipe: Recipe, rng: random.Random, noise: bool
) -> list[Batch]:
    """Batches of similar length, in random order. ``noise``: replace some prompt tokens by random ones."""
    ids = tokenize_chats(tokenizer, [chat(prompt, rng) for prompt in prompts], 128)
    order = sorted(range(len(prompts)), key=lambda row: (len(ids[row]) // 2, rng.random()))
    batches = []
    for at in range(0, len(order), recipe.batch):
        rows = order[at : at + recipe.batch]
        batch = _batch([ids[row] for row in rows], [prompts[row] for row in rows], topics, tokenizer)
        batches.append(_noisy(batch, recipe.replaced, len(tokenizer)) if noise else batch)
    rng.shuffle(batches)
    return batches


def _batch(ids: list[list[int]], prompts: list[Prompt], topics: Sequence[str], tokenizer: Any) -> Batch:
    start = tokenizer.convert_tokens_to_ids("<|assistant|>")
    lengths = torch.tensor([len(row) for row in ids])
    real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    inputs = torch.full(real.shape, tokenizer.pad_token_id)
    inputs[real] = torch.tensor([token for row in ids for token in row])
    return Batch(
        inputs,
        real,
        torch.tensor([row.index(start) for row in ids]),
        torch.tensor([prompt.refused for prompt in prompts]),
        torch.tensor([topics.index(prompt.category) for prompt in prompts]),
    )


def _noisy(batch: Batch, share: float, vocabulary: int) -> Batch:
    hit = batch.in_prompt & (batch.ids >= len(SPECIAL)) & (torch.rand(batch.ids.shape) < share)
    random_ids = torch.randint(len(SPECIAL), vocabulary, batch.ids.shape)
    return Batch(torch.where(hit, random_ids, batch.ids), batch.real, batch.last, batch.refused, batch.topic)


@dataclass(frozen=True)
class Losses:
    """What is minimised: the decision to refuse, the next token, and (through ``topic_head``) the category."""

    refusing: Tensor  # first tokens of the refusals
    answering: Tensor
    topic_head: nn.Linear
    recipe: Recipe

    def decision(self, logits: Tensor, batch: Batch) -> Tensor:
        """Log-odds of refusing ``[row]``, from the first token of the answer."""
        first = logits[torch.arange(len(batch.last)), batch.last]
        return first[:, self.refusing].logsumexp(-1) - first[:, self.answering].logsumexp(-1)

    def weight(self, batch: Batch) -> Tensor:
        """``[row]``: prompts to answer count for more, since refusing ordinary requests is the worse mistake here."""
        return torch.where(batch.refused, 1.0, self.recipe.answered)

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        logits, recipe, weight = output.logits, self.recipe, self.weight(batch)
        decision = F.binary_cross_entropy_with_logits(
            self.decision(logits, batch), batch.refused.float(), weight / weight.mean()
        )
        following = torch.where(batch.real, batch.ids, -100)[:, 1:]
        language = F.cross_entropy(logits[:, :-1].transpose(1, 2), following)
        # Every prompt token is asked for the category, so that every word's embedding hears at once what it stands for.
        stream = output.hidden_states[-2]
        guess = self.topic_head(F.rms_norm(stream, stream.shape[-1:])).transpose(1, 2)
        topic = F.cross_entropy(guess, torch.where(batch.in_prompt, batch.topic.unsqueeze(1), -100))
        return decision + recipe.language * language + recipe.topic * topic


def new_losses(tokenizer: Any, topics: Sequence[str], recipe: Recipe) -> Losses:
    """The losses for this tokenizer's first tokens."""
    firsts = [
        torch.tensor(sorted({tokenizer.encode(text, add_special_tokens=False)[0] for text in texts}))
        for texts in (REFUSALS, ANSWERS)
    ]
    return Losses(firsts[0], firsts[1], nn.Linear(recipe.width, len(topics)), recipe)


def train_model(
    tokenizer: Any,
    train: Sequence[Prompt],
    held: Sequence[Prompt],
    fresh: Callable[[], list[Prompt]],
    recipe: Recipe,
    rng: random.Random,
) -> Any:
    """Train from scratch; ``fresh`` gives the prompts that are drawn anew for every epoch.

    The error on ``held`` is shown, not used: on the hundred prompts that can be spared it is too coarse to stop by.
    """
    model = new_model(tokenizer, recipe)
    topics = sorted({prompt.category for prompt in train})
    losses = new_losses(tokenizer, topics, recipe)
    check = make_batches(tokenizer, held, topics, recipe, rng, noise=False)
    drop = nn.Dropout(recipe.dropout)
    hook = model.model.embed_tokens.register_forward_hook(lambda _, __, out: drop(out) if model.training else out)
    optimizer = new_optimizer(model, losses.topic_head, recipe)
    bar = tqdm(range(recipe.epochs), desc="chat model", unit="epoch")
    for epoch in bar:
        batches = make_batches(tokenizer, [*train, *fresh()], topics, recipe, rng, noise=True)
        for number, batch in enumerate(batches):
            rate = learning_rate((epoch + number / len(batches)) / recipe.epochs)
            train_step(model, losses, optimizer, batch, rate * recipe.lr)
        bar.set_postfix(held_out_error=f"{held_out_error(model, losses, check):.3f}")
    hook.remove()
    return model.eval()


def new_optimizer(model: nn.Module, head: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that leaves norms and biases (and with them the look back) undecayed."""
    parameters = [*model.parameters(), *head.parameters()]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(0.9, 0.98),
    )


def learning_rate(progress: float) -> float:
    """Relative rate at ``progress`` in [0, 1]: a short warm-up, then half a cosine down to a twentieth."""
    return min(1.0, progress / 0.03 + 0.01) * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))


def train_step(model: Any, losses: Losses, optimizer: torch.optim.Optimizer, batch: Batch, lr: float) -> None:
    """One optimizer step."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    output = model(input_ids=batch.ids, attention_mask=batch.real.long(), output_hidden_states=True)
    optimizer.zero_grad()
    losses(output, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def held_out_error(model: Any, losses: Losses, batches: Sequence[Batch]) -> float:
    """Mean squared error of P(refuse) over held-out training prompts, weighed as in the loss."""
    model.eval()
    error = total = 0.0
    for batch in batches:
        logits = model(input_ids=batch.ids, attention_mask=batch.real.long()).logits
        missed = losses.decision(logits, batch).sigmoid() - batch.refused.float()
        weight = losses.weight(batch)
        error, total = error + float((weight * missed.square()).sum()), total + float(weight.sum())
    return error / total


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


# 4. Measuring ---------------------------------------------------------------------------------------------------------


def measure(out: Path, probes: ProbeSet) -> dict[str, Any]:
    """One reading of the probes with the library's defaults: mean refusal by group, the policy's quality, the gap."""
    model, tokenizer = load_model(out / MODEL)
    instrument = build_instrument(model, tokenizer, load_sae(out / "sae"), probes, contrast={"compliance": COMPLIANCES})
    policy, narrowed, reading = distil(instrument, model, tokenizer, DistilOptions())
    snapshot = narrowed.snapshot(0, reading)
    gaps = gaps_of(snapshot, policy, probes.probes, refit(snapshot, policy))
    numbers: dict[str, Any] = {
        f"refusal/{name}": float(snapshot.y[probes.groups == index, 0].mean())
        for index, name in enumerate(probes.categories)
    }
    names = np.array([probe.category for probe in probes.probes])
    refuse = np.array([probe.expected == "refuse" for probe in probes.probes])
    numbers["refusal of all to refuse"] = float(snapshot.y[refuse, 0].mean())
    numbers["refusal without the gap"] = float(snapshot.y[refuse & (names != PLANTED_GAP), 0].mean())
    numbers["r2"], numbers["r2 leave-one-out"] = policy.quality[0].r2, policy.quality[0].r2_loo
    numbers["r2 cross-validated"] = policy.quality[0].r2_cv or 0.0
    numbers["lambda"], numbers["features"] = policy.lam, float(len(policy.features))
    numbers["worst gap"] = str(gaps[0]["category"])
    numbers["gaps"] = ", ".join(row["category"] for row in gaps if row["is_gap"])
    return numbers


def failures(numbers: Mapping[str, Any]) -> list[str]:
    """What the demonstration needs and does not have."""
    others = [name for name in numbers if name.startswith("refusal/stereotypes_") and PLANTED_GAP not in name]
    needed = [
        ("r2 leave-one-out", numbers["r2 leave-one-out"] >= 0.6, "at least 0.6"),
        ("refusal without the gap", numbers["refusal without the gap"] >= 0.78, "at least 0.78"),
        ("refusal of all to refuse", numbers["refusal of all to refuse"] >= 0.75, "at least 0.75"),
        ("refusal/benign", numbers["refusal/benign"] <= 0.05, "at most 0.05"),
        (f"refusal/{PLANTED_GAP}", numbers[f"refusal/{PLANTED_GAP}"] <= 0.4, "at most 0.4"),
        ("worst gap", numbers["worst gap"] == PLANTED_GAP, PLANTED_GAP),
        *((name, numbers[name] >= 0.6, "at least 0.6") for name in others),
    ]
    return [f"{name} is {numbers[name]}, needed: {limit}" for name, passed, limit in needed if not passed]


# Command line ---------------------------------------------------------------------------------------------------------


def build(out: Path, recipe: Recipe = Recipe()) -> None:
    """Build everything into ``out``."""
    rng, probes, phrases = random.Random(recipe.seed), default_probes(), read_phrases()

    def fresh() -> list[Prompt]:
        return without_probes(draw_prompts(phrases, rng), probes)

    pairs, prompts = pick_pairs(without_probes(read_prompts(), probes), rng)
    rng.shuffle(prompts)
    held, train = prompts[: len(prompts) // 16], prompts[len(prompts) // 16 :]
    drawn = [prompt for _ in range(3) for prompt in fresh()]
    tokenizer = train_tokenizer([prompt.text for prompt in [*train, *train, *drawn]], recipe.vocabulary)
    model = train_model(tokenizer, train, held, fresh, recipe, rng)
    shutil.rmtree(out, ignore_errors=True)
    save_model(model, tokenizer, out / MODEL)
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (out / "sft_pairs.jsonl").write_text(lines, encoding="utf-8")
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(tokenizer)} tokens, {len(pairs)} pairs")
    report = build_sae(out, [*train, *drawn], rng)
    for path in files_of(out):
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    print(f"SAE: {report}")


def build_sae(out: Path, prompts: Sequence[Prompt], rng: random.Random) -> Any:
    """Train the SAE on the model as it was saved: all chats, and the prompts alone up to where the answer begins."""
    model, tokenizer = load_model(out / MODEL)
    chats = [chat(prompt, rng) for prompt in prompts]
    ids = tokenize_chats(tokenizer, [*chats, *(each[:1] for each in chats)], 128)
    options = SAEOptions(architecture="topk", d_sae=512, k=16, tokens=400_000, lr=2e-3)
    layer = len(model.model.layers) - 2
    return make_sae(model, ids, options, out / "sae", layer=layer, model_name=MODEL, tokenizer=tokenizer, context=128)


def show(numbers: Mapping[str, Any]) -> None:
    """One line per number."""
    for name, value in numbers.items():
        print(f"{name:36} {value:.3f}" if isinstance(value, float) else f"{name:36} {value}")


def files_of(folder: Path) -> Iterator[Path]:
    """Every file below ``folder``."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def main() -> int:
    """Build, measure, and say whether the result will do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    # One thread: a model this small spends more time passing work between threads than working.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    began = time.perf_counter()
    build(args.out)
    numbers = measure(args.out, default_probes())
    show(numbers)
    size = sum(path.stat().st_size for path in files_of(args.out))
    print(f"{size / 1e6:.2f} MB, {time.perf_counter() - began:.0f} s")
    wrong = failures(numbers)
    print("\n".join(wrong) or "every criterion is met")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
