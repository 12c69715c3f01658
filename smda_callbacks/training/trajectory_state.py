"""What a recorded state is made of: trained weights and the optimizer's state, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smda_callbacks.observe.lora import LoraSite

#: Names of tensors in a state, per weight.
WEIGHT, COUNT = "weight", "step"
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def state_tensors(sites: tuple[LoraSite, ...], optimizer: Any) -> dict[str, Tensor]:
    """Trained weights and the optimizer's state, by name."""
    state, found = inner(optimizer).state, {}
    for number, site in enumerate(sites):
        own = state.get(site.weight, {})
        found[f"{WEIGHT}/{number}"] = site.weight
        found |= {f"{name}/{number}": own[name] for name in MOMENTS if own.get(name) is not None}
        if COUNT in own:
            found[f"{COUNT}/{number}"] = torch.as_tensor(own[COUNT])
    return found


def inner(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
