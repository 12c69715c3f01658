"""The two trainings that the evidence is taken from: model, SAE, probes, policy, pairs and hyper-parameters, fixed.

``quickstart`` is what ships with the library: its chat model, its SAE, its 160 pairs. ``midi`` is a chat model of your
own (``--midi MODEL --pairs FILE``); its SAE is trained by recipes/train_sae.py on the pairs and what ``--chats`` names,
once, and kept in the work folder. Both train LoRA on all linear layers for two epochs with AdamW, a warm-up and a
linear decay, batches of 8, no packing, no dropout, gradients clipped to a norm of 1 (TRL's default), in float32.

The rate, 1e-3, is the quickstart's own, and was looked at before any method was: mean refusal over the harmful probes
falls from 0.82 to 0.47 in ``quickstart`` and from 0.46 to 0.18 in ``midi``, steadily from step to step. At half of it
half as much happens or less; at twice, refusal overshoots and comes back in ``quickstart``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from recipes.train_sae import SAEOptions, default_layer, make_sae, tokenize_chats
from smda_callbacks.cli.inputs import quiet_libraries
from smda_callbacks.cli.quickstart_run import MODEL, PAIRS, SAE
from smda_callbacks.config.build import build_plan, builtin_path
from smda_callbacks.config.load import check_config
from smda_callbacks.maths.functionals import FunctionalSet
from smda_callbacks.observe.distil import distil
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.probes import load_rows
from smda_callbacks.records import PolicyRecord
from smda_callbacks.training.audit_pairs import AuditPair, as_chat, tokenize_pairs
from smda_callbacks.training.audit_start import all_functionals
from smda_callbacks.training.plan import Plan


@dataclass(frozen=True)
class Hyper:
    """A LoRA training. ``warmup``: share of the steps; afterwards the rate falls to zero on a line.

    ``max_grad_norm``: what the whole gradient is clipped to, as TRL does by default.
    """

    learning_rate: float
    epochs: int = 2
    batch: int = 8
    warmup: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    max_length: int = 128
    rank: int = 8
    alpha: int = 16
    adapter_seed: int = 0

    def steps(self, pairs: int) -> int:
        """Optimizer steps of a run over so many pairs."""
        return self.epochs * -(-pairs // self.batch)


@dataclass(frozen=True)
class Setup:
    """Everything that a run's order of pairs does not decide. ``rows``: pairs, no two of equal tokens; each has a kind.

    ``config``: as a YAML file of smda-callbacks would hold it, without a store.
    """

    name: str
    config: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    hyper: Hyper
    seed: int = 0
    notes: tuple[str, ...] = field(default=())

    def load(self) -> tuple[Any, Any]:
        """The base model in evaluation mode, and its tokenizer: the same weights every time."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        quiet_libraries()
        source = builtin_path(self.config["model"]["id"])
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(source)

    def lora(self) -> Any:
        """The adapter's configuration."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.hyper.rank, lora_alpha=self.hyper.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )

    def adapted(self) -> tuple[Any, Any]:
        """The model with its adapter as every run starts (B at zero), and its tokenizer."""
        from peft import get_peft_model

        model, tokenizer = self.load()
        torch.manual_seed(self.hyper.adapter_seed)
        return get_peft_model(model, self.lora()).eval(), tokenizer

    @cached_property
    def plan(self) -> Plan:
        """The measurement plan of ``config``, without a store and with the setup's own policy."""
        plan = build_plan(check_config(dict(self.config), f"the setup {self.name}"))
        return replace(plan, policy=self._distilled(plan), make_sinks=lambda _: (), noise_draws=0, on_error="raise")

    def _distilled(self, plan: Plan) -> PolicyRecord:
        model, tokenizer = self.load()
        return distil(plan.instrument(model, tokenizer, plan.load_sae()), model, tokenizer, plan.distil)[0]

    @property
    def policy(self) -> PolicyRecord:
        """Distilled from the base model, before any training."""
        policy = self.plan.policy
        assert policy is not None
        return policy

    @cached_property
    def functionals(self) -> FunctionalSet:
        """Everything that is attributed: refusal of every group, and every coefficient's x, y and gating part."""
        return all_functionals(self.policy, self.plan.probes)

    def instrument(self, model: Any, tokenizer: Any) -> Instrument:
        """Reads ``model`` with this setup's probes, on the policy's features."""
        return self.plan.instrument(model, tokenizer, self.plan.load_sae()).of_features(self.policy.features)

    def pairs(self, tokenizer: Any) -> tuple[AuditPair, ...]:
        """The pairs as tokens, numbered as the rows."""
        return tokenize_pairs(self.rows, tokenizer, max_length=self.hyper.max_length)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Per pair what kind it is, such as ``harmful_complied``."""
        return tuple(str(row["kind"]) for row in self.rows)


# The two ------------------------------------------------------------------------------------------------------------


def quickstart(hyper: Hyper | None = None, *, take: int | None = None) -> Setup:
    """What ships with the library. ``take``: so many pairs, kinds in turn; None: all 160."""
    rows = [json.loads(line) for line in Path(builtin_path(PAIRS)).read_text(encoding="utf-8").splitlines()]
    config = {"model": {"id": MODEL, "dtype": "float32"}, "sae": {"source": SAE}}
    return _setup("quickstart", config, rows, hyper or Hyper(learning_rate=1e-3), take)


def small() -> Setup:
    """The quickstart cut down to seconds, to see that a script works: 24 pairs, 66 probes or so, four features."""
    whole = quickstart(Hyper(learning_rate=2e-3), take=24)
    less = {"probes": {"max_per_category": 3}, "policy": {"support": 4, "min_active": 4}}
    return replace(whole, name="small", config={**whole.config, **less})


def midi(model: str, pairs: str, work: Path, chats: Sequence[str] = (), hyper: Hyper | None = None) -> Setup:
    """A chat model of the user's own, with an SAE that is trained here unless ``work`` holds it.

    ``chats``: further prompts that the SAE is trained on, ``FILE:FORMAT`` each.
    """
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines() if line.strip()]
    sae = midi_sae(model, rows, chats, work / "midi_sae")
    config = {"model": {"id": model, "dtype": "float32"}, "sae": {"source": str(sae)}}
    return _setup("midi", config, rows, hyper or Hyper(learning_rate=1e-3), None)


def midi_sae(
    model: str, rows: Sequence[Mapping[str, Any]], chats: Sequence[str], out: Path, *, tokens: int = 400_000
) -> Path:
    """The folder of the SAE (TopK, 1,024 features, 24 active); trained now unless it is there."""
    if (out / "cfg.json").is_file():
        return out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    talks = [[message for part in as_chat(row, k) for message in part] for k, row in enumerate(rows)]
    for source in chats:
        name, _, layout = source.rpartition(":")
        talks += [[{"role": "user", "content": each.text}] for each in load_rows(name, format=layout)]
    ids = tokenize_chats(tokenizer, talks, 512)
    options = SAEOptions(architecture="topk", d_sae=1024, k=24, tokens=tokens, lr=2e-3)
    layer = default_layer(base)
    print(make_sae(base, ids, options, out, layer=layer, model_name=model, tokenizer=tokenizer, context=512))
    return out


def _setup(name: str, config: dict[str, Any], rows: Sequence[Any], hyper: Hyper, take: int | None) -> Setup:
    once = list({(row["prompt"], row["completion"]): row for row in reversed(rows)}.values())[::-1]
    notes = (f"{len(rows) - len(once)} rows of equal text left out",) if len(once) < len(rows) else ()
    chosen = once if take is None else _in_turn(once)[:take]
    return Setup(name, {**config, "wandb": {"enabled": False}}, tuple(chosen), hyper, notes=notes)


def _in_turn(rows: Sequence[Any]) -> list[Any]:
    """The rows so that kinds take turns: the first few hold every kind."""
    place: dict[str, int] = {}
    ranked = []
    for row in rows:
        place[row["kind"]] = place.get(row["kind"], -1) + 1
        ranked.append((place[row["kind"]], row))
    return [row for _, row in sorted(ranked, key=lambda each: each[0])]


# Command lines ------------------------------------------------------------------------------------------------------


def add_setups(parser: argparse.ArgumentParser) -> None:
    """Options that say which setups are used, for every script of the evidence."""
    add = parser.add_argument
    add("--setups", nargs="+", choices=("quickstart", "midi"), default=["quickstart", "midi"], help="default: both")
    add("--midi", metavar="MODEL", help="a small chat model's folder; without it that setup is left out")
    add("--pairs", metavar="FILE", help="JSONL of the midi setup's pairs: prompt, completion, kind")
    add("--chats", metavar="FILE:FORMAT", action="append", default=[], help="prompts to train its SAE on; repeatable")
    add("--work", metavar="DIR", type=Path, default=Path("runs/evidence"), help="what is made once is kept there")
    add("--quick", action="store_true", help="a small run on the quickstart model, to see that it works")


def chosen_setups(args: argparse.Namespace) -> list[Setup]:
    """The setups that ``args`` name and that are there; says which are left out."""
    found = []
    if "quickstart" in args.setups:
        found.append(small() if args.quick else quickstart())
    if "midi" in args.setups and not args.quick:
        if args.midi and args.pairs and Path(args.midi).is_dir():
            found.append(midi(args.midi, args.pairs, args.work, args.chats))
        else:
            print("setup midi left out: it needs --midi MODEL (a folder that exists) and --pairs FILE.")
    return found
