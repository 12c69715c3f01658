"""What is known before the first pair of an audit, and whether two audits are one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from smda_callbacks.maths.functionals import FunctionalSet, functional_set, measured
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.noise import measure_noise
from smda_callbacks.observe.probes import ProbeSet
from smda_callbacks.records import NoiseFloor, PolicyRecord, RunStart, Snapshot
from smda_callbacks.training.audit_pairs import AuditPair, pairs_hash
from smda_callbacks.training.audit_step import Adapter, AuditError, AuditOptions
from smda_callbacks.training.manifest import build_manifest
from smda_callbacks.training.plan import Plan

#: Sections and keys of a configuration that change none of an audit's numbers.
_OF_NO_ACCOUNT = (
    *("store", "wandb", "alerts", "attribution", "trajectory"),
    *("measure.every", "measure.keep_gib", "measure.on_error"),
)

#: What two manifests of one audit have in common, beside the configuration.
_IDENTITY = ("kind", "audit", "model.hash", "sae.hash", "probe_hash", "behaviours", "target", "attribution.text")


def all_functionals(policy: PolicyRecord, probes: ProbeSet) -> FunctionalSet:
    """Every functional of a policy on a probe set, gating included: the exact engine measures all of them."""
    expected = {probe.category: probe.expected for probe in probes.probes}
    return functional_set(
        behaviours=policy.behaviours,
        categories=probes.categories,
        refuse=[expected[name] == "refuse" for name in probes.categories],
        groups=probes.groups,
        features=policy.features,
        target=policy.target,
        gating=True,
    )


def state_of(snapshot: Snapshot) -> State:
    """A snapshot as the maths takes it."""
    return State(snapshot.pre, snapshot.gate, snapshot.y)


# The noise floor ------------------------------------------------------------------------------------------------------


def update_floor(
    instrument: Instrument,
    adapter: Adapter,
    policy: PolicyRecord,
    baseline: Snapshot,
    functionals: FunctionalSet,
    options: AuditOptions,
    *,
    draws: int,
    seed: int,
) -> NoiseFloor:
    """The noise floor of one update of an audit, functionals included.

    Only the B matrices are moved: an adapter starts with B at zero, so that A has no effect yet, and a first update
    moves nothing but B. AdamW moves a weight by the learning rate; a clipped SGD step has the norm that it is clipped
    to, times the rate.
    """
    outer = [parameter for name, parameter in adapter.model.named_parameters() if "lora_A" in name]
    count = sum(parameter.numel() for parameter in adapter.parameters)
    moved = count - sum(parameter.numel() for parameter in outer)
    size = options.learning_rate
    if options.optimizer == "sgd":
        size *= (options.max_grad_norm or 1.0) / math.sqrt(moved)
    for parameter in outer:
        parameter.requires_grad_(False)
    try:
        with tqdm(total=2 * draws, desc="SMDA noise floor", unit="reading", delay=2, leave=False, disable=None) as bar:
            floor = measure_noise(
                instrument,
                adapter.model,
                policy,
                baseline,
                size=size,
                draws=draws,
                seed=seed,
                measure=partial(measured, functionals, scale=policy.scale, lam=policy.lam),
                tick=bar.update,
            )
    finally:
        for parameter in outer:
            parameter.requires_grad_(True)
    return replace(floor, update_rms=size * math.sqrt(moved / count))


# The manifest ---------------------------------------------------------------------------------------------------------


def audit_manifest(
    plan: Plan,
    options: AuditOptions,
    instrument: Instrument,
    policy: PolicyRecord,
    model: Any,
    pairs: Sequence[AuditPair],
    functionals: FunctionalSet,
) -> dict[str, Any]:
    """The manifest of an audit: that of a run, with ``kind``, ``audit`` and ``attribution``."""
    args = SimpleNamespace(
        seed=options.seed,
        data_seed=None,
        learning_rate=options.learning_rate,
        optim=options.optimizer,
        weight_decay=0.0,
        max_grad_norm=options.max_grad_norm,
        max_steps=len(pairs) * options.repeats,
    )
    manifest = build_manifest(plan, instrument, policy, model, args)
    cut = sum(pair.cut for pair in pairs)
    return {
        **manifest,
        "kind": "audit",
        "audit": {
            "pairs": len(pairs),
            "rows": sum(len(pair.pair.rows) for pair in pairs),
            "cut": cut,
            "pairs_hash": pairs_hash(pairs),
            **asdict(options),
            "target_modules": _plain(options.target_modules),
            "seeds": list(options.seeds),
            "intended": plan.attribution.intended,
        },
        "attribution": {
            "engine": "exact",
            "why": "an audit applies every pair's own update alone",
            "functionals": list(functionals.names),
            "every": 1,
            "momentum": "line",
            "level": "row",
            "text": plan.attribution.text,
            "notes": [f"cut at {options.max_length} tokens: {cut} of {len(pairs)} pairs"] if cut else [],
        },
        "trainer": {**manifest["trainer"], "class": "audit"},
    }


def _plain(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


# Is it the same audit? ------------------------------------------------------------------------------------------------


def check_same_audit(stored: RunStart, manifest: Mapping[str, Any], snapshot: Snapshot) -> None:
    """Refuse to go on with an audit of other pairs, another model or configuration, or that reads differently here.

    Raises:
        AuditError: says what differs.
    """
    found = {name: _look_up(manifest, name) for name in _IDENTITY}
    there = {name: _look_up(stored.manifest, name) for name in _IDENTITY}
    refuse_if_other([*config_differences(stored.manifest, manifest), *_differences(there, found)])
    before = stored.baseline.snapshot
    assert before is not None
    if not all(np.array_equal(getattr(before, name), getattr(snapshot, name)) for name in ("pre", "gate", "y")):
        worst = float(np.abs(before.y - snapshot.y).max())
        raise AuditError(
            f"the model reads differently here than when the audit began (behaviour by up to {worst:.1e}): other "
            "hardware, number of threads or library versions. Windows of both kinds would not be comparable. Next "
            "step: go on where it began, or start a new audit in another folder."
        )


def config_differences(stored: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Keys of two manifests' configurations that differ, with both values; those of no account left out."""
    return _differences(_of_account(stored["config"]), _of_account(manifest["config"]))


def refuse_if_other(differences: Sequence[str]) -> None:
    """Raise AuditError if there are differences."""
    if differences:
        raise AuditError(
            f"the store is of another audit: {'; '.join(differences)}. Next step: give what it was begun with, or "
            "another folder with --out for a new audit."
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    flat = dict(_leaves(there)), dict(_leaves(here))
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return [f"{name} {flat[0].get(name)!r} there and {flat[1].get(name)!r} here" for name in names]


def _of_account(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in _leaves(config)
        if not any(name == each or name.startswith(f"{each}.") for each in _OF_NO_ACCOUNT)
    }


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(item) if isinstance(item, tuple) else item


def _look_up(manifest: Mapping[str, Any], name: str) -> Any:
    value: Any = manifest
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
