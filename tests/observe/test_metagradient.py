"""Influences on the end of a run, against retraining it with a pair weighted a little more and a little less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from smda_callbacks.observe.example_losses import example_losses
from smda_callbacks.observe.lora import LoraSite, lora_sites
from smda_callbacks.observe.metagradient import Adjoint, TrajectoryStep, influence, step_gradient
from smda_callbacks.observe.sequences import split_batch
from smda_callbacks.observe.updates import moments_before, rules_of
from tests.helpers.tiny import tiny_model

# A large eps: with the usual one, weights with a gradient near zero make the training too bent for differences.
OPTIMIZERS: dict[str, Callable[[list[Any]], Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-3),
    "AdamW of several rates": lambda p: torch.optim.AdamW(
        [{"params": p[::2], "lr": 1e-2}, {"params": p[1::2], "weight_decay": 0.3}], lr=2e-2, eps=1e-3
    ),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
    "SGD with momentum and decay": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.1),
}
STEPS, BATCH = 4, 3


@dataclass(frozen=True)
class Case:
    """A training: the optimizer, clipping, micro-batches a step."""

    optimizer: str = "AdamW"
    max_norm: float = 0.0
    accumulation: int = 1
    attention: str = "sdpa"


def _exact_norms(model: Any) -> None:
    """Norms that do not round to float32 inside, which differences would see."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)


class World:
    """A tiny model in float64 that can be trained again and again, with other weights of its examples."""

    def __init__(self, case: Case, *, fresh: bool = False) -> None:
        self.case = case
        base = tiny_model(num_hidden_layers=2, hidden_size=16, intermediate_size=16, attn_implementation=case.attention)
        _exact_norms(base)
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config).double()
        self.sites: tuple[LoraSite, ...] = lora_sites(self.model)
        if not fresh:
            with torch.no_grad():
                for site in self.sites:
                    site.weight.add_(0.1 * torch.randn_like(site.weight))
        self.parameters = [site.weight for site in self.sites]
        self.start = [each.detach().clone() for each in self.parameters]
        self.data = [self._batch(k) for k in range(STEPS * case.accumulation)]
        self.probe = self._batch(99)

    @staticmethod
    def _batch(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 420, (BATCH, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        return example_losses(self.model, batch, split_batch(batch), 13.0 * self.case.accumulation)

    def targets(self) -> Tensor:
        """Two unlike functions of the weights, ``[2]``."""
        each = example_losses(self.model, self.probe, split_batch(self.probe), 1.0)
        return torch.stack([each[0], (-each[1] / 3).exp() * each[2]])

    def gradients(self) -> tuple[Tensor, ...]:
        rows = [torch.autograd.grad(each, self.parameters, retain_graph=True) for each in self.targets()]
        return tuple(torch.stack([g.flatten() for g in each]) for each in zip(*rows, strict=True))

    def train(self, weight: Tensor) -> list[TrajectoryStep]:
        """``weight`` ``[step, micro-batch, example]``: of the examples in the loss."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.start, strict=True):
                parameter.copy_(value)
        optimizer = OPTIMIZERS[self.case.optimizer](self.parameters)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / (STEPS + 1))
        steps = []
        for number in range(STEPS):
            batches = tuple(self.data[number * self.case.accumulation :][: self.case.accumulation])
            optimizer.zero_grad()
            for batch, each in zip(batches, weight[number], strict=True):
                (self.losses(batch) @ each).backward()
            if self.case.max_norm:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.case.max_norm)
            before = moments_before(optimizer, self.sites)
            optimizer.step()
            rules = rules_of(optimizer, self.sites)
            steps.append(TrajectoryStep(number + 1, before, rules, self.case.max_norm, batches))
            schedule.step()
        return steps

    def ones(self) -> Tensor:
        return torch.ones(STEPS, self.case.accumulation, BATCH, dtype=torch.float64)

    def influences(self, **options: Any) -> Tensor:
        """``[step, micro-batch, example, target]``."""
        steps = self.train(self.ones())
        found = influence(reversed(steps), self.gradients(), self.losses, self.parameters, **options)
        rows = [each.scores for each in found][::-1]
        return torch.stack(rows).reshape(*self.ones().shape, 2)

    def differences(self, places: list[tuple[int, int, int]], size: float) -> Tensor:
        """Central differences of whole trainings, ``[place, target]``; two sizes, so that the error is of order 4."""
        found = []
        for place in places:
            at = []
            for factor in (size, -size, 2 * size, -2 * size):
                weight = self.ones()
                weight[place] += factor
                self.train(weight)
                at.append(self.targets().detach())
            found.append((8 * (at[0] - at[1]) - (at[2] - at[3])) / (12 * size))
        return torch.stack(found)


CASES = {
    "AdamW": Case(),
    "AdamW, clipped": Case(max_norm=0.3),
    "AdamW, clipping set and never reached": Case(max_norm=1e3),
    "AdamW of several rates": Case("AdamW of several rates", max_norm=0.3),
    "AdamW, accumulation, clipped": Case(max_norm=0.3, accumulation=2),
    "SGD": Case("SGD"),
    "SGD with momentum and decay, clipped": Case("SGD with momentum and decay", max_norm=0.3),
    "SGD with momentum and decay, accumulation": Case("SGD with momentum and decay", accumulation=2),
}


@pytest.mark.parametrize("name", CASES)
def test_influence_is_the_slope_of_retraining(name: str) -> None:
    world = World(CASES[name])
    last = CASES[name].accumulation - 1
    places = [(0, last, 1), (STEPS - 1, 0, 2)]
    found = world.influences()
    wanted = world.differences(places, 3e-4)
    assert (wanted.abs() > 1e-5).all()  # there is something to be right about
    torch.testing.assert_close(torch.stack([found[place] for place in places]), wanted, rtol=1e-6, atol=1e-9)


def test_from_a_fresh_adapter_with_the_usual_eps() -> None:
    """LoRA's B is zero, so A has no gradient in the first step, and its second moment is zero."""
    world = World(Case(max_norm=1.0), fresh=True)
    usual = torch.optim.AdamW

    def made(parameters: list[Any]) -> Any:
        return usual(parameters, lr=1e-3, eps=1e-8)

    OPTIMIZERS["fresh"] = made
    world.case = replace(world.case, optimizer="fresh")
    places = [(0, 0, 0), (2, 0, 2)]
    found = world.influences()
    assert torch.isfinite(found).all()
    wanted = world.differences(places, 1e-5)
    torch.testing.assert_close(torch.stack([found[place] for place in places]), wanted, rtol=2e-3, atol=1e-7)


def test_attention_is_differentiated_twice_whatever_computes_it() -> None:
    fused, eager = (World(Case(attention=name)).influences() for name in ("sdpa", "eager"))
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-8)  # eager rounds its softmax to float32


@pytest.mark.parametrize("accumulation", [1, 2])
def test_targets_at_once_make_no_difference(accumulation: int) -> None:
    world = World(Case(max_norm=0.3, accumulation=accumulation))
    one, many = world.influences(at_once=1), world.influences(at_once=8)
    torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-14)


def test_going_on_from_where_an_earlier_call_stopped() -> None:
    world = World(Case(max_norm=0.3))
    steps = world.train(world.ones())[::-1]
    end = world.gradients()
    whole = list(influence(steps, end, world.losses, world.parameters))
    part = list(influence(steps[:2], end, world.losses, world.parameters))
    rest = list(influence(steps[2:], part[-1].adjoint, world.losses, world.parameters))
    assert [each.number for each in part + rest] == [4, 3, 2, 1]
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(whole, part + rest, strict=True))


def test_the_last_step_alone_is_the_slope_of_that_step() -> None:
    """Of a pair of the last step, the influence is the target's gradient times the step's derivative, and no more."""
    world = World(Case("SGD", max_norm=0.0))
    steps = world.train(world.ones())
    end = world.gradients()
    lr = steps[-1].rules[0].lr
    found = next(iter(influence(steps[::-1], end, world.losses, world.parameters))).scores
    with torch.no_grad():
        for parameter, before in zip(world.parameters, steps[-1].before, strict=True):
            parameter.copy_(before.weight.view_as(parameter))
    own = [torch.autograd.grad(each, world.parameters, retain_graph=True) for each in world.losses(world.data[-1])]
    wanted = [
        [-lr * sum(float(g.flatten() @ e[k]) for g, e in zip(row, end, strict=True)) for k in (0, 1)] for row in own
    ]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def test_where_clipping_takes_the_size_of_the_loss_out_influences_sum_to_zero() -> None:
    world = World(Case("SGD", max_norm=0.01))
    found = world.influences().sum(dim=(0, 1, 2))
    assert (found.abs() < 1e-3 * world.influences().abs().sum(dim=(0, 1, 2))).all()
    free = World(Case("SGD")).influences()
    assert (free.sum(dim=(0, 1, 2)).abs() > 0.05 * free.abs().sum(dim=(0, 1, 2))).all()


def test_weights_come_back_and_the_gradient_is_the_optimizers() -> None:
    world = World(Case(accumulation=2))
    steps = world.train(world.ones())
    given = [parameter.grad.flatten().clone() for parameter in world.parameters if parameter.grad is not None]
    end = [parameter.detach().clone() for parameter in world.parameters]
    way = influence(steps[::-1], world.gradients(), world.losses, world.parameters)
    next(way)
    for found, wanted in zip(step_gradient(steps[-1].batches, world.losses, world.parameters), given, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    assert not torch.equal(world.parameters[0], end[0])
    way.close()  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(world.parameters, end, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    world = World(Case())
    steps = world.train(world.ones())[::-1]
    end = world.gradients()
    with pytest.raises(ValueError, match=r"step 2 does not lead to .* after step 3"):
        list(influence([steps[0], steps[2]], end, world.losses, world.parameters))
    with pytest.raises(ValueError, match="targets' gradients have the sizes"):
        list(influence(steps, end[::-1], world.losses, world.parameters))
    with pytest.raises(ValueError, match="after step 2"):
        list(influence(steps, Adjoint(2, ()), world.losses, world.parameters))
