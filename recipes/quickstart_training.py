"""How the chat model of the quickstart learns: batches of chats, three losses, the training loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from recipes.quickstart_model import SPECIAL, Recipe, new_model
from recipes.quickstart_prompts import ANSWERS, REFUSALS, Prompt, chat
from recipes.train_sae import tokenize_chats


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
