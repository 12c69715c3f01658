"""What one optimizer step did to a weight, and how much of it was whose.

With the step's own denominator the numerator of AdamW (Loshchilov & Hutter 2019) is linear in the gradient, so the
update splits into a part per training example, one of the momentum and one of weight decay, which sum to it::

    Δθ = Σ_p −lr (1−β₁) c g_p / ((1−β₁ᵗ) D)  −  lr β₁ m_{t−1} / ((1−β₁ᵗ) D)  −  lr · decay · θ
    D  = √(v_t / (1−β₂ᵗ)) + ε

with c the clipping coefficient. That is a *share*. Leaving an example out changes the denominator and the clipping too:
the step is then computed again without it, which is its *effect* on the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smda_callbacks.observe.lora import AttributionError, LoraSite


@dataclass(frozen=True)
class Moments:
    """State of the optimizer for one weight before a step; None where it has none."""

    weight: Tensor
    first: Tensor | None  # exp_avg, or SGD's momentum buffer
    second: Tensor | None  # exp_avg_sq


@dataclass(frozen=True)
class SiteUpdate:
    """One weight over one optimizer step, everything flattened to ``[out * in]``, at least float32.

    ``rows``: the examples' gradients ``[example, out * in]``, not clipped. ``gradient``: what the optimizer was given.
    """

    rows: Tensor
    gradient: Tensor
    before: Moments
    rule: Rule
    clip: float  # c: gradient = c * rows.sum(0), up to rounding
    reclip: Tensor  # [example], clipping without the example over clipping with it

    @property
    def bytes(self) -> int:
        """Memory of the gradients and of what was copied of the optimizer's state."""
        held = (self.rows, self.gradient, self.before.weight, self.before.first, self.before.second)
        return sum(each.element_size() * each.numel() for each in held if each is not None)

    def of_examples(self, rows: list[int]) -> SiteUpdate:
        """The same step with these examples only."""
        return replace(self, rows=self.rows[rows], reclip=self.reclip[rows])

    def share_slope(self) -> Tensor:
        """``[out * in]``: an example's part of the update over its clipped gradient."""
        return self.rule.slope(self.before, self.gradient)

    def momentum(self) -> Tensor:
        """The part of the update that earlier gradients make, ``[out * in]``."""
        return self.rule.momentum(self.before, self.gradient)

    def decay(self) -> Tensor:
        """The part of the update that weight decay makes, ``[out * in]``."""
        return self.rule.decay(self.before)

    def shares(self) -> Tensor:
        """The examples' parts of the update, ``[example, out * in]``."""
        return self.rows * (self.clip * self.share_slope())

    def missing(self) -> Tensor:
        """What each example adds to the gradient, by clipping too: with it minus without, ``[example, out * in]``."""
        reclip = self.reclip.unsqueeze(1)
        return self.gradient * (1 - reclip) + self.rows * (self.clip * reclip)

    def effects(self) -> Tensor:
        """The update with each example minus the update without it, ``[example, out * in]``."""
        with_all = self.rule.update(self.before, self.gradient)
        return with_all - self.rule.update(self.before, self.gradient - self.missing())


#: Called with a past step's update and its age in steps; gives ``[example of the past step, out * in]``.
LaterEffects = Callable[[SiteUpdate, int], Tensor]


@dataclass(frozen=True)
class Rule:
    """Arithmetic of one optimizer step on one weight; ``update`` leaves weight decay out, which is its own part."""

    lr: float
    weight_decay: float

    def update(self, before: Moments, gradient: Tensor) -> Tensor:
        """The update that ``gradient [..., out * in]`` makes."""
        raise NotImplementedError

    def slope(self, before: Moments, gradient: Tensor) -> Tensor:
        """The update per gradient, at the denominator that ``gradient`` leads to."""
        raise NotImplementedError

    def momentum(self, before: Moments, gradient: Tensor) -> Tensor:
        """What the state before the step adds to the update."""
        raise NotImplementedError

    def faded(self, age: int) -> float:
        """What is left of the first push of a gradient that is ``age`` steps old."""
        raise NotImplementedError

    def later_effects(self, before: Moments, gradient: Tensor) -> LaterEffects:
        """This update minus the same without what each example added to the gradient of an earlier step.

        What the gradients since then would have been is left as it is.
        """
        raise NotImplementedError

    def decay(self, before: Moments) -> Tensor:
        """The update that weight decay makes."""
        return -self.lr * self.weight_decay * before.weight


@dataclass(frozen=True)
class AdamWRule(Rule):
    """AdamW; also Adam without weight decay."""

    beta1: float
    beta2: float
    eps: float
    step: int  # number of this step, from 1

    def update(self, before: Moments, gradient: Tensor) -> Tensor:
        return self._move(self._mean(before, gradient), self._second(before, gradient))

    def slope(self, before: Moments, gradient: Tensor) -> Tensor:
        scale = -self.lr * (1 - self.beta1) / (1 - self.beta1**self.step)
        return scale / self._denominator(self._second(before, gradient))

    def momentum(self, before: Moments, gradient: Tensor) -> Tensor:
        if before.first is None:
            return torch.zeros_like(gradient)
        scale = -self.lr * self.beta1 / (1 - self.beta1**self.step)
        return scale * before.first / self._denominator(self._second(before, gradient))

    def faded(self, age: int) -> float:
        return self.beta1**age

    def later_effects(self, before: Moments, gradient: Tensor) -> LaterEffects:
        mean, second = self._mean(before, gradient), self._second(before, gradient)
        move = self._move(mean, second)

        def effects(past: SiteUpdate, age: int) -> Tensor:
            gone = past.missing()
            # A gradient g that loses d takes g² - (g - d)² = d (2g - d) out of the second moment.
            faded = self.beta2**age * (1 - self.beta2)
            less_second = torch.addcmul(second, gone, 2 * past.gradient - gone, value=-faded).clamp_(min=0)
            less_mean = torch.add(mean, gone, alpha=-(self.beta1**age) * (1 - self.beta1))
            return move - self._move(less_mean, less_second)

        return effects

    def _mean(self, before: Moments, gradient: Tensor) -> Tensor:
        mean = (1 - self.beta1) * gradient
        return mean if before.first is None else mean + self.beta1 * before.first

    def _second(self, before: Moments, gradient: Tensor) -> Tensor:
        second = (1 - self.beta2) * gradient.square()
        return second if before.second is None else second + self.beta2 * before.second

    def _denominator(self, second: Tensor) -> Tensor:
        return (second / (1 - self.beta2**self.step)).sqrt_().add_(self.eps)

    def _move(self, mean: Tensor, second: Tensor) -> Tensor:
        return (mean / self._denominator(second)).mul_(-self.lr / (1 - self.beta1**self.step))


@dataclass(frozen=True)
class SGDRule(Rule):
    """SGD with momentum, without dampening and Nesterov."""

    mu: float

    def update(self, before: Moments, gradient: Tensor) -> Tensor:
        return -self.lr * gradient + self.momentum(before, gradient)

    def slope(self, before: Moments, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, -self.lr)

    def momentum(self, before: Moments, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if before.first is None else -self.lr * self.mu * before.first

    def faded(self, age: int) -> float:
        return self.mu**age

    def later_effects(self, before: Moments, gradient: Tensor) -> LaterEffects:
        return lambda past, age: (-self.lr * self.mu**age) * past.missing()


#: Optimizers whose arithmetic is known, by class.
KNOWN = "torch.optim.AdamW (adamw_torch, adamw_torch_fused), torch.optim.Adam without weight decay, torch.optim.SGD"


def check_optimizer(optimizer: Any, sites: tuple[LoraSite, ...] = ()) -> None:
    """Refuse an optimizer whose update cannot be split over examples, or that does not train all of ``sites``.

    Raises:
        AttributionError: names it, and those that can.
    """
    inner = _inner(optimizer)
    trained = {id(weight) for group in inner.param_groups for weight in group["params"]}
    left_out = [site.name for site in sites if id(site.weight) not in trained]
    if left_out:
        raise AttributionError(
            f"the optimizer does not train {left_out[0]} ({len(left_out)} LoRA matrices in all), though it requires a "
            "gradient. Next step: give the optimizer all trainable parameters, or freeze it."
        )
    fault = _fault(inner)
    if fault:
        raise AttributionError(
            f"the optimizer is {fault}, whose update is not split over training pairs. Allowed: {KNOWN}. Next step: "
            "set optim to one of these, or attribution.engine: off."
        )


def _fault(inner: Any) -> str | None:
    name = f"{type(inner).__module__.partition('.')[0]}.{type(inner).__name__}"
    if type(inner) not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        return name
    for group in inner.param_groups:
        flags = [flag for flag in ("amsgrad", "maximize", "nesterov", "dampening") if group.get(flag)]
        if flags:
            return f"{name} with {' and '.join(flags)}"
        if type(inner) is torch.optim.Adam and group["weight_decay"] and not group.get("decoupled_weight_decay"):
            return f"{name} with weight decay inside the gradient"
    return None


def moments_before(optimizer: Any, sites: tuple[LoraSite, ...]) -> tuple[Moments, ...]:
    """Copies of what a step is about to overwrite."""
    state: Mapping[Any, Any] = _inner(optimizer).state
    names = ("exp_avg", "exp_avg_sq")
    found = []
    for site in sites:
        own = state.get(site.weight, {})
        first, second = (own.get(name) for name in names) if "exp_avg" in own else (own.get("momentum_buffer"), None)
        moments = (None if each is None else _flat(each) for each in (first, second))
        found.append(Moments(_flat(site.weight), *moments))
    return tuple(found)


def rules_of(optimizer: Any, sites: tuple[LoraSite, ...]) -> tuple[Rule, ...]:
    """The arithmetic of the step that was just made, per site: call it before the scheduler moves on."""
    inner = _inner(optimizer)
    group_of = {id(weight): group for group in inner.param_groups for weight in group["params"]}
    return tuple(_rule(inner, group_of[id(site.weight)], inner.state.get(site.weight, {})) for site in sites)


def _rule(inner: Any, group: Mapping[str, Any], state: Mapping[str, Any]) -> Rule:
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if isinstance(inner, torch.optim.SGD):
        return SGDRule(lr, decay, float(group["momentum"]))
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return AdamWRule(lr, decay, beta1, beta2, float(group["eps"]), max(int(state.get("step", 1)), 1))


def site_updates(
    gradients: tuple[Tensor, ...],
    before: tuple[Moments, ...],
    optimizer: Any,
    sites: tuple[LoraSite, ...],
    max_norm: float,
) -> tuple[tuple[SiteUpdate, ...], float]:
    """The step that was just made, site by site, and how far the captured gradients are from the optimizer's.

    Call it between the optimizer's step and the zeroing of gradients.

    Args:
        gradients: per site ``[example, out * in]``; before: see :func:`moments_before`.
        max_norm: what gradients were clipped to; 0 or infinite: not at all.

    Returns:
        The updates, and ``‖c Σ_p g_p − g‖ / ‖g‖`` over all sites.
    """
    gradients_of = ((site.weight, site.weight.grad) for site in sites)
    given = tuple(_flat(torch.zeros_like(weight) if grad is None else grad) for weight, grad in gradients_of)
    total = torch.cat([rows.sum(dim=0) for rows in gradients]).double()
    wanted = torch.cat(given).double()
    clip = float(total @ wanted) / max(float(total @ total), 1e-300)
    error, size = float((clip * total - wanted).norm()), float(wanted.norm())
    reclip = _reclip(gradients, total, clip, max_norm)
    rules = rules_of(optimizer, sites)
    updates = tuple(
        SiteUpdate(rows, gradient, moments, rule, clip, reclip.to(rows))
        for rows, gradient, moments, rule in zip(gradients, given, before, rules, strict=True)
    )
    return updates, error / size if size else float(error > 0)


def _reclip(gradients: tuple[Tensor, ...], total: Tensor, clip: float, max_norm: float) -> Tensor:
    """Clipping coefficient of the batch without each example, over that of the whole batch.

    ``total``: the sum over examples, all sites in a row.
    """
    if not 0 < max_norm < float("inf") or clip <= 0:
        return torch.ones(len(gradients[0]), dtype=torch.float64)
    parts = total.split([rows.shape[1] for rows in gradients])
    own = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in gradients]
    cross = [(rows @ part.to(rows)).double() for rows, part in zip(gradients, parts, strict=True)]
    rest = total @ total - 2 * torch.stack(cross).sum(dim=0) + torch.stack(own).square().sum(dim=0)
    without = (max_norm / (rest.clamp(min=0).sqrt() + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    return (without / clip).cpu()


def _flat(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat.float().clone() if flat.dtype not in (torch.float32, torch.float64) else flat.clone()


def _inner(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
