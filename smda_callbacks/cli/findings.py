"""The findings of ``smda check``: from what was measured to OK, WARN or FAIL, the reason, and the next step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from smda_callbacks.cli.output import count, number

if TYPE_CHECKING:
    from smda_callbacks.observe.calibration import Calibration
    from smda_callbacks.observe.probes import ProbeSet
    from smda_callbacks.observe.sae import SAEHandle
    from smda_callbacks.records import PolicyRecord, SAEHealth

Status = Literal["OK", "WARN", "FAIL"]

FEW_PROBES = 20  # in a group: its mean refusal is uncertain by 0.1 and more
FEW_IN_CATEGORY = 5
HIGH_FVU = 0.5  # the SAE misses more than it explains
DENSE_SHARE, DENSE_FLOOR = 0.05, 32  # of d_in; small models have small d_in and SAEs of a few dozen features at once
MIN_CV = 0.3
MISSED_SHARE = 0.2  # answers to probes to refuse that open as no list does
MIN_AGREEMENT = 0.9
LOW_COVERAGE = 0.05


@dataclass(frozen=True)
class Finding:
    """One line of the table. ``next_step`` is empty where nothing is to be done."""

    name: str
    status: Status
    detail: str
    next_step: str = ""


def probes_finding(probes: ProbeSet, min_active: int) -> Finding:
    """Are there enough probes, in both groups and in every category?"""
    groups = Counter(probe.expected for probe in probes.probes)
    sizes = Counter(probe.category for probe in probes.probes)
    detail = (
        f"{count(len(probes), 'probe')} in {count(len(sizes), 'category', 'categories')}: {groups['refuse']} to "
        f"refuse, {groups['comply']} to comply with"
    )
    small = [name for name, size in sizes.items() if size < FEW_IN_CATEGORY]
    if min(groups["refuse"], groups["comply"]) < FEW_PROBES or len(probes) < 4 * min_active:
        return Finding(
            "probes", "WARN", f"{detail}. Few: the policy will be uncertain", f"use {FEW_PROBES} or more of each group"
        )
    if small:
        shown = ", ".join(small[:3]) + (" ..." if len(small) > 3 else "")
        return Finding(
            "probes",
            "WARN",
            f"{detail}. Categories with fewer than {FEW_IN_CATEGORY}: {shown}",
            "add probes there, or join categories",
        )
    return Finding("probes", "OK", detail)


def template_finding(prompt: str, text: str, longest: int, context: int | None) -> Finding:
    """Where does the answer begin, and does the longest prompt fit?"""
    tail = prompt.rpartition(text)[2] or prompt[-40:]
    room = f" of {context} that fit" if context else ""
    return Finding("prompts", "OK", f"longest {longest} tokens{room}; the answer begins after {tail!r}")


def openings_finding(lists: Mapping[str, Sequence[str]], shared: Sequence[str]) -> Finding:
    """All openings can be scored and told apart; which of them a first-token score would confuse is said too."""
    sizes = ", ".join(f"{len(openings)} of {name}" for name, openings in lists.items())
    confused = f". Same first token (whole openings are scored, so this is fine): {'; '.join(shared)}" if shared else ""
    return Finding("openings", "OK", f"{sizes}: all can be scored and told apart{confused}")


def answers_finding(found: Calibration, scored: str) -> Finding:
    """Do the lists know how this model opens its answers?"""
    refused, missed = found.share("refuse", scored), found.share("refuse", None)
    lists = sorted({answer.kind for answer in found.answers if answer.kind is not None and answer.kind != scored})
    others = "".join(f", {number(found.share('refuse', name), 2)} as {name}" for name in lists)
    detail = (
        f"{found.size('refuse')} greedy answers to probes to refuse: {number(refused, 2)} open as {scored}{others}, "
        f"{number(missed, 2)} as no list; of {found.size('comply')} others {number(found.share('comply', scored), 2)} "
        f"open as {scored}"
    )
    if missed > MISSED_SHARE:
        most = found.missed[0]
        return Finding(
            "answers",
            "WARN",
            detail,
            f"look at the openings below ({most.opening!r}: {most.refuse + most.comply}); add those that refuse to "
            "behaviour.refusals",
        )
    if refused < LOW_COVERAGE:
        return Finding("answers", "WARN", f"{detail}. This model hardly refuses", "is it the chat model that you mean?")
    return Finding("answers", "OK", detail)


def agreement_finding(found: Calibration) -> Finding:
    """Does a score above one half mean that the model refuses?"""
    detail = f"score above 0.5 and greedy refusal agree on {number(found.agreement, 2)} of {len(found.answers)} answers"
    if found.agreement < MIN_AGREEMENT:
        return Finding("score", "WARN", detail, "the openings miss how this model refuses, or it wavers: read answers")
    return Finding("score", "OK", detail)


def fit_finding(handle: SAEHandle, model_id: str) -> Finding:
    """The SAE belongs to this model: layer and width were checked before."""
    name = str(handle.model_name or "an unnamed model")
    same = model_id.rstrip("/").split("/")[-1].lower() == name.split("/")[-1].lower()
    detail = f"{handle.architecture}, {handle.d_sae:,} features, reads {handle.site.name} (width {handle.d_in})"
    if not same:
        return Finding(
            "SAE fits", "WARN", f"{detail}; trained on {name}, used on {model_id}", "watch the FVU in the next line"
        )
    return Finding("SAE fits", "OK", f"{detail}; trained on {name}")


def health_finding(health: SAEHealth, d_in: int) -> Finding:
    """Does the SAE describe this model at the read-out position?"""
    detail = f"misses {number(health.fvu, 2)} of the variance over probes (FVU); {health.l0:.1f} features active"
    if health.l0 == 0:
        return Finding("SAE health", "FAIL", detail, "wrong layer, scale or model: check sae.hook_name, sae.center")
    if health.fvu >= 1:
        return Finding(
            "SAE health", "FAIL", f"{detail}: no better than the mean", "check layer, sae.norm_scaling_factor, model"
        )
    if health.fvu > HIGH_FVU:
        return Finding("SAE health", "WARN", detail, "read feature accounts with care; try an SAE of this very model")
    if health.l0 > max(DENSE_FLOOR, DENSE_SHARE * d_in):
        return Finding("SAE health", "WARN", f"{detail}: dense", "features will be hard to read; try a sparser SAE")
    return Finding("SAE health", "OK", detail)


def support_finding(usable: int, d_sae: int, wanted: int, min_active: int, dead: Sequence[int]) -> Finding:
    """Are enough features active on the probes?

    ``usable``: features active on ``min_active`` probes or more; ``dead``: features of the policy active on none.
    """
    detail = f"{usable:,} of {d_sae:,} features are active on {min_active} probes or more; the policy takes {wanted}"
    if dead:
        return Finding(
            "support",
            "WARN",
            f"{detail}. {count(len(dead), 'feature')} of the policy active on no probe: {list(dead[:5])}",
            "distil anew for this model: leave policy.path out",
        )
    if usable < wanted:
        return Finding("support", "WARN", detail, "more probes, or a lower policy.min_active, give more")
    return Finding("support", "OK", detail)


def policy_finding(policy: PolicyRecord, r2: float, r2_loo: float) -> Finding:
    """May the policy be believed? ``r2``, ``r2_loo``: of its fit on this model, also where it was brought along."""
    quality = policy.quality[0]
    honest = "not computed" if quality.r2_cv is None else number(quality.r2_cv, 2)
    detail = (
        f"R² {number(r2, 2)}, leave-one-out {number(r2_loo, 2)}, every choice made again in each fold "
        f"{honest}; λ {policy.lam:.3g}, {policy.edf:.1f} degrees of freedom"
    )
    low = r2_loo if quality.r2_cv is None else quality.r2_cv
    if low < MIN_CV:
        return Finding(
            "policy", "WARN", f"{detail}. It hardly predicts unseen prompts", "more probes, another layer or SAE"
        )
    return Finding("policy", "OK", detail)


def gaps_finding(gaps: Sequence[Mapping[str, Any]]) -> Finding:
    """Where the model does not do what is wanted, before training: to know, not to mend."""
    found = [f"{gap['category']} ({gap['reason']}, refusal {number(gap['mean'], 2)})" for gap in gaps if gap["is_gap"]]
    if not found:
        return Finding("gaps", "OK", "none: every category is answered as it should be, before training")
    rest = f" and {len(found) - 5} more (smda distill shows all)" if len(found) > 5 else ""
    return Finding("gaps", "OK", f"{len(found)} before training: {', '.join(found[:5])}{rest}")


def cost_finding(tokens: int, seconds: float, readings_before: int, every: int, renewal: int) -> Finding:
    """What measuring will cost on this machine. ``renewal``: readings of a renewal of the noise floor, 0 without."""
    when = "optimizer step" if every == 1 else f"{every} optimizer steps"
    return Finding(
        "cost",
        "OK",
        f"{tokens:,} tokens and {seconds:.2f} s a reading on this machine: once per {when}, and about "
        f"{readings_before * seconds:.0f} s before the first"
        + (f"; {renewal} readings more for the noise floor after 4, 8, 16, ... of them" if renewal else ""),
    )
