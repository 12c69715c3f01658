"""How the functionals of a snapshot change with the trained weights: gradients through one pass over the probes.

Behaviours of single probes are independent rows of a batch, so one backward pass per behaviour gives the gradient of
every probe's score, and with them those of all functionals that are sums over probes. Functionals of feature
activations need a backward pass each, from the SAE's hook downwards only.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, nn

from smda_callbacks.maths.functionals import FunctionalSet, Slopes, slopes
from smda_callbacks.maths.local_slopes import basis_size, local_slopes, mixing
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.batches import ProbeBatch
from smda_callbacks.observe.behaviour import score, score_slopes
from smda_callbacks.observe.features import pool
from smda_callbacks.observe.guard import measuring
from smda_callbacks.observe.instrument import Instrument, arrays
from smda_callbacks.observe.lora import AttributionError, LoraSite, per_row, tapped
from smda_callbacks.observe.passes import prompt_pass
from smda_callbacks.observe.reading import Reading, opening_log_probs, tree_in_one_pass
from smda_callbacks.records import Array

#: Per site the gradient of every functional, ``[functional, out * in]``.
Gradients = tuple[Tensor, ...]


def check_differentiable(model: nn.Module) -> None:
    """Refuse an attention implementation through which probes are read in several passes.

    Raises:
        AttributionError: says what to set.
    """
    if not tree_in_one_pass(model):
        raise AttributionError(
            "the model's attention takes no masks of our own, so probes are read through a key-value cache, which "
            "gradients are not taken through. Allowed for engine ghost: attn_implementation sdpa or eager. Next step: "
            "load the model with one of these, or set attribution.engine: exact or off."
        )


def gradient_reading(
    instrument: Instrument,
    model: nn.Module,
    sites: tuple[LoraSite, ...],
    functionals: FunctionalSet,
    *,
    scale: Array,
    lam: float,
    last: Gradients | None = None,
    stale: Collection[int] = (),
) -> tuple[Reading, Gradients]:
    """A reading, and the gradients of functionals by the trained weights at the model as it is now.

    The reading is the one that :meth:`Instrument.read` gives, and the pass is the same: gradients of scores are taken
    batch by batch on the way. Leaves no trace in the model, ``.grad`` included.

    Args:
        last, stale: gradients of an earlier reading, and the functionals to take over from there.

    Returns:
        The reading, and per site ``[functional, out * in]`` float32 on the model's device (float64 for such a model).

    Raises:
        NotFiniteError: as for any reading.
    """
    basis = [_zeros(site.weight, basis_size(functionals)) for site in sites]
    weights = torch.zeros(0)

    def add(number: int, seen: Tensor, gradient: Tensor) -> None:
        basis[number].addmm_(weights.to(basis[number]), per_row(seen, gradient))

    def visit(batch: ProbeBatch, pre: Tensor, gate: Tensor, edges: Tensor) -> None:
        nonlocal weights
        y, scores = _scores(instrument, edges)
        x = (pre * gate).detach().double().cpu().numpy()
        local = local_slopes(functionals, batch.index.cpu().numpy(), x, y, scale=scale)
        for m, each in enumerate(scores):
            weights = torch.from_numpy(np.ascontiguousarray(local[:, :, m])).to(basis[0])  # once, not per site
            reached = tuple(sites[number] for number in tap.lowest) or sites
            _backward(each.sum(), reached, keep=m + 1 < len(scores))

    with tapped(sites, add) as tap:
        reading = instrument.read(model, visit)
    state = State(*arrays(reading), instrument.scores(reading))
    mix = torch.from_numpy(mixing(functionals, state, scale=scale, lam=lam))
    found = [mix.to(each) @ each for each in basis]
    slope = slopes(functionals, state, scale=scale, lam=lam).pre
    moving = [k for k in np.flatnonzero(np.abs(slope).sum(axis=(1, 2)) > 0).tolist() if k not in stale]
    _add_features(instrument, model, sites, slope, moving, found)
    if last is not None:
        for new, old in zip(found, last, strict=True):
            new[list(stale)] = old[list(stale)]
    return reading, tuple(found)


def slope_gradients(instrument: Instrument, model: nn.Module, sites: tuple[LoraSite, ...], slopes: Slopes) -> Gradients:
    """Gradients by the trained weights of targets whose ``slopes`` at the model as it is are known.

    Leaves no trace in the model. Per site ``[target, out * in]`` float32 (float64 for such a model).
    """
    found = [_zeros(site.weight, len(slopes.y)) for site in sites]
    weights = torch.zeros(0)

    def add(number: int, seen: Tensor, gradient: Tensor) -> None:
        found[number].addmm_(weights.to(found[number]), per_row(seen, gradient))

    def visit(batch: ProbeBatch, pre: Tensor, gate: Tensor, edges: Tensor) -> None:
        nonlocal weights
        _, scores = _scores(instrument, edges)
        for m, each in enumerate(scores):
            weights = torch.from_numpy(np.ascontiguousarray(slopes.y[:, batch.index.cpu().numpy(), m])).to(found[0])
            reached = tuple(sites[number] for number in tap.lowest) or sites
            _backward(each.sum(), reached, keep=m + 1 < len(scores))

    with tapped(sites, add) as tap:
        instrument.read(model, visit)
    moving = np.flatnonzero(np.abs(slopes.pre).sum(axis=(1, 2)) > 0).tolist()
    _add_features(instrument, model, sites, slopes.pre, moving, found)
    return tuple(found)


def _scores(instrument: Instrument, edges: Tensor) -> tuple[Array, list[Tensor]]:
    """Scores ``[row, behaviour]``, and per behaviour a tensor ``[row]`` whose derivative is that of the score."""
    batches, given = instrument.batches, (instrument.scorers, instrument.batches.tree)
    log_probs = opening_log_probs(edges.detach().double().cpu().numpy(), batches)
    slope = score_slopes(*given, log_probs, instrument.target)
    paths = np.zeros((len(batches.tree.paths), edges.shape[1]))
    for opening, path in enumerate(batches.tree.paths):
        paths[opening, list(path)] = 1.0
    weights = torch.from_numpy(slope @ paths).to(edges)  # [row, behaviour, edge]
    # An opening of probability zero has slope zero; its log-probability of -inf must not make that NaN.
    finite = torch.where(torch.isfinite(edges), edges, 0.0)
    surrogates = [(weights[:, m] * finite).sum(dim=1) for m in range(weights.shape[1])]
    return score(*given, log_probs, instrument.target), surrogates


def _add_features(
    instrument: Instrument,
    model: nn.Module,
    sites: tuple[LoraSite, ...],
    slope: Array,
    moving: list[int],
    found: list[Tensor],
) -> None:
    """Add what goes through pre-activations, for the functionals ``moving``. ``slope [functional, probe, feature]``."""
    if not moving:
        return
    device = next(model.parameters()).device
    with measuring(model, gradients=True):
        saving = instrument.saving(model, gradients=True)
        for batch in instrument.batches.batches:
            stream = prompt_pass(model, batch.to(device), instrument.handle.site, saving)
            if not stream.requires_grad:  # the site lies below every trained weight: features never change
                return
            stream = stream[:, -1:] if instrument.readout == "last" else stream
            pre, _ = pool(*instrument.encode(stream), batch.span.to(device), instrument.readout)
            weights = torch.from_numpy(slope[moving][:, batch.index.numpy()]).to(pre)
            values = torch.einsum("kif,if->k", weights, pre)
            for place, k in enumerate(moving):
                gradients = _backward(values[place], sites, keep=place + 1 < len(moving))
                for total, gradient in zip(found, gradients, strict=True):
                    if gradient is not None:
                        total[k] += gradient.flatten()


def _backward(value: Tensor, sites: tuple[LoraSite, ...], *, keep: bool) -> tuple[Tensor | None, ...]:
    """Gradients of ``value`` by the sites' weights; what training keeps in ``.grad`` is left alone."""
    weights = [site.weight for site in sites]
    return torch.autograd.grad(value, weights, retain_graph=keep, allow_unused=True)


def _zeros(weight: Tensor, functionals: int) -> Tensor:
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.zeros(functionals, weight.numel(), dtype=dtype, device=weight.device)
