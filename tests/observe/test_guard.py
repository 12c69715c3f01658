"""A measurement leaves no trace, whatever happens inside."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from smda_callbacks.observe.guard import measuring, weights_restored
from tests.helpers.tiny import tiny_model


def disturb(model: torch.nn.Module) -> None:
    torch.rand(3), np.random.rand(3), random.random()
    model.train()
    model.model.rotary_emb.inv_freq.mul_(2.0)
    model.model.rotary_emb.max_seq_len_cached = 7


@pytest.mark.parametrize("fails", [False, True])
def test_flags_random_states_buffers_and_attributes_come_back(fails: bool) -> None:
    model = tiny_model()
    model.train()
    model.model.layers[1].eval()  # a mixed state, as an evaluation may leave it
    flags = [module.training for module in model.modules()]
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    frequencies = model.model.rotary_emb.inv_freq
    values, length = frequencies.clone(), model.model.rotary_emb.max_seq_len_cached
    try:
        with measuring(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            disturb(model)
            if fails:
                raise KeyError("in the middle")
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert model.model.rotary_emb.inv_freq is frequencies
    assert torch.equal(frequencies, values)
    assert model.model.rotary_emb.max_seq_len_cached == length


def test_the_disturbance_is_seen_without_the_guard() -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    disturb(model)
    assert not torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_weights_come_back_bit_for_bit_after_a_failure() -> None:
    model = tiny_model()
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(KeyError), weights_restored(parameters):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(1e-3)
        raise KeyError("in the middle")
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
