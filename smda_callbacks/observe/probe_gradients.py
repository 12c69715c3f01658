"""How the functionals of a snapshot change with the trained weights: gradients through one pass over the probes.

Behaviours of single probes are independent rows of a batch, so one backward pass per behaviour gives the gradient of
every probe's score, and with them those of all functionals that are sums over probes. Functionals of feature
activations need a backward pass each, from the SAE's hook downwards only.

With a team (DDP) every process does both for the batches that it reads, and the sums are added up on the main one;
what the others do is in :mod:`smda_callbacks.observe.gradient_share`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
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
from smda_callbacks.observe.reading import Part, Reading, Visitor, opening_log_probs, tree_in_one_pass
from smda_callbacks.observe.sharding import Command, Team
from smda_callbacks.records import Array

#: Per site the gradient of every functional, ``[functional, out * in]``.
Gradients = tuple[Tensor, ...]

#: Numbers of the probes of a batch, ``[row]``.
Rows = NDArray[np.int64]

#: Why a window has no gradients where memory does not suffice for them.
NO_ROOM = "out of memory for gradients through the probes. Next step: lower measure.batch_size"


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
        ProcessError: another process could not do its share.
        BrokenPassError: the processes' gradients could not be added up.
    """
    reading, basis = _read_with_basis(instrument, model, sites, functionals, scale)
    state = State(*arrays(reading), instrument.scores(reading))
    mix = torch.from_numpy(mixing(functionals, state, scale=scale, lam=lam))
    found = tuple(mix.to(each) @ each for each in basis)
    del basis  # as large as what was found, and the pass to come wants room
    slope = slopes(functionals, state, scale=scale, lam=lam).pre
    moving = [k for k in np.flatnonzero(np.abs(slope).sum(axis=(1, 2)) > 0).tolist() if k not in stale]
    _add_features(instrument, model, sites, slope[moving], [[total[k] for k in moving] for total in found])
    if last is not None:
        for new, old in zip(found, last, strict=True):
            new[list(stale)] = old[list(stale)]
    return reading, found


def _read_with_basis(
    instrument: Instrument, model: nn.Module, sites: tuple[LoraSite, ...], functionals: FunctionalSet, scale: Array
) -> tuple[Reading, list[Tensor]]:
    """A reading, and :func:`basis_visitor`'s basis over all probes, whichever process read them.

    Processes add up the basis and not the functionals, which are smaller by a sixth or so: how they are made of it
    takes the whole reading.
    """
    command = replace(instrument.command, what="gradients", functionals=functionals, scale=scale)
    with basis_visitor(instrument, sites, functionals, scale) as (visit, basis):
        reading = instrument.read(model, visit, command=command)
    _add_up(instrument.team, basis)
    return reading, basis


@contextlib.contextmanager
def basis_visitor(
    instrument: Instrument, sites: tuple[LoraSite, ...], functionals: FunctionalSet, scale: Array
) -> Iterator[tuple[Visitor, list[Tensor]]]:
    """Context with a visitor of batches, and per site the gradients of the functionals' basis that it adds up.

    Per site ``[basis, out * in]``; see :func:`~smda_callbacks.maths.local_slopes.local_slopes`.
    """

    def weigh(index: Rows, x: Array, y: Array) -> Array:
        return local_slopes(functionals, index, x, y, scale=scale)

    with _weighted_visitor(instrument, sites, basis_size(functionals), weigh) as found:
        yield found


def slope_gradients(instrument: Instrument, model: nn.Module, sites: tuple[LoraSite, ...], slopes: Slopes) -> Gradients:
    """Gradients by the trained weights of targets whose ``slopes`` at the model as it is are known, on this process.

    Leaves no trace in the model. Per site ``[target, out * in]`` float32 (float64 for such a model).
    """
    instrument = instrument.with_team(None)
    with _weighted_visitor(instrument, sites, len(slopes.y), lambda index, x, y: slopes.y[:, index]) as (visit, found):
        instrument.read(model, visit)
    moving = np.flatnonzero(np.abs(slopes.pre).sum(axis=(1, 2)) > 0).tolist()
    add_features(instrument, model, sites, slopes.pre[moving], [[total[k] for k in moving] for total in found])
    return tuple(found)


@contextlib.contextmanager
def _weighted_visitor(
    instrument: Instrument, sites: tuple[LoraSite, ...], count: int, weigh: Callable[[Rows, Array, Array], Array]
) -> Iterator[tuple[Visitor, list[Tensor]]]:
    """Context with a visitor of batches, and per site the sums ``[count, out * in]`` that it adds gradients up to.

    ``weigh``: of a batch's probe numbers, activations and scores, the weight of every score's gradient in every sum,
    ``[count, row, behaviour]``.
    """
    found = zeros(sites, count)
    weights = torch.zeros(0)

    def add(number: int, seen: Tensor, gradient: Tensor) -> None:
        found[number].addmm_(weights.to(found[number]), per_row(seen, gradient))

    def visit(batch: ProbeBatch, pre: Tensor, gate: Tensor, edges: Tensor) -> None:
        nonlocal weights
        y, scores = _scores(instrument, edges)
        local = weigh(batch.index.cpu().numpy(), (pre * gate).detach().double().cpu().numpy(), y)
        for m, each in enumerate(scores):
            weights = torch.from_numpy(np.ascontiguousarray(local[:, :, m])).to(found[0])  # once, not per site
            reached = tuple(sites[number] for number in tap.lowest) or sites
            _backward(each.sum(), reached, keep=m + 1 < len(scores))

    with tapped(sites, add) as tap:
        yield visit, found


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
    instrument: Instrument, model: nn.Module, sites: tuple[LoraSite, ...], slope: Array, rows: list[list[Tensor]]
) -> None:
    """Add what goes through pre-activations to ``rows``, as :func:`add_features`, with the help of all processes."""
    if not len(slope):
        return
    if instrument.team is None:
        add_features(instrument, model, sites, slope, rows)
        return

    def own() -> list[Part]:
        add_features(instrument, model, sites, slope, rows)
        return []

    instrument.team.read(replace(instrument.command, what="features", slope=slope), own)
    sums = [torch.stack(of_site) for of_site in rows]  # a message per site, not per row
    _add_up(instrument.team, sums)
    for of_site, total in zip(rows, sums, strict=True):
        for row, whole in zip(of_site, total, strict=True):
            row.copy_(whole)


def add_features(
    instrument: Instrument, model: nn.Module, sites: tuple[LoraSite, ...], slope: Array, rows: list[list[Tensor]]
) -> None:
    """Add what goes through pre-activations of this process's batches.

    ``slope [functional, probe, feature]``; ``rows``: per site and functional a tensor ``[out * in]``.
    """
    device = next(model.parameters()).device
    with measuring(model, gradients=True):
        saving = instrument.saving(model, gradients=True)
        for batch in instrument.share:
            stream = prompt_pass(model, batch.to(device), instrument.handle.site, saving)
            if not stream.requires_grad:  # the site lies below every trained weight: features never change
                return
            stream = stream[:, -1:] if instrument.readout == "last" else stream
            pre, _ = pool(*instrument.encode(stream), batch.span.to(device), instrument.readout)
            weights = torch.from_numpy(slope[:, batch.index.numpy()]).to(pre)
            values = torch.einsum("kif,if->k", weights, pre)
            for k, value in enumerate(values):
                gradients = _backward(value, sites, keep=k + 1 < len(values))
                for totals, gradient in zip(rows, gradients, strict=True):
                    if gradient is not None:
                        totals[k] += gradient.flatten()


def _add_up(team: Team | None, tensors: list[Tensor]) -> None:
    """Add what the processes hold up here; only called when all are known to have theirs."""
    if team is not None:
        team.tell(Command("sum"))
        team.add_up(tensors)


def _backward(value: Tensor, sites: tuple[LoraSite, ...], *, keep: bool) -> tuple[Tensor | None, ...]:
    """Gradients of ``value`` by the sites' weights; what training keeps in ``.grad`` is left alone."""
    weights = [site.weight for site in sites]
    return torch.autograd.grad(value, weights, retain_graph=keep, allow_unused=True)


def zeros(sites: tuple[LoraSite, ...], count: int) -> list[Tensor]:
    """Room for ``count`` gradients by every site's weight: ``[count, out * in]``, float32 or float64."""
    weights = [site.weight for site in sites]
    dtypes = [each.dtype if each.dtype in (torch.float32, torch.float64) else torch.float32 for each in weights]
    return [
        torch.zeros(count, each.numel(), dtype=dtype, device=each.device)
        for each, dtype in zip(weights, dtypes, strict=True)
    ]
