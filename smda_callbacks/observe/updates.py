"""What one optimizer step did to a weight, and how much of it was whose: read from the live optimizer.

The arithmetic, and what a *share* and an *effect* are in it, is in :mod:`smda_callbacks.observe.optimizer_rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smda_callbacks.observe.lora import AttributionError, LoraSite
from smda_callbacks.observe.optimizer_rules import AdamWRule, Moments, Rule, SGDRule


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
