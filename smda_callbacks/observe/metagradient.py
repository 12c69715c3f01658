"""What every training example did to the end of a run: the run's own steps, backwards.

A training is a function of the weights ``w_p`` that its examples have in the loss; all of them were 1. The derivative
of a target at the final weights by ``w_p`` is the influence of the example: first order in leaving it out, exact in all
that follows, momentum and second moments, clipping, weight decay, and what the change does to every later gradient.
With bars for the derivative of a target by a quantity, a step ``g = Σ_p w_p ∇l_p(θ)``, clipped, then the optimizer, is
gone through backwards (reverse-mode differentiation through training: Maclaurin et al. 2015, Engstrom et al. 2025)::

    (θ̄', m̄', v̄')  →  the optimizer's rule  →  (θ̄, m̄, v̄) and the clipped gradient's  →  clipping  →  ḡ
    w̄_p = ∇l_p · ḡ,        θ̄ += (∂g/∂θ) ḡ        both from one backward pass through the backward pass of Σ_p w_p l_p

Where an example comes in several steps, the influence of the example is the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smda_callbacks.observe.guard import weights_restored
from smda_callbacks.observe.optimizer_rules import Moments, Rule

#: Losses ``[example]`` of a micro-batch at the weights as they are, so that their sum over all micro-batches is the
#: loss of the step, denominators included. Called once or twice per micro-batch; with dropout it must draw the same
#: masks every time.
Losses = Callable[[Any], Tensor]


@dataclass(frozen=True)
class TrajectoryStep:
    """One optimizer step of a run, and where it started.

    ``before`` and ``rules`` per weight, the tensors flat or in the weight's shape. ``max_norm``: what gradients were
    clipped to; 0 or infinite: not at all. ``batches``: the micro-batches, anything that the losses are computed from.
    """

    number: int  # from 1
    before: tuple[Moments, ...]
    rules: tuple[Rule, ...]
    max_norm: float
    batches: tuple[Any, ...]


@dataclass(frozen=True)
class Adjoint:
    """Derivatives of targets by the run's state after ``step`` optimizer steps; per weight, ``[target, out * in]``."""

    step: int
    sites: tuple[Moments, ...]


@dataclass(frozen=True)
class StepInfluence:
    """What the examples of step ``number`` did to the targets, and where the way back goes on.

    ``scores`` ``[example, target]`` float64, examples in the order of the micro-batches. With the example minus without
    it. ``adjoint``: at the state before the step.
    """

    number: int
    scores: Tensor
    adjoint: Adjoint


def influence(
    steps: Iterable[TrajectoryStep],
    end: Adjoint | Sequence[Tensor],
    losses: Losses,
    parameters: Sequence[Tensor],
    *,
    place: Callable[[TrajectoryStep], None] | None = None,
    at_once: int = 4,
) -> Iterator[StepInfluence]:
    """Go back through a run, step by step.

    Between two results the weights are those of the last step; at the end, or on closing the iterator, they are what
    they were. Computed in the precision of the weights; ``end`` has its own, and keeps it.

    Args:
        steps: the last one first, none left out.
        end: gradients of the targets at the final weights, per weight ``[target, out * in]``; or where an earlier call
            had come to.
        parameters: the trained weights, in the order of ``before`` and ``rules``.
        place: puts the weights of a step in place where copying them to ``parameters`` is not all that is needed.
        at_once: targets per backward pass (vectorised; memory grows with it); 1 does without ``vmap``.

    Raises:
        ValueError: a step is missing, or tensors are not of the parameters' sizes.
    """
    parameters = list(parameters)
    adjoint = _on(parameters[0].device, end) if isinstance(end, Adjoint) else None
    with weights_restored(parameters):
        for step in steps:
            if adjoint is None:
                sites = tuple(Moments(each.detach(), None, None) for each in _tensors(end))
                adjoint = _on(parameters[0].device, Adjoint(step.number, sites))
            _check(step, adjoint, parameters)
            (place or _placer(parameters))(step)
            scores, adjoint = _back(step, adjoint, losses, parameters, at_once)
            yield StepInfluence(step.number, scores, adjoint)


def step_gradient(batches: Iterable[Any], losses: Losses, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradient of a step's loss at the weights as they are, before clipping, per weight ``[out * in]``."""
    total = [torch.zeros_like(each).flatten() for each in parameters]
    for batch in batches:
        for place, each in enumerate(_first_order(batch, losses, parameters, graph=False)[1]):
            total[place] += each.flatten()
    return tuple(total)


def _back(
    step: TrajectoryStep, adjoint: Adjoint, losses: Losses, parameters: list[Tensor], at_once: int
) -> tuple[Tensor, Adjoint]:
    single = _first_order(step.batches[0], losses, parameters, graph=True) if len(step.batches) == 1 else None
    if single is not None:
        gradient = tuple(each.detach().flatten() for each in single[1])
    else:  # the whole gradient is needed before any part of it can be gone back through
        gradient = step_gradient(step.batches, losses, parameters)
    coefficient = _clip_coefficient(gradient, step.max_norm)
    stepped = [
        rule.adjoint(_flat(before), (coefficient * each).to(after.weight), after)
        for rule, before, each, after in zip(step.rules, step.before, gradient, adjoint.sites, strict=True)
    ]
    by_gradient = _unclipped(gradient, [each for _, each in stepped], step.max_norm)
    sites = [site for site, _ in stepped]
    scores = []
    for batch in step.batches:
        weights, first = single or _first_order(batch, losses, parameters, graph=True)
        score, by_weight = _second_order(weights, first, parameters, by_gradient, at_once)
        scores.append(score)
        sites = [Moments(s.weight + more, s.first, s.second) for s, more in zip(sites, by_weight, strict=True)]
    return torch.cat(scores), Adjoint(step.number - 1, tuple(sites))


def _first_order(
    batch: Any, losses: Losses, parameters: Sequence[Tensor], *, graph: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The examples' weights, all 1, and the gradient of the weighted loss by the parameters, in their shapes."""
    # The fused kernels of attention have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        each = losses(batch)
        weights = torch.ones_like(each, requires_grad=True)
        found = torch.autograd.grad(weights @ each, parameters, create_graph=graph, materialize_grads=True)
    return weights, found


def _second_order(
    weights: Tensor, first: Sequence[Tensor], parameters: list[Tensor], by_gradient: list[Tensor], at_once: int
) -> tuple[Tensor, list[Tensor]]:
    """``[example, target]``, and per weight ``[target, out * in]``: the adjoint of the gradient, pulled back."""
    known = [place for place, each in enumerate(first) if each.requires_grad]
    outputs = [first[place] for place in known]
    scores: list[Tensor] = []
    pulled: list[list[Tensor]] = [[] for _ in parameters]
    for start in range(0, len(by_gradient[0]), at_once):
        chunk = slice(start, start + at_once)
        given = [by_gradient[p][chunk].reshape(-1, *first[p].shape).to(first[p]) for p in known]
        score, *found = _pull(outputs, [weights, *parameters], given, batched=at_once > 1)
        scores.append(score.double())
        for place, each in enumerate(found):
            pulled[place].append(each.flatten(1).to(by_gradient[place]))
    return torch.cat(scores).T, [torch.cat(each) for each in pulled]


def _pull(outputs: list[Tensor], inputs: list[Tensor], given: list[Tensor], *, batched: bool) -> tuple[Tensor, ...]:
    """Vector-Jacobian products for several vectors, ``[target, ...]`` per input."""
    if batched:
        return torch.autograd.grad(
            outputs, inputs, given, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
    rows = [
        torch.autograd.grad(outputs, inputs, list(row), retain_graph=True, materialize_grads=True)
        for row in zip(*given, strict=True)
    ]
    return tuple(torch.stack(each) for each in zip(*rows, strict=True))


def _clip_coefficient(gradient: Sequence[Tensor], max_norm: float) -> float:
    """As :func:`torch.nn.utils.clip_grad_norm_`."""
    norm = _norm(gradient)
    return min(max_norm / (norm + 1e-6), 1.0) if 0 < max_norm < float("inf") else 1.0


def _unclipped(gradient: Sequence[Tensor], by_clipped: list[Tensor], max_norm: float) -> list[Tensor]:
    """Derivatives by the gradient, from those by the clipped gradient."""
    coefficient = _clip_coefficient(gradient, max_norm)
    if coefficient == 1.0:
        return by_clipped
    norm = _norm(gradient)
    along = sum((bar @ each.to(bar)).double() for bar, each in zip(by_clipped, gradient, strict=True))
    assert isinstance(along, Tensor)
    pull = (along * (coefficient / ((norm + 1e-6) * norm))).unsqueeze(1)  # [target, 1]
    return [coefficient * bar - pull.to(bar) * each.to(bar) for bar, each in zip(by_clipped, gradient, strict=True)]


def _norm(gradient: Sequence[Tensor]) -> float:
    return float(sum(float(each.double().square().sum()) for each in gradient) ** 0.5)


def _placer(parameters: list[Tensor]) -> Callable[[TrajectoryStep], None]:
    def place(step: TrajectoryStep) -> None:
        with torch.no_grad():
            for parameter, before in zip(parameters, step.before, strict=True):
                parameter.copy_(before.weight.view_as(parameter))

    return place


def _flat(before: Moments) -> Moments:
    tensors = (before.weight, before.first, before.second)
    return Moments(*(None if each is None else each.detach().flatten() for each in tensors))  # type: ignore[arg-type]


def _on(device: torch.device, adjoint: Adjoint) -> Adjoint:
    """The same on another device; what was saved comes back on the CPU."""
    parts = ((site.weight, site.first, site.second) for site in adjoint.sites)
    moved = tuple(Moments(*(None if each is None else each.to(device) for each in site)) for site in parts)  # type: ignore[arg-type]
    return Adjoint(adjoint.step, moved)


def _tensors(end: Adjoint | Sequence[Tensor]) -> Sequence[Tensor]:
    return [site.weight for site in end.sites] if isinstance(end, Adjoint) else end


def _check(step: TrajectoryStep, adjoint: Adjoint, parameters: list[Tensor]) -> None:
    if step.number != adjoint.step:
        raise ValueError(
            f"step {step.number} does not lead to where the way back has come to, the state after step {adjoint.step}. "
            "Next step: give the steps last one first, and none left out."
        )
    sizes = [each.numel() for each in parameters]
    for name, found in (
        ("the step's weights", [each.weight.numel() for each in step.before]),
        ("the targets' gradients", [site.weight.shape[-1] for site in adjoint.sites]),
    ):
        if found != sizes:
            raise ValueError(f"{name} have the sizes {found}, the parameters {sizes}. They must be the same, in order.")
