"""The arithmetic of one optimizer step on one weight, and how it splits over training examples.

With the step's own denominator the numerator of AdamW (Loshchilov & Hutter 2019) is linear in the gradient, so the
update splits into a part per training example, one of the momentum and one of weight decay, which sum to it::

    Δθ = Σ_p −lr (1−β₁) c g_p / ((1−β₁ᵗ) D)  −  lr β₁ m_{t−1} / ((1−β₁ᵗ) D)  −  lr · decay · θ
    D  = √(v_t / (1−β₂ᵗ)) + ε

with c the clipping coefficient. That is a *share*. Leaving an example out changes the denominator and the clipping too:
the step is then computed again without it, which is its *effect* on the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """State of the optimizer for one weight before a step; None where it has none.

    Also the derivative of something by it, ``[target, out * in]`` each; None where that is zero.
    """

    weight: Tensor
    first: Tensor | None  # exp_avg, or SGD's momentum buffer
    second: Tensor | None  # exp_avg_sq


#: Called with what the examples of an earlier step added to its gradient (``SiteUpdate.missing``), that gradient, and
#: the step's age in steps; gives ``[example, out * in]``.
LaterEffects = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Rule(ABC):
    """Arithmetic of one optimizer step on one weight; ``update`` leaves weight decay out, which is its own part."""

    lr: float
    weight_decay: float

    @abstractmethod
    def update(self, before: Moments, gradient: Tensor) -> Tensor:
        """The update that ``gradient [..., out * in]`` makes."""

    @abstractmethod
    def slope(self, before: Moments, gradient: Tensor) -> Tensor:
        """The update per gradient, at the denominator that ``gradient`` leads to."""

    @abstractmethod
    def momentum(self, before: Moments, gradient: Tensor) -> Tensor:
        """What the state before the step adds to the update."""

    @abstractmethod
    def faded(self, age: int) -> float:
        """What is left of the first push of a gradient that is ``age`` steps old."""

    @abstractmethod
    def later_effects(self, before: Moments, gradient: Tensor) -> LaterEffects:
        """This update minus the same without what each example added to the gradient of an earlier step.

        What the gradients since then would have been is left as it is.
        """

    @abstractmethod
    def adjoint(self, before: Moments, gradient: Tensor, after: Moments) -> tuple[Moments, Tensor]:
        """The whole step, weight decay included, backwards.

        Args:
            before, gradient: of the step as it was made, ``[out * in]``.
            after: derivatives of targets by the state after the step, ``[target, out * in]``.

        Returns:
            The derivatives by the state before the step, at a fixed gradient, and by the gradient.
        """

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

        def effects(gone: Tensor, then: Tensor, age: int) -> Tensor:
            # A gradient g that loses d takes g² - (g - d)² = d (2g - d) out of the second moment.
            faded = self.beta2**age * (1 - self.beta2)
            less_second = torch.addcmul(second, gone, 2 * then - gone, value=-faded).clamp_(min=0)
            less_mean = torch.add(mean, gone, alpha=-(self.beta1**age) * (1 - self.beta1))
            return move - self._move(less_mean, less_second)

        return effects

    def adjoint(self, before: Moments, gradient: Tensor, after: Moments) -> tuple[Moments, Tensor]:
        mean, second = self._mean(before, gradient), self._second(before, gradient)
        correction = 1 - self.beta2**self.step
        root = (second / correction).sqrt()
        denominator = root + self.eps
        rate = self.lr / (1 - self.beta1**self.step)
        # Where the second moment is zero so is the first, and the weight moves by lr * mean / eps: no slope in it.
        slope = torch.where(root > 0, rate * mean / (2 * correction * denominator.square() * root), 0.0)
        by_mean = _plus(after.first, after.weight * (-rate / denominator))
        by_second = _plus(after.second, after.weight * slope)
        by_gradient = (1 - self.beta1) * by_mean + (2 * (1 - self.beta2) * gradient) * by_second
        kept = (1 - self.lr * self.weight_decay) * after.weight
        return Moments(kept, self.beta1 * by_mean, self.beta2 * by_second), by_gradient

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
        return lambda gone, then, age: (-self.lr * self.mu**age) * gone

    def adjoint(self, before: Moments, gradient: Tensor, after: Moments) -> tuple[Moments, Tensor]:
        by_gradient = _plus(after.first, -self.lr * after.weight)  # decay is part of what goes into the momentum
        return Moments(after.weight + self.weight_decay * by_gradient, self.mu * by_gradient, None), by_gradient


def _plus(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first + second
