"""Train a sparse autoencoder (SAE) on your own chat model and data, for models that have no published one.

    python recipes/train_sae.py --model my-org/my-chat-model --data chats.jsonl --tokens 20000000 --out my-sae

and then, in your configuration, ``sae: {source: my-sae}``. What it does, from top to bottom:

1. Turn the chats into tokens with the model's own chat template. Use the kind of chats that the run is about: an SAE
   describes well what it has seen, and refusals are found in chats, not in web text.
2. Read the residual stream after one decoder layer, through a forward hook of the same code that the callback uses.
   The first position of every chat is left out: its activations are outliers of another scale.
3. Train the SAE with sae-lens on these activations, fold the norm into its weights and save it.
4. Load it the way the callback does, and report on chats that it has not seen. A good SAE misses little variance (FVU
   under about 0.3) with few active features (L0 well under the width of the model) and has few dead features.

Rules of thumb: at least some hundred activations per feature, a dictionary of 4 to 16 times the model's width.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.mixing_buffer import mixing_buffer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence as pad
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without installing, too

from smda_callbacks.observe.activations import captured, decoder_layers, parse_hook, unwrap
from smda_callbacks.observe.features import centered, decode, encoder
from smda_callbacks.observe.sae import SAEHandle, load_sae

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "standard")

Tokens = Sequence[list[int]]


@dataclass(frozen=True)
class SAEOptions:
    """How the SAE is trained. ``k``: active features (topk, batchtopk); ``l1``, ``l0``: price of activity (the others).

    ``tokens``: activations to train on; chats are read again, in a new order, when there are not enough of them.
    """

    architecture: str = "batchtopk"
    d_sae: int = 8192
    k: int = 32
    l1: float = 1.0
    l0: float = 1.0
    tokens: int = 2_000_000
    batch: int = 1024
    lr: float = 1e-3
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r} is unknown. Allowed: {', '.join(ARCHITECTURES)}.")
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, but the SAE has only {self.d_sae} features. Lower k or raise d_sae.")
        if self.steps < 1:
            raise ValueError(f"{self.tokens} tokens are less than one batch of {self.batch}. Raise tokens.")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.batch


@dataclass(frozen=True)
class Report:
    """The SAE on chats that it has not seen: share of variance missed, mean active features, features never active."""

    fvu: float
    l0: float
    dead: int
    d_sae: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"FVU {self.fvu:.3f}, L0 {self.l0:.1f}, {self.dead} of {self.d_sae} features never active on "
            f"{self.tokens:,} held-out tokens"
        )


def read_rows(source: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file or of a data set (``owner/name`` or ``owner/name:split``)."""
    if Path(source).is_file():
        return [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    if source.endswith(".jsonl"):
        raise FileNotFoundError(f"{source!r} does not exist. Next step: check the path.")
    name, _, split = source.partition(":")
    return list(load_dataset(name, split=split or "train"))


def messages_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a row with a ``messages`` column, or with ``prompt`` and ``completion`` (texts or messages)."""
    if "messages" in row:
        return list(row["messages"])
    if "prompt" not in row:
        raise ValueError(f"row has columns {', '.join(row)}. Allowed: messages, or prompt (and completion).")
    messages: list[dict[str, str]] = []
    for role, part in (("user", row["prompt"]), ("assistant", row.get("completion"))):
        messages += [{"role": role, "content": part}] if isinstance(part, str) else list(part or ())
    return messages


def tokenize_chats(tokenizer: Any, chats: Sequence[list[dict[str, str]]], context: int) -> list[list[int]]:
    """Token ids of every chat under the chat template, cut at ``context``. A lone prompt gets the generation prompt."""
    render = tokenizer.apply_chat_template
    texts = [render(chat, tokenize=False, add_generation_prompt=chat[-1]["role"] == "user") for chat in chats]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tokens[:context] for tokens in ids if len(tokens) > 1]


def split_chats(ids: Tokens, *, share: float = 0.05, most: int = 500, seed: int = 0) -> tuple[Tokens, Tokens]:
    """(training chats, held-out chats): at least one, at most ``most`` held out."""
    order = random.Random(seed).sample(range(len(ids)), len(ids))
    held = min(most, max(1, int(share * len(ids))))
    return [ids[k] for k in order[held:]], [ids[k] for k in order[:held]]


def default_layer(model: nn.Module) -> int:
    """The block at 60% of the depth, where chat behaviours such as refusal are usually decided."""
    return int(0.6 * len(decoder_layers(model)))


@torch.no_grad()
def activations(model: nn.Module, ids: Tokens, hook: str, *, tokens_per_pass: int = 4096) -> Iterator[Tensor]:
    """One pass over the chats, ``[token, d_model]`` float32 each, without position 0 and padding."""
    site, body = parse_hook(hook), unwrap(model).base_model  # the body has no language head, which is not needed here
    device = next(model.parameters()).device
    for chats in _passes(ids, tokens_per_pass):
        rows = [torch.tensor(chat) for chat in chats]
        inputs, real = (pad(each, batch_first=True) for each in (rows, [torch.ones_like(row) for row in rows]))
        with captured(model, site) as seen:
            body(input_ids=inputs.to(device), attention_mask=real.to(device), use_cache=False)
        yield seen[0][:, 1:][real[:, 1:].bool().to(device)].float()


def endless_activations(model: nn.Module, ids: Tokens, hook: str, seed: int) -> Iterator[Tensor]:
    """Passes over the chats without end, in a new order each time."""
    draw = random.Random(seed)
    while True:
        yield from activations(model, draw.sample(list(ids), len(ids)), hook)


def _passes(ids: Tokens, tokens_per_pass: int) -> Iterator[list[list[int]]]:
    chats: list[list[int]] = []
    for chat in ids:
        if chats and max(map(len, [*chats, chat])) * (len(chats) + 1) > tokens_per_pass:
            yield chats
            chats = []
        chats.append(chat)
    yield chats


def new_sae(options: SAEOptions, d_in: int, metadata: dict[str, Any]) -> Any:
    """An untrained SAE of sae-lens."""
    torch.manual_seed(options.seed)
    sparsity: dict[str, dict[str, Any]] = {
        "topk": {"k": options.k},
        "batchtopk": {"k": options.k, "topk_threshold_lr": threshold_lr(options.steps)},
        "jumprelu": {"l0_coefficient": options.l0, "l0_warm_up_steps": options.steps // 10},
        "standard": {"l1_coefficient": options.l1, "l1_warm_up_steps": options.steps // 10},
    }
    kind, config_kind = get_sae_training_class(options.architecture)
    shared = {"d_in": d_in, "d_sae": options.d_sae, "normalize_activations": "expected_average_only_in"}
    config: Any = config_kind(device=options.device, **shared, **sparsity[options.architecture])
    for name, value in metadata.items():
        config.metadata[name] = value
    return kind(config)


def threshold_lr(steps: int) -> float:
    """Rate of BatchTopK's threshold, an average that starts at 0: short runs at 0.01 save one far too low."""
    return max(0.01, min(0.2, 10 / steps))


def train_sae(sae: Any, source: Iterator[Tensor], options: SAEOptions) -> Any:
    """Train ``sae`` on the activations that ``source`` yields; the activation norm is folded into its weights."""
    torch.manual_seed(options.seed)
    steps = options.steps
    config = SAETrainerConfig(
        total_training_samples=steps * options.batch,
        train_batch_size_samples=options.batch,
        lr=options.lr,
        lr_end=options.lr / 10,
        lr_warm_up_steps=min(1000, steps // 10),
        lr_decay_steps=steps // 3,
        device=options.device,
        dead_feature_window=max(10, min(1000, steps // 5)),
        feature_sampling_window=max(10, min(2000, steps // 5)),
        n_batches_for_norm_estimate=min(100, steps),
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, mixing_buffer(16 * options.batch, options.batch, source)).fit()


def metadata_of(model_name: str, hook: str, ids: Tokens, tokenizer: Any, context: int) -> dict[str, Any]:
    """What the callback and sae-lens must know of where the SAE reads."""
    return {
        "model_name": Path(model_name).resolve().name if Path(model_name).is_dir() else model_name,
        "hook_name": hook,
        "prepend_bos": tokenizer.bos_token_id is not None and ids[0][0] == tokenizer.bos_token_id,
        "context_size": context,
        "neuronpedia_id": None,
    }


@torch.no_grad()
def evaluate(handle: SAEHandle, batches: Iterator[Tensor]) -> Report:
    """FVU = Σ‖h − ĥ‖² / Σ‖h − mean h‖², L0 and dead features over all activations of ``batches``, in float64."""
    encode = encoder(handle)
    missed = active = 0.0
    ever = torch.zeros(handle.d_sae, dtype=torch.bool, device=handle.sae.W_dec.device)
    rows = []
    for hidden in batches:
        pre, gate = encode(hidden)
        missed += (centered(handle, hidden) - decode(handle, gate * pre)).double().square().sum().item()
        active += gate.sum().item()
        ever |= (gate > 0).any(dim=0)
        rows.append(hidden)
    stream = torch.cat(rows).double()
    whole = (stream - stream.mean(dim=0)).square().sum().item()
    return Report(missed / whole, active / len(stream), int((~ever).sum()), handle.d_sae, len(stream))


def make_sae(
    model: nn.Module,
    ids: Tokens,
    options: SAEOptions,
    out: str | Path,
    *,
    layer: int,
    model_name: str,
    tokenizer: Any,
    context: int,
) -> Report:
    """Train, save to the folder ``out``, load again as the callback does, and report."""
    train, held = split_chats(ids, seed=options.seed)
    hook = f"blocks.{layer}.hook_resid_post"
    metadata = metadata_of(model_name, hook, ids, tokenizer, context)
    sae = new_sae(options, unwrap(model).config.get_text_config().hidden_size, metadata)
    sae = train_sae(sae, endless_activations(model.eval(), train, hook, options.seed), options)
    Path(out).mkdir(parents=True, exist_ok=True)
    sae.save_inference_model(str(out))
    return evaluate(load_sae(out, device=options.device), activations(model, held, hook))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model id or folder")
    parser.add_argument("--data", required=True, help="JSONL with prompt/completion or messages, or a data set id")
    parser.add_argument("--out", required=True, help="folder to write the SAE to")
    parser.add_argument("--layer", type=int, help="decoder layer, from 0; default: at 60%% of the depth")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default=SAEOptions.architecture)
    parser.add_argument("--d-sae", type=int, help="features; default: 8 times the model's width")
    parser.add_argument("--k", type=int, default=SAEOptions.k, help="active features (topk, batchtopk)")
    parser.add_argument("--l1", type=float, default=SAEOptions.l1, help="higher: sparser (standard)")
    parser.add_argument("--l0", type=float, default=SAEOptions.l0, help="higher: sparser (jumprelu)")
    parser.add_argument("--tokens", type=int, default=SAEOptions.tokens, help="activations to train on")
    parser.add_argument("--lr", type=float, default=SAEOptions.lr)
    parser.add_argument("--context", type=int, default=512, help="longest chat in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Read the arguments, train, report."""
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device)
    ids = tokenize_chats(tokenizer, [messages_of(row) for row in read_rows(args.data)], args.context)
    layer = default_layer(model) if args.layer is None else args.layer
    given = {name: getattr(args, name) for name in ("architecture", "k", "l1", "l0", "tokens", "lr", "seed", "device")}
    options = SAEOptions(d_sae=args.d_sae or 8 * unwrap(model).config.get_text_config().hidden_size, **given)
    print(f"{len(ids):,} chats, {sum(map(len, ids)):,} tokens; layer {layer}; {options}")
    report = make_sae(
        model, ids, options, args.out, layer=layer, model_name=args.model, tokenizer=tokenizer, context=args.context
    )
    print(f"{args.out}: {report}")


if __name__ == "__main__":
    main()
