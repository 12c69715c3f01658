"""Does acting on the features that the policy names move refusal as it says? Ablate and scale them; measure; compare.

Per feature j and factor f the residual stream gets ``(f - 1) · x_j · d_j`` at the SAE's hook. The policy predicts
``(f - 1) · z_j · β_j`` of every probe, mean over a category; the model is run and says what happens. At the start and
at steps along a training, with the coefficients of the start and with those of the moment.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from transformers import TrainerCallback

from recipes.evidence.retrain import trl_trainer
from recipes.evidence.setups import Setup
from recipes.evidence_maths import correlation
from smda_callbacks.maths.account import mean_by_group
from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.observe.instrument import Instrument, arrays
from smda_callbacks.observe.intervention import Scaling, Where, read_edited
from smda_callbacks.records import PolicyRecord

Array = NDArray[np.float64]

FACTORS = (0.0, 0.5, 2.0)
WHERES: tuple[Where, ...] = ("last", "prompt")

#: A smaller predicted change of a category's mean says nothing about its sign: the report calls it none.
SAID = 0.005


@dataclass(frozen=True)
class Case:
    """One intervention: what the policy predicts and what came, ``[category]``.

    ``predicted_now``: with the coefficients refitted at this step. ``reencoded``: from what the SAE sees behind the
    edit, which the other features' encoders answer to as well. ``named``: the policy holds the feature; the others are
    controls of like size, for which it predicts nothing.
    """

    step: int
    where: Where
    factor: float
    features: tuple[int, ...]
    named: bool
    predicted: Array
    predicted_now: Array
    reencoded: Array
    measured: Array


# Measuring ------------------------------------------------------------------------------------------------------------


def intervene(
    model: Any,
    full: Instrument,
    policy: PolicyRecord,
    step: int,
    *,
    top: int,
    wheres: Sequence[Where] = WHERES,
    factors: Sequence[float] = FACTORS,
) -> Iterator[Case]:
    """Cases at this state of ``model``: the ``top`` features by |β|, several at once, and as many ablated controls."""
    narrow, groups = full.of_features(policy.features), full.probes.groups
    reading = full.read(model)
    pre, gate = arrays(reading)
    x, y = (pre * gate), full.scores(reading)
    z = x[:, policy.features] / policy.scale
    now = fit_ridge(x[:, policy.features], y, policy.lam, scale=policy.scale).coef[:, 0]
    start = policy.coef[:, 0]
    named = np.argsort(-np.abs(start), kind="stable")[:top]
    acts = [{int(policy.features[j]): f} for j in named for f in factors]
    for some in _sides(policy):
        acts += [dict.fromkeys(some, f) for f in factors]
    acts += [{other: 0.0} for other in controls(full, x, policy, named)]
    places = {int(feature): j for j, feature in enumerate(policy.features)}
    for where in wheres:
        for act in tqdm(acts, f"step {step}, {where}", unit="intervention", leave=False):
            seen = read_edited(model, narrow, Scaling(full.handle, act), where)
            mine, factor = [places[feature] for feature in act if feature in places], next(iter(act.values()))
            change = np.zeros_like(z)
            change[:, mine] = (factor - 1) * z[:, mine]
            after = np.prod(arrays(seen), axis=0) / policy.scale
            yield Case(
                step=step,
                where=where,
                factor=factor,
                features=tuple(act),
                named=bool(mine),
                predicted=mean_by_group(change @ start, groups),
                predicted_now=mean_by_group(change @ now, groups),
                reencoded=mean_by_group((after - z) @ now, groups),
                measured=mean_by_group(full.scores(seen)[:, 0] - y[:, 0], groups),
            )


def _sides(policy: PolicyRecord) -> list[list[int]]:
    """The policy's features of positive coefficient, those of negative, and all; where there are two or more."""
    raising = policy.coef[:, 0] > 0
    sides = [policy.features[raising].tolist(), policy.features[~raising].tolist(), policy.features.tolist()]
    return [side for side in sides if len(side) > 1]


def controls(full: Instrument, x: Array, policy: PolicyRecord, named: Sequence[int] | NDArray[np.int64]) -> list[int]:
    """For each feature in ``named`` (places in the policy) the one outside it that writes most nearly as much.

    As much: the root mean square over probes of what a feature adds to the stream, x times the norm of its direction.
    """
    sae = full.handle.sae
    scaled = sae.cfg.rescale_acts_by_decoder_norm if hasattr(sae.cfg, "rescale_acts_by_decoder_norm") else False
    norm = np.ones(x.shape[1]) if scaled else sae.W_dec.norm(dim=-1).detach().double().cpu().numpy()
    size = np.sqrt((x**2).mean(axis=0)) * norm
    free = set(range(x.shape[1])) - set(policy.features.tolist())
    found = []
    for j in named:
        nearest = min(free, key=lambda k: abs(size[k] - size[policy.features[j]]))
        free.remove(nearest)
        found.append(int(nearest))
    return found


# Along a training -----------------------------------------------------------------------------------------------------


def along(setup: Setup, steps: Sequence[int], measure: Callable[[Any, Any, int], None], *, order: int = 0) -> None:
    """Train as the setup says and call ``measure(model, tokenizer, step)`` after each of ``steps`` (0: before)."""
    with tempfile.TemporaryDirectory() as folder:
        trl_trainer(setup, order, Path(folder), [_At(steps, measure)]).train()


class _At(TrainerCallback):
    """Calls a function at some steps, the model in evaluation mode."""

    def __init__(self, steps: Sequence[int], measure: Callable[[Any, Any, int], None]) -> None:
        self._steps, self._measure = frozenset(steps), measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            self._measure(kwargs["model"], kwargs["processing_class"], state.global_step)


# Judging --------------------------------------------------------------------------------------------------------------


def judged(predicted: Array, measured: Array) -> dict[str, float | None]:
    """``[case, category]`` each: slope through zero of measured on predicted, r, rank correlation, right signs.

    ``right_sign``: share over the ``said`` cases with a predicted change above SAID; None where there is none.
    """
    a, b = predicted.ravel(), measured.ravel()
    said = np.abs(a) > SAID
    size = float((a**2).sum())
    varies = np.ptp(a) > 0 and np.ptp(b) > 0
    return {
        "slope": float((a * b).sum() / size) if size else None,
        "r": correlation(a, b),
        "rank_r": float(spearmanr(a, b).statistic) if varies else None,
        "right_sign": float(np.mean(np.sign(a[said]) == np.sign(b[said]))) if said.any() else None,
        "said": int(said.sum()),
        "cases": len(a),
    }


def table(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Rows by step, place and kind of act: single features by factor and together, all at once, and the controls."""
    rows = []
    for step in sorted({case.step for case in cases}):
        for where in dict.fromkeys(case.where for case in cases):
            here = [case for case in cases if (case.step, case.where) == (step, where)]
            single = [case for case in here if case.named and len(case.features) == 1]
            most = max(len(case.features) for case in here)
            kinds: Mapping[str, list[Case]] = {
                **{f"factor {f:g}": [case for case in single if case.factor == f] for f in FACTORS},
                "single features": single,
                "features of one sign at once": [case for case in here if 1 < len(case.features) < most],
                "all features at once": [case for case in here if 1 < len(case.features) == most],
            }
            control = [case for case in here if not case.named]
            for kind, some in kinds.items():
                if some:
                    rows.append({"step": step, "where": where, "kind": kind, **_row(some, control)})
    return rows


def _row(cases: Sequence[Case], control: Sequence[Case]) -> dict[str, Any]:
    measured = np.array([case.measured for case in cases])
    views = {
        name: judged(np.array([getattr(case, name) for case in cases]), measured)
        for name in ("predicted", "predicted_now", "reencoded")
    }
    same = [case for case in cases if case.factor == 0.0]
    moved, by_chance = (
        np.mean([np.abs(c.measured).mean() for c in some]) if some else None for some in (same, control)
    )
    return {**views, "ablated_moves": _float(moved), "control_moves": _float(by_chance)}


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
