"""The head of the report: verdict, figures at a glance, where the run comes from, alerts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smda_callbacks.report import tables
from smda_callbacks.report.audit_verdict import audit_facts, audit_tiles
from smda_callbacks.report.data import RunData, missed
from smda_callbacks.report.markup import NONE, Html, count, element, fixed, join, number, signed
from smda_callbacks.report.shifts import categories_above
from smda_callbacks.report.verdict import probes_to, verdict, worst_category
from smda_callbacks.sinks.unattributed import unattributed_sentence

#: How a reward model's behaviour is to be read.
PREFERENCE = (
    "of a reward model: the probability that it prefers the behaviour's openings of an answer to the others, by its "
    "scores (Bradley and Terry); every list of openings starts with the same weight"
)


def head(data: RunData, behaviour: int) -> Html:
    """The first section, for one behaviour."""
    first, *others = verdict(data, behaviour)
    return join([
        element("p", _origin(data), class_="origin"),
        element("p", first, class_="lead"),
        tiles(data, behaviour),
        element("ul", *(element("li", each) for each in others), class_="verdict"),
        element("h3", "Alerts"),
        tables.alert_list(data),
        tables.unbooked_list(data),
        element("h3", "The audit" if data.audit else "The run"),
        tables.facts(run_facts(data, behaviour)),
    ])  # fmt: skip


def _origin(data: RunData) -> str:
    manifest, policy = data.store.manifest, data.policy
    model = _mapping(manifest.get("model")).get("id") or policy.model_id
    sae = _mapping(manifest.get("sae")).get("id") or policy.sae_id
    kind = "Audit" if data.audit else "Run"
    return f"{kind} {_text(manifest.get('run_id'))} · model {_text(model)} · SAE {_text(sae)}"


def tiles(data: RunData, behaviour: int) -> Html:
    """A few numbers at a glance."""
    if data.audit:
        found = [_tile(*each) for each in audit_tiles(data, behaviour)]
        return element("div", *found, *_trust_tiles(data, behaviour), class_="tiles")
    found = [
        _change_tile(probes_to(group), float(means[0, behaviour]), float(means[-1, behaviour]), data.unit)
        for group, means in data.group_means.items()
    ]
    if data.ok:
        worst = worst_category(data, behaviour)
        start, end = (float(data.means[record, worst, behaviour]) for record in (0, -1))
        strong = bool(categories_above(data, behaviour)[worst])
        found.append(_change_tile(f"worst: {data.categories[worst]}", start, end, data.unit, strong=strong))
    return element("div", *found, *_trust_tiles(data, behaviour), class_="tiles")


def _trust_tiles(data: RunData, behaviour: int) -> list[Html]:
    """How far policy and SAE may be believed."""
    quality = data.policy.quality[behaviour]
    found = [_tile("policy R², leave-one-out", fixed(quality.r2_loo), f"{fixed(quality.r2)} in sample")]
    checked, bad = missed(data)
    if checked:
        noun = "measurements" if data.audit else "windows"
        found.append(_tile("delta-FVU above 1", f"{len(bad)} of {len(checked)}", f"{noun}, at fixed gates"))
    return found


def _change_tile(title: str, start: float, end: float, unit: str, *, strong: bool = True) -> Html:
    note = f"{signed(end - start)} ({unit})" + ("" if strong else ", not above noise")
    return _tile(title, f"{fixed(start)} → {fixed(end)}", note, weak=not strong)


def _tile(title: str, value: str, note: str, *, weak: bool = False) -> Html:
    head = element("div", title, class_="quiet", title=title)
    return element("div", head, element("strong", value), element("div", note), class_="weak" if weak else None)


def run_facts(data: RunData, behaviour: int) -> list[tuple[str, object]]:
    """Where the run comes from, as names and values."""
    manifest, policy = data.store.manifest, data.policy
    quality = policy.quality[behaviour]
    sae, model = _mapping(manifest.get("sae")), _mapping(manifest.get("model"))
    return [
        ("run", _text(manifest.get("run_id"))),
        ("created", _text(manifest.get("created"))),
        ("model", f"{_text(model.get('id') or policy.model_id)} ({_text(model.get('class'))})"),
        *([("behaviour", PREFERENCE)] if manifest.get("scored_by") == "preference" else []),
        ("SAE", f"{_text(sae.get('id') or policy.sae_id)} ({_text(sae.get('architecture'))}, "
                f"{_text(sae.get('d_sae'))} features, at {_text(sae.get('hook_name'))})"),
        ("policy R²", f"{fixed(quality.r2)} in sample, {fixed(quality.r2_loo)} leave-one-out, "
                      f"10-fold {'not computed' if quality.r2_cv is None else fixed(quality.r2_cv)}"),
        ("policy", f"{count(len(policy.features), 'feature')}, λ = {number(policy.lam)}, "
                   f"{number(policy.edf)} effective degrees of freedom, condition {number(policy.condition, 2)}"),
        ("probes", f"{len(data.probes)} in {count(len(data.categories), 'category', 'categories')}"),
        *(_audit_facts(data) if data.audit else _step_facts(data)),
        ("pairs", attribution_sentence(data)),
        ("noise floor", _noise_fact(data)),
        ("hashes", _hashes(manifest, sae, model)),
        ("versions", ", ".join(f"{name} {each}" for name, each in _mapping(manifest.get("versions")).items() if each)),
    ]  # fmt: skip


def _noise_fact(data: RunData) -> str:
    if data.noise is None:
        return "not measured"
    steps = ", ".join(map(str, data.renewed))
    again = f"; measured again at step{'s' if len(data.renewed) > 1 else ''} {steps}" if steps else ""
    return f"from {count(data.noise.draws, 'random update')} at the start{again}"


def _step_facts(data: RunData) -> list[tuple[str, object]]:
    skipped = sum(len(window.skipped) for window in data.windows)
    unbooked = len(data.windows) - len(data.ok)
    return [
        ("steps", f"{data.steps[0]} to {data.windows[-1].step if data.windows else data.steps[0]}; "
                  f"{count(skipped, 'step')} skipped by the optimizer"),
        ("windows", f"{len(data.windows)}: {len(data.ok)} booked, {unbooked} not measured"),
    ]  # fmt: skip


def _audit_facts(data: RunData) -> list[tuple[str, object]]:
    """The audit's own settings, as its manifest has them; lists and what says nothing left out."""
    plain = {name: value for name, value in audit_facts(data).items() if isinstance(value, str | int | float)}
    seconds = sum(window.seconds for window in data.windows)
    settings = ", ".join(f"{name} {value}" for name, value in plain.items() if name != "pairs_hash")
    return [("audit", settings), ("measuring", f"{fixed(seconds, 1)} s")]


def attribution_sentence(data: RunData) -> str:
    """Whether the change was attributed to training pairs, and if not, why."""
    found, pairs = _mapping(data.store.manifest.get("attribution")), data.pairs
    if pairs is not None:
        return f"{count(int(pairs.known.sum()), 'pair')} with an account (engine {_text(found.get('engine'))})"
    if not found:
        return "not attributed"
    why = str(found.get("why") or "no reason is known").rstrip(".")
    if found.get("engine", "off") == "off":
        return f"not attributed: {why}"
    return unattributed_sentence(data.store.manifest, data.windows) or "no window has been attributed yet"


def _hashes(manifest: Mapping[str, Any], sae: Mapping[str, Any], model: Mapping[str, Any]) -> Html:
    found = {
        "probes": manifest.get("probe_hash"),
        "policy": manifest.get("policy_hash"),
        "SAE": sae.get("hash"),
        "model": model.get("hash"),
    }
    return join((join([f"{name} ", element("code", str(each)[:10])]) for name, each in found.items() if each), ", ")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return NONE if value is None else str(value)
