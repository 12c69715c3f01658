"""Updates split over examples, against the optimizers of torch run for real, with and without an example."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smda_callbacks.observe.lora import AttributionError, LoraSite
from smda_callbacks.observe.updates import SiteUpdate, check_optimizer, moments_before, site_updates

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "AdamW with decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95)),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "SGD with momentum and decay": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
each_clip = pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])


@dataclass
class World:
    """Two weights that are trained on made-up gradients of examples."""

    sites: tuple[LoraSite, ...]
    optimizer: Any
    max_norm: float

    @classmethod
    def make(cls, name: str, max_norm: float) -> World:
        torch.manual_seed(0)
        modules = [nn.Linear(5, 3, bias=False).double(), nn.Linear(3, 4, bias=False).double()]
        sites = tuple(LoraSite(f"site {k}", module) for k, module in enumerate(modules))
        return cls(sites, OPTIMIZERS[name]([module.weight for module in modules]), max_norm)

    def step(self, rows: list[Tensor]) -> None:
        """A real optimizer step on the sum of the examples' gradients."""
        for site, each in zip(self.sites, rows, strict=True):
            site.module.weight.grad = each.sum(dim=0).view_as(site.weight).clone()
        if self.max_norm:
            torch.nn.utils.clip_grad_norm_([site.module.weight for site in self.sites], self.max_norm)
        self.optimizer.step()

    def split(self, rows: list[Tensor]) -> tuple[tuple[SiteUpdate, ...], float, list[Tensor]]:
        """A real step, its split, and what it really did to the weights."""
        before = moments_before(self.optimizer, self.sites)
        start = self.weights()
        self.step(rows)
        updates, error = site_updates(tuple(rows), before, self.optimizer, self.sites, self.max_norm)
        return updates, error, [a - b for a, b in zip(self.weights(), start, strict=True)]

    def weights(self) -> list[Tensor]:
        return [site.weight.detach().flatten().clone() for site in self.sites]

    def copy(self) -> World:
        return copy.deepcopy(self)


def gradients(seed: int, examples: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(examples, size, generator=generator, dtype=torch.float64) for size in (15, 12)]


def after(name: str, max_norm: float, steps: int) -> World:
    world = World.make(name, max_norm)
    for seed in range(steps):
        world.step(gradients(seed))
    return world


@each_optimizer
@each_clip
@pytest.mark.parametrize("steps", [0, 3])
def test_parts_sum_to_the_real_update(name: str, max_norm: float, steps: int) -> None:
    world = after(name, max_norm, steps)
    updates, error, real = world.split(gradients(10))
    assert error < 1e-12
    for update, moved in zip(updates, real, strict=True):
        parts = update.shares().sum(dim=0) + update.momentum() + update.decay()
        torch.testing.assert_close(parts, moved, rtol=1e-6, atol=1e-13)


@each_optimizer
@each_clip
@pytest.mark.parametrize("steps", [0, 3])
def test_effects_are_what_a_step_without_the_example_really_misses(name: str, max_norm: float, steps: int) -> None:
    world = after(name, max_norm, steps)
    start, rows = world.copy(), gradients(10)
    updates, _, _ = world.split(rows)
    for example in range(4):
        without = start.copy()
        without.step([torch.cat([each[:example], each[example + 1 :]]) for each in rows])
        for update, with_it, without_it in zip(updates, world.weights(), without.weights(), strict=True):
            torch.testing.assert_close(update.effects()[example], with_it - without_it, rtol=1e-5, atol=1e-11)


# SGD's buffer holds earlier weight decay too, which is nobody's gradient: it stays in the momentum line.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SGD with momentum and decay"])
def test_momentum_is_what_earlier_gradients_do_later(name: str) -> None:
    """The momentum of a step is the sum over all earlier steps of the share that each still has in it."""
    world = World.make(name, 1.0)
    past = [world.split(gradients(seed))[0] for seed in range(6)]
    now, _, _ = world.split(gradients(6))
    for place, update in enumerate(now):
        old = sum(
            update.rule.faded(age) * update.share_slope() * (step[place].rows * step[place].clip).sum(dim=0)
            for age, step in enumerate(reversed(past), start=1)
        )
        torch.testing.assert_close(old, update.momentum(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["AdamW", "AdamW with decay", "SGD with momentum"])
@each_clip
@pytest.mark.parametrize("age", [1, 3])
def test_later_effects_are_what_a_later_step_really_misses(name: str, max_norm: float, age: int) -> None:
    """Leave an example out of a step for real, and make the steps after it with the gradients that they had."""
    tail = [gradients(seed) for seed in range(1, age + 1)]
    for example in range(4):
        world = World.make(name, max_norm)
        first, _, _ = world.split(gradients(0))
        for rows in tail[:-1]:
            world.step(rows)
        now, _, real = world.split(tail[-1])
        less = World.make(name, max_norm)
        less.step([torch.cat([each[:example], each[example + 1 :]]) for each in gradients(0)])
        for rows in tail[:-1]:
            less.step(rows)
        updates, _, changed = less.split(tail[-1])
        for origin, update, without, moved, less_moved in zip(first, now, updates, real, changed, strict=True):
            later = update.rule.later_effects(update.before, update.gradient)
            effect = later(origin.missing(), origin.gradient, age)[example]
            # Weight decay acts on weights that differ already: not the gradient's doing.
            decay = update.decay() - without.decay()
            torch.testing.assert_close(effect, moved - less_moved - decay, rtol=1e-6, atol=1e-10)


def test_a_weight_that_no_gradient_reached_has_no_effect() -> None:
    world = World.make("AdamW", 1.0)
    rows = [gradients(0)[0], torch.zeros(4, 12, dtype=torch.float64)]
    updates, _, _ = world.split(rows)
    for part in (updates[1].shares(), updates[1].effects(), updates[1].momentum()):
        assert torch.isfinite(part).all()
        assert part.abs().max() == 0
    update = updates[1]
    later = update.rule.later_effects(update.before, update.gradient)
    assert torch.isfinite(later(update.missing(), update.gradient, 1)).all()


def test_gradients_that_are_not_the_training_s_are_noticed() -> None:
    world = World.make("AdamW", 0.0)
    rows = gradients(0)
    before = moments_before(world.optimizer, world.sites)
    world.step(rows)
    wrong = (rows[0], rows[1] + 1.0)
    _, error = site_updates(wrong, before, world.optimizer, world.sites, 0.0)
    assert error > 0.1


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: torch.optim.Adafactor(p), "Adafactor"),
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "nesterov"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "dampening"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "weight decay inside the gradient"),
    ],
)
def test_other_optimizers_are_refused_by_name(make: Any, word: str) -> None:
    with pytest.raises(AttributionError, match=word) as caught:
        check_optimizer(make([nn.Parameter(torch.zeros(2))]))
    assert "adamw_torch" in str(caught.value)


def test_a_matrix_that_the_optimizer_does_not_train_is_told_before_training() -> None:
    world = World.make("AdamW", 0.0)
    check_optimizer(world.optimizer, world.sites)
    with pytest.raises(AttributionError, match=r"does not train site 1 \(1 LoRA matrices"):
        check_optimizer(torch.optim.AdamW([world.sites[0].module.weight]), world.sites)
