"""The stages of ``smda check``, in order: each looks at one part, notes its findings, and leaves it for the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from smda_callbacks.cli import findings
from smda_callbacks.cli.findings import Finding
from smda_callbacks.cli.inputs import load_model

if TYPE_CHECKING:
    from smda_callbacks.config.schema import SMDAConfig
    from smda_callbacks.observe.calibration import Calibration
    from smda_callbacks.observe.instrument import Instrument
    from smda_callbacks.observe.sae import SAEHandle
    from smda_callbacks.training.plan import Plan

T = TypeVar("T")


@dataclass
class Bench:
    """What is on the bench, filled in stage by stage; a stage that fails leaves its part out."""

    config: SMDAConfig
    answers: int  # greedy answers per group of probes
    found: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    plan: Plan | None = None
    model: Any = None
    tokenizer: Any = None
    prompt: str | None = None  # of the first probe
    lead: str = ""  # what the template puts before an answer
    shared: list[str] | None = None  # openings of different lists with the same first token
    handle: SAEHandle | None = None
    instrument: Instrument | None = None
    calibration: Calibration | None = None


def _check_probes(bench: Bench) -> None:
    from smda_callbacks.config.build import build_plan

    bench.plan = build_plan(bench.config)
    bench.found.append(findings.probes_finding(bench.plan.probes, bench.plan.distil.min_active))


def _check_model(bench: Bench) -> None:
    bench.model, bench.tokenizer = load_model(bench.config)


def _check_template(bench: Bench) -> None:
    from smda_callbacks.observe.activations import unwrap
    from smda_callbacks.observe.batches import answer_lead, chat_prompt, tokenize_probes

    plan = _known(bench.plan)
    options: dict[str, Any] = {"system": plan.system, "template": plan.template}
    text = plan.probes.probes[0].text
    prompt = chat_prompt(bench.tokenizer, text, **options)
    context = getattr(unwrap(bench.model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, tokenize_probes(bench.tokenizer, plan.probes, context=context, **options)))
    bench.found.append(findings.template_finding(prompt, text, longest, context))
    bench.prompt = prompt
    bench.lead = answer_lead(bench.tokenizer, text, system=plan.system, template=plan.template)


def _check_openings(bench: Bench) -> None:
    """Each opening can be scored behind this template, and none is the beginning of another."""
    from smda_callbacks.observe.batches import response_encoder
    from smda_callbacks.observe.prefixes import check_prefix_free, shared_first_tokens

    plan, encode = _known(bench.plan), response_encoder(bench.tokenizer, _known(bench.prompt), bench.lead)
    lists = {each.name: each.openings for each in plan.scorers} | dict(plan.contrast)
    for each in plan.scorers:
        check_prefix_free({each.name: each.openings, **plan.contrast}, encode)
    shared = shared_first_tokens(lists, encode)
    bench.found.append(findings.openings_finding(lists, shared))
    bench.shared = shared
    bench.facts["shared_first_tokens"] = shared


def _check_sae(bench: Bench) -> None:
    from smda_callbacks.observe.activations import unwrap
    from smda_callbacks.observe.sae import check_fit

    plan = _known(bench.plan)
    handle = plan.load_sae()
    check_fit(handle, bench.model, allow_model_mismatch=plan.allow_model_mismatch)
    bench.found.append(findings.fit_finding(handle, str(unwrap(bench.model).config._name_or_path)))
    bench.handle = handle


def _check_readings(bench: Bench) -> None:
    """One full reading: SAE health, usable features, and the answers against the openings."""
    from smda_callbacks.observe.behaviour import score
    from smda_callbacks.observe.calibration import calibrate
    from smda_callbacks.observe.health import sae_health

    plan = _known(bench.plan)
    instrument = plan.instrument(bench.model, bench.tokenizer, _known(bench.handle))
    reading = instrument.read(bench.model)
    probability = score(instrument.scorers, instrument.batches.tree, reading.log_probs)[:, 0]
    found = calibrate(
        instrument,
        bench.model,
        bench.tokenizer,
        probability,
        plan.contrast,
        per_group=bench.answers,
        system=plan.system,
        template=plan.template,
    )
    health = sae_health(instrument.handle, reading.hidden, start=reading.hidden)
    active = (reading.gate > 0).sum(dim=0)
    usable, dead = int((active >= plan.distil.min_active).sum()), []
    if plan.policy is not None:
        # A feature that the SAE does not have is refused in the next stage.
        dead = [feature for feature in plan.policy.features.tolist() if feature < len(active) and not active[feature]]
    bench.found += [
        findings.answers_finding(found, instrument.behaviours[0]),
        findings.agreement_finding(found),
        findings.health_finding(health, instrument.handle.d_in),
        findings.support_finding(usable, instrument.handle.d_sae, plan.distil.support, plan.distil.min_active, dead),
    ]
    bench.instrument, bench.calibration = instrument, found
    bench.facts |= {"sae": {"fvu": health.fvu, "l0": health.l0, "usable_features": usable, "dead_features": dead}}
    bench.facts["missed_openings"] = [vars(each) for each in found.missed]
    bench.facts["calibration"] = _calibration_facts(found, instrument.behaviours[0])


def _check_policy(bench: Bench) -> None:
    """Distil as the run would (or take the saved policy), and read once more to know what a reading costs."""
    from smda_callbacks.cli.distill import facts_of
    from smda_callbacks.observe.distil import distil
    from smda_callbacks.training.booking import gaps_of, refit
    from smda_callbacks.training.policy_check import check_policy

    plan, full = _known(bench.plan), _known(bench.instrument)
    if plan.policy is None:
        policy, narrowed, reading = distil(full, bench.model, bench.tokenizer, plan.distil)
    else:
        check_policy(plan.policy, full)
        policy, narrowed = plan.policy, full.of_features(plan.policy.features)
        reading = narrowed.read(bench.model)
    snapshot, probes = narrowed.snapshot(0, reading), plan.probes.probes
    fit = refit(snapshot, policy)
    gaps = gaps_of(snapshot, policy, probes, fit)
    began = time.perf_counter()
    narrowed.read(bench.model)
    seconds, tokens = time.perf_counter() - began, full.batches.n_tokens
    before = 2 * plan.noise_draws + 1
    bench.found += [
        findings.policy_finding(policy, fit["r2"][0], fit["r2_loo"][0]),
        findings.gaps_finding(gaps),
        findings.cost_finding(tokens, seconds, before, plan.every, plan.noise_draws if plan.renew_noise else 0),
    ]
    bench.facts["policy"] = facts_of(policy, probes)
    bench.facts["gaps"] = [gap["category"] for gap in gaps if gap["is_gap"]]
    bench.facts["cost"] = {"tokens_per_reading": tokens, "seconds_per_reading": seconds, "readings_before": before}


#: Name -> function, and what must be on the bench for it, in order.
STAGES: Mapping[str, tuple[Callable[[Bench], None], tuple[str, ...]]] = {
    "probes": (_check_probes, ()),
    "model": (_check_model, ()),
    "prompts": (_check_template, ("plan", "model")),
    "openings": (_check_openings, ("plan", "model", "prompt")),
    "SAE fits": (_check_sae, ("plan", "model")),
    "readings": (_check_readings, ("plan", "model", "prompt", "shared", "handle")),
    "policy": (_check_policy, ("instrument",)),
}


def _known(value: T | None) -> T:
    assert value is not None  # a stage runs only when what it needs is there
    return value


def _calibration_facts(found: Calibration, scored: str) -> dict[str, Any]:
    kinds = (scored, *sorted({str(a.kind) for a in found.answers if a.kind not in (None, scored)}), None)
    return {
        "agreement": found.agreement,
        "shares": {
            group: {name or "none": found.share(group, name) for name in kinds} for group in ("refuse", "comply")
        },
        "answers": len(found.answers),
    }
