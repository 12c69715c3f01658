"""The same training watched again otherwise: another order, another adapter, other probes, another SAE; what is said.

Every run is TRL's trainer with the callback, as a user has it. Runs are kept in a folder and are not made again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.evidence.retrain import trl_trainer
from recipes.evidence.setups import Setup
from recipes.evidence.survival import Finding, Findings, of_features
from recipes.quickstart_prompts import chat, draw_prompts, read_phrases, read_prompts
from recipes.train_sae import SAEOptions, make_sae, tokenize_chats
from smda_callbacks.config.build import build_plan
from smda_callbacks.config.callback import SMDACallback
from smda_callbacks.config.load import check_config
from smda_callbacks.maths.pathways import State, split_shift
from smda_callbacks.maths.uncertainty import halves
from smda_callbacks.observe.probes import ProbeSet, load_rows
from smda_callbacks.observe.sae import SAEHandle
from smda_callbacks.records import PATHWAYS
from smda_callbacks.report.data import TIMES, RunData, behaviour_floors, gaps_now
from smda_callbacks.report.pairs_data import above_noise, pair_name
from smda_callbacks.report.shifts import feature_shifts
from smda_callbacks.sinks.pair_values import harmful
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.audit_pairs import as_chat

Array = NDArray[np.float64]

#: Two SAEs hold one feature where the cosine of their decoder directions is at least this.
SAME_FEATURE = 0.7


# Runs -----------------------------------------------------------------------------------------------------------------


def watched(
    setup: Setup,
    folder: Path,
    *,
    order: int = 0,
    adapter: int = 0,
    probes: ProbeSet | None = None,
    sae: Path | None = None,
) -> RunData:
    """A run with the callback at its defaults, read from its store; one that has finished in ``folder`` is taken."""
    if not (folder / "run" / "end.json").is_file():
        config = {**setup.config, "store": {"dir": str(folder / "run")}}
        if sae is not None:
            config["sae"] = {"source": str(sae)}
        plan = replace(build_plan(check_config(config, "a run of the evidence on noise")), on_error="raise")
        if probes is not None:
            plan = replace(plan, probes=probes)
        again = replace(setup, hyper=replace(setup.hyper, adapter_seed=adapter))
        torch.manual_seed(adapter)
        trl_trainer(again, order, folder / "trainer", [SMDACallback(plan)]).train()
    return RunData.read(RunStore.open(folder / "run"))


def half_of(probes: ProbeSet, seed: int, side: int) -> ProbeSet:
    """One of the two halves of the probes that ``seed`` draws, within every category; single probes go to one half."""
    chosen = halves(probes.groups, seed)[side]
    return ProbeSet(tuple(probes.probes[k] for k in chosen))


def sae_again(setup: Setup, folder: Path, seed: int, chats: Sequence[str], *, tokens: int = 400_000) -> Path:
    """The folder of an SAE like the setup's own, trained from another seed unless it is there."""
    if (folder / "cfg.json").is_file():
        return folder
    model, tokenizer = setup.load()
    own = setup.plan.load_sae()
    options = SAEOptions(architecture="topk", d_sae=own.d_sae, k=int(own.sae.cfg.k), tokens=tokens, lr=2e-3, seed=seed)
    ids = tokenize_chats(tokenizer, _talks(setup, chats, seed), 128 if setup.name == "quickstart" else 512)
    name = str(setup.config["model"]["id"]).rpartition("/")[2]
    print(
        make_sae(model, ids, options, folder, layer=own.site.layer, model_name=name, tokenizer=tokenizer, context=512)
    )
    return folder


def _talks(setup: Setup, chats: Sequence[str], seed: int) -> list[list[dict[str, str]]]:
    """What the SAE of this setup is trained on: for the quickstart what its own was, drawn anew."""
    if setup.name == "quickstart":
        rng = random.Random(seed)
        talks = [chat(each, rng) for each in [*read_prompts(), *draw_prompts(read_phrases(), rng)]]
        return [*talks, *(each[:1] for each in talks)]
    rows: list[Any] = [as_chat(dict(row), k) for k, row in enumerate(setup.rows)]
    talks = [[message for part in row for message in part] for row in rows]
    for source in chats:
        name, _, layout = source.rpartition(":")
        talks += [[{"role": "user", "content": each.text}] for each in load_rows(name, format=layout)]
    return talks


# What they say --------------------------------------------------------------------------------------------------------


def findings_of(data: RunData) -> Findings:
    """What the report of a run says, refusal only."""
    changes = (data.means[-1] - data.means[0])[:, 0]
    floors = behaviour_floors(data)
    limit = np.zeros_like(changes) if floors is None else TIMES * floors[-1, :, 0]
    shifts = feature_shifts(data, 0)
    return Findings(
        expected=dict(data.expected),
        changes={
            name: Finding(float(changes[c]), bool(abs(changes[c]) > limit[c])) for c, name in enumerate(data.categories)
        },
        features={str(each.feature): Finding(each.total, each.any_above) for each in shifts},
        by_strength={str(each.feature): _part(each, PATHWAYS[0]) for each in shifts},
        by_outputs={str(each.feature): _part(each, PATHWAYS[2]) for each in shifts},
        pairs=_pairs(data),
        gaps=frozenset(str(gap["category"]) for gap in gaps_now(data) if gap["is_gap"]),
        alerts={
            (each.kind, each.category): (
                None if each.feature is None else str(each.feature),
                tuple(_name(data, pair) for pair in each.pairs),
            )
            for each in data.alerts
            if each.category is not None
        },
    )


def _part(shift: Any, part: str) -> Finding:
    return Finding(shift.shifts[part], shift.above.get(part, True))


def _pairs(data: RunData) -> dict[str, Finding]:
    table, name = data.pairs, harmful(data.behaviours[0])
    if table is None or name not in table.functionals:
        return {}
    place, above = table.functionals.index(name), above_noise(table)
    return {
        pair_name(pair): Finding(float(table.effect[row, place]), bool(above is None or above[row, place]))
        for row, pair in enumerate(table.pairs)
        if table.known[row]
    }


def _name(data: RunData, number: int) -> str:
    assert data.pairs is not None
    return pair_name(next(pair for pair in data.pairs.pairs if pair.id == number))


def in_terms_of(findings: Findings, own: SAEHandle, other: SAEHandle) -> tuple[Findings, float]:
    """``findings`` of a run with ``other``, its features named as in ``own``; and which share of them has a namesake.

    A namesake is the feature of ``own`` whose decoder direction is nearest, at a cosine of SAME_FEATURE or more; of two
    that would share one the nearer has it.
    """
    mine, theirs = (handle.sae.W_dec.detach().double() for handle in (own, other))
    features = [int(each) for each in findings.features]
    unit = mine / mine.norm(dim=-1, keepdim=True)
    cosine = (theirs[features] / theirs[features].norm(dim=-1, keepdim=True)) @ unit.T
    best, where = (each.tolist() for each in cosine.max(dim=1))
    names: dict[str, str] = {}
    for place in sorted(range(len(features)), key=lambda k: -best[k]):
        if best[place] >= SAME_FEATURE and str(where[place]) not in names.values():
            names[str(features[place])] = str(where[place])
    return of_features(findings, names), len(names) / max(1, len(features))


# Reliability and signs ------------------------------------------------------------------------------------------------


def signs_between_halves(data: RunData, *, seed: int = 0) -> dict[str, list[tuple[float, float]]]:
    """Part of PATHWAYS -> per window its reliability and the share of features with one sign in both halves of probes.

    Both from the same halves. A feature that did not shift in one half counts as half a hit.
    """
    policy, sides = data.policy, halves(data.store.groups, seed)
    found: dict[str, list[tuple[float, float]]] = {part: [] for part in PATHWAYS}
    for before, after in zip(data.records, data.ok, strict=False):
        assert before.snapshot is not None
        assert after.snapshot is not None
        splits = []
        for side in sides:
            states = (
                State(each.pre[side], each.gate[side], each.y[side]) for each in (before.snapshot, after.snapshot)
            )
            splits.append(split_shift(*states, scale=policy.scale, lam=policy.lam / 2).as_dict())
        for part in PATHWAYS:
            first, second = (split[part][:, 0] for split in splits)
            if np.ptp(first) > 0 and np.ptp(second) > 0:
                same = np.mean((1 + np.sign(first) * np.sign(second)) / 2)
                found[part].append((float(np.corrcoef(first, second)[0, 1]), float(same)))
    return found


def by_reliability(
    windows: Sequence[tuple[float, float]], edges: Sequence[float] = (-1, 0, 0.2, 0.4, 0.6, 0.8, 1.0001)
) -> list[dict[str, float | int | None]]:
    """``windows`` (reliability, share of one sign) in bins of reliability: how many, and the mean share."""
    rows: list[dict[str, float | int | None]] = []
    for low, high in pairwise(edges):
        inside = [share for reliability, share in windows if low <= reliability < high]
        mean = float(np.mean(inside)) if inside else None
        rows.append({"from": low, "to": min(high, 1.0), "windows": len(inside), "same_sign": mean})
    return rows
