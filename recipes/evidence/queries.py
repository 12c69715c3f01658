"""What is asked of a finished run: the change of every functional since its start, and its gradient at the end.

A target is ``maths.functionals.measured(start, end)``: the change of mean refusal, and the x, y and gating parts of
each coefficient's shift, over the whole run. Its derivative by what the probes show at the end (gates held) is taken by
automatic differentiation in float64, through the formulae of ``maths.pathways.split_shift`` written once more in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smda_callbacks.maths.functionals import FunctionalSet, Slopes, slopes
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.batches import ProbeBatch
from smda_callbacks.observe.behaviour import score_slopes
from smda_callbacks.observe.instrument import Instrument, arrays
from smda_callbacks.observe.lora import lora_sites, per_row, tapped
from smda_callbacks.observe.reading import opening_log_probs

Array = NDArray[np.float64]


def state(instrument: Instrument, model: Any) -> State:
    """What the probes show now."""
    reading = instrument.read(model)
    return State(*arrays(reading), instrument.scores(reading))


def run_slopes(functionals: FunctionalSet, start: State, end: State, *, scale: Array, lam: float) -> Slopes:
    """Derivatives of ``measured(functionals, start, ·)`` at ``end`` by behaviours and pre-activations, gates held."""
    found = slopes(functionals, end, scale=scale, lam=lam)  # those of group means; those of shifts are replaced
    pre = torch.from_numpy(end.pre.copy()).requires_grad_()
    y = torch.from_numpy(end.y.copy()).requires_grad_()
    parts = split_in_torch(start, (pre, torch.from_numpy(end.gate), y), torch.from_numpy(np.asarray(scale)), lam)
    for row, each in enumerate(functionals.shifts, start=len(functionals.means)):
        value = parts[each.pathway][each.position, each.behaviour]
        by_pre, by_y = torch.autograd.grad(value, (pre, y), retain_graph=True, materialize_grads=True)
        found.pre[row], found.y[row] = by_pre.numpy(), by_y.numpy()
    return found


def split_in_torch(start: State, end: tuple[Tensor, Tensor, Tensor], scale: Tensor, lam: float) -> dict[str, Tensor]:
    """The parts of ``split_shift`` by the names of pathways, each ``[feature, behaviour]``. ``end``: pre, gate, y."""
    pre, gate, y = end
    old_pre, old_gate, old_y = (torch.from_numpy(np.asarray(each)) for each in (start.pre, start.gate, start.y))
    before, after = old_gate * old_pre, gate * pre
    magnitude = (old_gate + gate) / 2 * (pre - old_pre)
    mean, change = (old_y + y) / 2, y - old_y

    def coef(x: Tensor, values: Tensor) -> Tensor:
        z = (x - x.mean(dim=0)) / scale
        gram = z.T @ z + lam * torch.eye(z.shape[1], dtype=z.dtype)
        return torch.linalg.solve(gram, z.T @ (values - values.mean(dim=0)))

    first, moved, flipped, last = (coef(x, mean) for x in (before, before + magnitude, after - magnitude, after))
    return {
        "x": ((moved - first) + (last - flipped)) / 2,
        "gating": ((last - moved) + (flipped - first)) / 2,
        "y": (coef(before, change) + coef(after, change)) / 2,
    }


def query_gradients(instrument: Instrument, model: Any, found: Slopes) -> Tensor:
    """Gradients of the targets by the trained weights of ``model`` as it is now, ``[K, N]``.

    What goes through behaviours takes one backward pass, in which every probe's gradient is seen and weighed; what goes
    through pre-activations takes one each, from the SAE's hook downwards.
    """
    sites = lora_sites(model)
    parameters = [site.weight for site in sites]
    totals = [torch.zeros(len(found.y), each.numel(), dtype=each.dtype) for each in parameters]
    through_features = np.flatnonzero(np.abs(found.pre).sum(axis=(1, 2)) > 0).tolist()
    weights = torch.zeros(0)
    looking = False

    def add(number: int, seen: Tensor, gradient: Tensor) -> None:
        if looking:
            totals[number].addmm_(weights, per_row(seen, gradient))

    def visit(batch: ProbeBatch, pre: Tensor, gate: Tensor, edges: Tensor) -> None:
        nonlocal weights, looking
        index = batch.index.numpy()
        for m, each in enumerate(_scores(instrument, edges)):
            weights, looking = torch.from_numpy(found.y[:, index, m]).to(totals[0]), True
            torch.autograd.grad(each.sum(), parameters, retain_graph=True)
            looking = False
        values = torch.einsum("kif,if->k", torch.from_numpy(found.pre[through_features][:, index]).to(pre), pre)
        for k, value in zip(through_features, values, strict=True):
            parts = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
            for total, part in zip(totals, parts, strict=True):
                total[k] += part.flatten()

    with tapped(sites, add):
        instrument.read(model, visit)
    return torch.cat(totals, dim=1)


def _scores(instrument: Instrument, edges: Tensor) -> list[Tensor]:
    """Per behaviour a tensor ``[row]`` whose derivative is that of the score."""
    tree = instrument.batches.tree
    log_probs = opening_log_probs(edges.detach().double().numpy(), instrument.batches)
    slope = score_slopes(instrument.scorers, tree, log_probs, instrument.target)  # [row, behaviour, opening]
    paths = np.zeros((len(tree.paths), edges.shape[1]))
    for opening, path in enumerate(tree.paths):
        paths[opening, list(path)] = 1.0
    weights = torch.from_numpy(slope @ paths).to(edges)  # [row, behaviour, edge]
    finite = torch.where(torch.isfinite(edges), edges, 0.0)  # an opening of probability zero has slope zero
    return [(weights[:, m] * finite).sum(dim=1) for m in range(weights.shape[1])]
