"""Everything that attribution needs, made before training: engine, functionals, hooks, and the table of pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from smda_callbacks.maths.functionals import FunctionalSet, functional_set, measured
from smda_callbacks.observe.batches import chat_prompt
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.lora import AttributionError, LoraSite, lora_sites
from smda_callbacks.observe.pair_gradients import PairCapture
from smda_callbacks.observe.pair_team import TeamCapture
from smda_callbacks.records import PolicyRecord
from smda_callbacks.training.attribution import Attributor
from smda_callbacks.training.engine import AttributionOptions, Choice, choose_engine
from smda_callbacks.training.exact import Exact
from smda_callbacks.training.ghost import Ghost
from smda_callbacks.training.row_identity import PairIndex, build_index, find_trainer, training_runs


@dataclass(frozen=True)
class Trainer:
    """What the trainer hands to a callback at the start, as far as pairs are concerned."""

    args: Any
    optimizer: Any
    train_dataloader: Any
    tokenizer: Any

    @property
    def columns(self) -> list[str] | None:
        """Columns of the prepared data set; None where it does not say."""
        return getattr(getattr(self.train_dataloader, "dataset", None), "column_names", None)


@dataclass(frozen=True)
class Attribution:
    """The attribution of a run. ``attributor`` is None where ``choice.engine`` is off."""

    choice: Choice
    attributor: Attributor | None
    manifest: Mapping[str, Any]


def start_attribution(
    options: AttributionOptions,
    trainer: Trainer,
    model: nn.Module,
    instrument: Instrument,
    policy: PolicyRecord,
    *,
    user_dataset: Any = None,
    every: int = 1,
) -> Attribution:
    """Choose the engine and build what it needs.

    Raises:
        AttributionError: the engine that was asked for by name cannot be right here.
    """
    choice = choose_engine(
        options, model, trainer.optimizer, trainer.args, trainer.columns, instrument.handle.site, every
    )
    if choice.engine == "off":
        return Attribution(choice, None, {"engine": "off", "why": choice.why, "functionals": []})
    functionals = functionals_of(instrument, policy, options.features, exact=choice.engine == "exact")
    sites = lora_sites(model)
    index = pair_index(trainer, options, user_dataset)
    engine: Ghost | Exact
    if choice.engine == "ghost":
        engine = Ghost(
            instrument,
            sites,
            functionals,
            policy,
            carry=options.momentum == "carry",
            limit=options.limit,
            renew=options.renew,
        )
    else:
        engine = Exact(instrument, sites, partial(measured, functionals, scale=policy.scale, lam=policy.lam))
    own = make_capture(model, sites, instrument, options, trainer.tokenizer, training=training_runs())
    capture = own if instrument.team is None else TeamCapture(own, instrument.team)
    attributor = Attributor(
        engine,
        options,
        instrument,
        policy,
        functionals,
        sites,
        capture,
        index,
        float(trainer.args.max_grad_norm or 0.0),
    )
    return Attribution(choice, attributor, _manifest(options, choice, functionals, index))


def make_capture(
    model: nn.Module,
    sites: tuple[LoraSite, ...],
    instrument: Instrument,
    options: AttributionOptions,
    tokenizer: Any,
    *,
    training: Callable[[], bool],
) -> PairCapture:
    """What sees the examples of this process."""
    return PairCapture(
        model,
        sites,
        site=instrument.handle.site,
        readout=instrument.readout,
        limit=options.limit,
        marker=prompt_marker(tokenizer),
        training=training,
    )


def functionals_of(
    instrument: Instrument, policy: PolicyRecord, features: int | tuple[int, ...] | None, *, exact: bool
) -> FunctionalSet:
    """The functionals of a run: behaviours of all groups, and the coefficients of attributed features.

    ``features``: how many, the largest coefficients first, or which SAE indices. None takes all, and so does a number
    where the engine is exact, to which features cost nothing.

    Raises:
        AttributionError: a feature is not in the policy; names those that are.
    """
    chosen = _chosen(policy, None if exact and isinstance(features, int) else features)
    probes = instrument.probes.probes
    categories = list(dict.fromkeys(probe.category for probe in probes))
    expected = {probe.category: probe.expected for probe in probes}
    return functional_set(
        behaviours=policy.behaviours,
        categories=categories,
        refuse=[expected[name] == "refuse" for name in categories],
        groups=instrument.probes.groups,
        features=policy.features.tolist(),
        attributed=chosen,
        target=policy.target,
        gating=exact,
    )


def _chosen(policy: PolicyRecord, features: int | tuple[int, ...] | None) -> list[int]:
    """Positions of the attributed features in the policy."""
    known = policy.features.tolist()
    if features is None:
        return list(range(len(known)))
    if isinstance(features, int):
        order = np.argsort(-np.abs(policy.coef).sum(axis=1), kind="stable")
        return sorted(order[:features].tolist())
    missing = [feature for feature in features if feature not in known]
    if missing:
        raise AttributionError(
            f"attribution.features names {', '.join(map(str, missing))}, which the policy does not hold. Allowed: "
            f"{', '.join(map(str, known))}. Next step: name some of these, or a number of features."
        )
    return sorted(known.index(feature) for feature in dict.fromkeys(features))


def prompt_marker(tokenizer: Any) -> tuple[int, ...] | None:
    """The tokens that the chat template puts where an answer begins; None where there are none of its own."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        asked = chat_prompt(tokenizer, "x")
        told = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except Exception:  # a template may refuse anything; then prompts are known from labels alone
        return None
    marker = asked.removeprefix(told) if asked.startswith(told) else ""
    return tuple(tokenizer(marker, add_special_tokens=False)["input_ids"]) or None


def pair_index(trainer: Trainer, options: AttributionOptions, user_dataset: Any) -> PairIndex:
    """The numbers of the pairs of a run."""
    found = find_trainer()
    return build_index(
        trainer.train_dataloader.dataset,
        tokenizer=trainer.tokenizer,
        trainer_dataset=getattr(found, "train_dataset", None),
        user_dataset=user_dataset,
        text=options.text,
        id_column=options.id_column,
    )


def _manifest(
    options: AttributionOptions, choice: Choice, functionals: FunctionalSet, index: PairIndex
) -> dict[str, Any]:
    carried = options.momentum if choice.engine == "ghost" else "line"
    return {
        "engine": choice.engine,
        "why": choice.why,
        "functionals": list(functionals.names),
        "every": options.every,
        "momentum": carried,
        "level": index.level,
        "text": options.text,
        "notes": [index.note] if index.note else [],
    }
