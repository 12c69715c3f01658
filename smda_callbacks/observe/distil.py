"""Distil a behaviour into a closed-form ridge policy over SAE features (SMDA, arXiv 2606.29171)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from torch import nn

from smda_callbacks.maths.quality import category_quality, cv_r2
from smda_callbacks.maths.ridge import RidgeFit, diagnose, fit_ridge, lambda_grid, loo_path, predict
from smda_callbacks.maths.support import choose_support, feature_scale, strongest_keeping
from smda_callbacks.observe.activations import model_id
from smda_callbacks.observe.instrument import Instrument, arrays
from smda_callbacks.observe.labels import label_features
from smda_callbacks.observe.reading import Reading
from smda_callbacks.records import Array, PolicyQuality, PolicyRecord


@dataclass(frozen=True)
class DistilOptions:
    """How a policy is distilled.

    ``lam`` None: chosen by leave-one-out, the strongest penalty that gives up at most ``lam_tolerance`` of the best R².
    The defaults are those of ``recipes/EVIDENCE.md``: few features and a strong penalty make shifts reproducible.
    """

    support: int = 16
    min_active: int = 8
    lam: float | None = None
    lam_tolerance: float = 0.2
    cv_folds: int = 10
    seed: int = 0


def distil(
    instrument: Instrument, model: nn.Module, tokenizer: Any, options: DistilOptions
) -> tuple[PolicyRecord, Instrument, Reading]:
    """Read the whole dictionary once, choose the support, fit the policy.

    Returns:
        The policy, the instrument narrowed to its features, and the reading restricted to them (the baseline).

    Raises:
        ValueError: no feature is active often enough, a behaviour does not vary over the probes, or λ is out of range.
        NotFiniteError: the model's activations are not finite.
    """
    reading = instrument.read(model)
    pre, gate = arrays(reading)
    x, y = pre * gate, instrument.scores(reading)
    _check_varies(y, instrument.behaviours)
    features = choose_support(x, y, size=options.support, min_active=options.min_active)
    policy = fit_policy(x, y, features, instrument, options)
    policy = _identified(policy, instrument, model, tokenizer, x[:, features])
    narrowed = instrument.of_features(features)
    baseline = Reading(reading.hidden, reading.pre[:, features], reading.gate[:, features], reading.log_probs)
    return policy, narrowed, baseline


def _identified(
    policy: PolicyRecord, instrument: Instrument, model: nn.Module, tokenizer: Any, x: Array
) -> PolicyRecord:
    handle, probes = instrument.handle, instrument.probes
    return replace(
        policy,
        labels=label_features(handle, model, tokenizer, probes, policy.features, x, team=instrument.team),
        sae_id=handle.id,
        probe_hash=probes.hash,
        model_id=model_id(model),
    )


def fit_policy(
    x: Array, y: Array, features: np.ndarray, instrument: Instrument, options: DistilOptions
) -> PolicyRecord:
    """Fit on columns ``features`` of ``x [probe, sae feature]`` and report how far the policy may be believed."""
    chosen = x[:, features]
    scale = feature_scale(chosen)
    grid = loo_path(chosen, y, lambda_grid(), scale=scale)
    error = (grid.mse / y.var(axis=0)).mean(axis=1)
    lam = options.lam if options.lam is not None else strongest_keeping(grid.lams, error, options.lam_tolerance)
    fit = fit_ridge(chosen, y, lam, scale=scale)
    quality = diagnose(chosen, y, fit, scale=scale)
    probes = instrument.probes
    by_category = category_quality(y, quality.fitted, quality.loo, probes.groups, probes.categories)
    comply = [probe.expected == "comply" for probe in probes.probes]
    honest = honest_r2(x, y, probes.groups, options)
    return PolicyRecord(
        features=features,
        scale=scale,
        lam=lam,
        coef=fit.coef,
        intercept=fit.intercept,
        behaviours=instrument.behaviours,
        target=instrument.target,
        quality=tuple(
            PolicyQuality(float(quality.r2[m]), float(quality.r2_loo[m]), honest[m], by_category[m])
            for m in range(y.shape[1])
        ),
        edf=quality.edf,
        condition=quality.condition,
        route=fit.route,
        origin=(chosen[comply] / scale).mean(axis=0),
        lam_grid=tuple((float(a), float(b)) for a, b in zip(grid.lams, error, strict=True)),
    )


def honest_r2(x: Array, y: Array, groups: np.ndarray, options: DistilOptions) -> tuple[float | None, ...]:
    """R² per behaviour over folds that make every choice themselves: none has seen the probes it is judged on."""
    if options.cv_folds < 2:
        return (None,) * y.shape[1]
    often = x[:, (x > 0).sum(axis=0) >= options.min_active]  # the others can be in no fold's support

    def fit_fold(train: np.ndarray) -> Any:
        features = choose_support(often[train], y[train], size=options.support, min_active=options.min_active)
        chosen = often[:, features]
        scale = feature_scale(chosen[train])
        grid = loo_path(chosen[train], y[train], lambda_grid(), scale=scale)
        error = (grid.mse / y[train].var(axis=0)).mean(axis=1)
        lam = options.lam if options.lam is not None else strongest_keeping(grid.lams, error, options.lam_tolerance)
        fit: RidgeFit = fit_ridge(chosen[train], y[train], lam, scale=scale)
        return lambda rows: predict(chosen[rows], fit, scale=scale)

    scores = cv_r2(y, fit_fold, groups=groups, folds=min(options.cv_folds, len(y)), seed=options.seed)
    return tuple(cast(list[float], scores.tolist()))


def _check_varies(y: Array, behaviours: tuple[str, ...]) -> None:
    for name, column in zip(behaviours, y.T, strict=True):
        if np.ptp(column) < 1e-9:
            raise ValueError(
                f"behaviour {name!r} is the same ({column[0]:.3g}) on all {len(y)} probes: nothing to distil. Next "
                "step: smda check shows how this model opens its answers; add its openings to behaviour.refusals."
            )
