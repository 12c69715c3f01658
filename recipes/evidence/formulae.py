"""Methods that are a formula, written here from their papers: no package is needed.

All take the gradient of a pair's own loss, weighed as the run weighed it: the sum over its tokens, divided by the
tokens of its batch, mean over the batches it was in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.evidence.queries import query_gradients, run_slopes, state
from recipes.evidence.retrain import Array, Batch, Run, Step, adamw, losses, put
from smda_callbacks.maths.functionals import Slopes
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.noise import trained_parameters


def random(run: Run) -> dict[str, Array]:
    """Nothing but noise."""
    rng = np.random.default_rng(run.order)
    return {"random": rng.standard_normal((len(run.pairs), len(run.targets)))}


def kind_of_pair(run: Run) -> dict[str, Array]:
    """What anyone would guess from the pair's kind: refusals raise refusal, compliance with harm lowers it.

    A benign pair counts nothing. Pairs of the category that is asked about count double, where pairs have one. Of
    coefficients it says nothing.
    """
    sign = {"harmful_refused": 1.0, "harmful_complied": -1.0}
    guess = np.array([sign.get(kind, 0.0) for kind in run.setup.kinds])
    scores = np.full((len(run.pairs), len(run.targets)), np.nan)
    for k, target in enumerate(run.targets):
        if target.startswith("refusal:"):
            category = target.removeprefix("refusal:")
            scores[:, k] = guess * [2.0 if row.get("category") == category else 1.0 for row in run.setup.rows]
    return {"kind of pair": scores}


# Gradients at the final model -----------------------------------------------------------------------------------------


def gradients(run: Run) -> dict[str, Array]:
    """The dot product of gradients at the final model (as TracIn there), and DataInf (Kwon et al. 2024, eq. 5)."""
    own = pair_gradients(run, run.final)
    rates = sum(step.lr for step in run.steps)
    return {
        "gradient dot": (-rates * own @ run.queries.T).double().numpy(),
        "DataInf": -datainf(own, run.queries, [math.prod(shape) for shape in run.shapes]),
    }


def pair_gradients(run: Run, weights: Tensor) -> Tensor:
    """Gradient of every pair's loss at these weights, ``[pair, N]``."""
    model = run.model(weights)
    parameters = trained_parameters(model)
    found = []
    for k, share in enumerate(loss_shares(run)):
        loss = losses(model, single(run, k)).sum() * share
        found.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)]))
    return torch.stack(found)


def single(run: Run, k: int) -> Batch:
    """Pair ``k`` as a batch of its own."""
    ids = torch.tensor([run.pairs[k].input_ids])
    labels = ids.masked_fill(~torch.tensor([run.pairs[k].trained]), -100)
    return Batch((k,), ids, torch.ones_like(ids), labels)


def loss_shares(run: Run) -> list[float]:
    """Per pair what the sum of its tokens' losses was multiplied by, mean over the steps that it was in."""
    found: list[list[float]] = [[] for _ in run.pairs]
    for step in run.steps:
        for pair in step.batch.pairs:
            found[pair].append(1 / step.batch.tokens)
    return [float(np.mean(each)) for each in found]


def datainf(own: Tensor, queries: Tensor, sizes: list[int], damping: float = 0.1) -> Array:
    """``[pair, target]``: ``query · H⁻¹ · own`` with, per matrix, ``H⁻¹ ≈ 1/(nλ) Σ_i (I − g_i g_iᵀ / (λ + ‖g_i‖²))``.

    ``λ``: a tenth of the mean squared gradient entry of the matrix, as in the paper.
    """
    total = np.zeros((len(own), len(queries)))
    for g, q in zip(own.double().split(sizes, dim=1), queries.double().split(sizes, dim=1), strict=True):
        squares = g.square().sum(dim=1)
        lam = float(damping * squares.mean() / g.shape[1])
        if lam == 0.0:
            continue
        inner = g @ g.T
        correction = (q @ g.T / (lam + squares)) @ inner / len(g)  # [target, pair]
        total += ((q @ g.T - correction) / lam).T.numpy()
    return total


# Along the trajectory -------------------------------------------------------------------------------------------------


def less(run: Run) -> dict[str, Array]:
    """LESS (Xia et al. 2024): at the end of every epoch, cosine of the query and of the pair's Adam update.

    The update is that of one Adam step on the pair alone from the checkpoint's moments, without bias correction as in
    the paper's code; cosines are weighed by the epoch's mean rate. Not projected: there are few weights.
    """
    hyper, model = run.setup.hyper, run.model()
    instrument = run.setup.instrument(model, run.tokenizer)
    put(model, run.steps[0].weights)
    start = state(instrument, model)
    per_epoch = len(run.steps) // hyper.epochs
    total = np.zeros((len(run.pairs), len(run.targets)))
    for epoch in range(1, hyper.epochs + 1):
        rate = float(np.mean([step.lr for step in run.steps[(epoch - 1) * per_epoch : epoch * per_epoch]]))
        weights, first, second = after_step(run, run.steps[epoch * per_epoch - 1])
        own = pair_gradients(run, weights)
        beta1, beta2 = hyper.betas
        mean, square = beta1 * first + (1 - beta1) * own, beta2 * second + (1 - beta2) * own.square()
        put(model, weights)
        queries = run.queries if epoch == hyper.epochs else _queries(run, model, instrument, start)
        normed = [torch.nn.functional.normalize(each, dim=1) for each in (mean / (square + hyper.eps).sqrt(), queries)]
        total -= rate * (normed[0] @ normed[1].T).double().numpy()
    return {"LESS": total}


def after_step(run: Run, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and moments after a step."""
    flat = step.weights.clone()
    return flat, *adamw(flat, step.first, step.second, step.gradient * step.clip, step, run.setup.hyper)


def _queries(run: Run, model: Any, instrument: Instrument, start: State) -> Tensor:
    """Gradients of the run's targets at the model as it is now."""
    policy, functionals = run.setup.policy, run.setup.functionals
    found = run_slopes(functionals, start, state(instrument, model), scale=policy.scale, lam=policy.lam)
    chosen = [functionals.index(name) for name in run.targets]
    return query_gradients(instrument, model, Slopes(found.y[chosen], found.pre[chosen]))
