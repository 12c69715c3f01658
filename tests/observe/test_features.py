"""Encoding equals sae-lens, whole and selected; pooling keeps x = gate * pre."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smda_callbacks.observe.activations import parse_hook
from smda_callbacks.observe.features import decode, encoder, pool
from smda_callbacks.observe.sae import SAEHandle
from tests.helpers.tiny import tiny_sae

ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")


def handle(architecture: str, **options: Any) -> SAEHandle:
    sae = tiny_sae(architecture, **options)
    return SAEHandle("tiny", sae, architecture, parse_hook("blocks.1.hook_resid_post"), 32, 96, None, None)


def hidden(rows: int = 50) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_gate_times_pre_is_what_sae_lens_encodes(architecture: str, norm: str) -> None:
    fixture = handle(architecture, normalize_activations=norm)
    pre, gate = encoder(fixture)(hidden())
    expected = fixture.sae.encode(hidden())
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    assert 0.02 < (expected > 0).float().mean() < 0.6  # the fixture's gates really open and close
    torch.testing.assert_close(gate * pre, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(decode(fixture, gate * pre), fixture.sae(hidden()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_selected_features_equal_the_slice_of_all(architecture: str) -> None:
    fixture = handle(architecture)
    chosen = torch.tensor([3, 90, 4, 41])
    pre, gate = encoder(fixture)(hidden())
    pre_some, gate_some = encoder(fixture, chosen)(hidden())
    torch.testing.assert_close(pre_some, pre[:, chosen], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gate_some, gate[:, chosen], atol=0, rtol=0)


@torch.no_grad()
def test_negative_thresholds_do_not_let_negative_activations_through() -> None:
    fixture = handle("jumprelu")
    fixture.sae.threshold.data.neg_()
    pre, gate = encoder(fixture)(hidden())
    torch.testing.assert_close(gate * pre, fixture.sae.encode(hidden()), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_topk_scaled_by_decoder_norm() -> None:
    fixture = handle("topk", rescale_acts_by_decoder_norm=True)
    pre, gate = encoder(fixture)(hidden())
    torch.testing.assert_close(gate * pre, fixture.sae.encode(hidden()), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_centering_removes_the_mean_over_the_width() -> None:
    fixture = handle("standard")
    centered = SAEHandle(**{**vars(fixture), "center": True})
    expected = fixture.sae.encode(hidden() - hidden().mean(-1, keepdim=True))
    pre, gate = encoder(centered)(hidden() + 5.0)
    torch.testing.assert_close(gate * pre, expected, atol=1e-5, rtol=1e-5)


def test_pooling_by_hand() -> None:
    pre = torch.tensor([[[9.0, -1.0], [2.0, -3.0], [4.0, -2.0], [-1.0, -4.0]]])  # one row, four tokens, two features
    gate = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    span = torch.tensor([[False, True, True, True]])  # the first token is no part of the prompt's own text
    last = pool(pre, gate, span, "last")
    assert last[0].tolist() == [[-1.0, -4.0]]
    assert last[1].tolist() == [[0.0, 0.0]]
    highest = pool(pre, gate, span, "max")
    assert highest[0].tolist() == [[4.0, -2.0]]
    assert highest[1].tolist() == [[1.0, 0.0]]
    mean = pool(pre, gate, span, "mean")
    assert mean[0].tolist() == [[3.0, -3.0]]  # mean where active; of all tokens where none is
    torch.testing.assert_close(mean[1], torch.tensor([[2 / 3, 0.0]]))
    torch.testing.assert_close(mean[0] * mean[1], torch.tensor([[2.0, 0.0]]))  # the mean activation over the span


@pytest.mark.parametrize("readout", ["last", "max", "mean"])
def test_pooled_product_is_the_pooled_activation(readout: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(6, 9, 5, generator=generator)
    gate = (pre > 0.4).float()
    span = torch.arange(9) >= torch.tensor([[0], [2], [4], [6], [7], [8]])
    x = (gate * pre).masked_fill(~span.unsqueeze(-1), 0.0)
    expected = {"last": x[:, -1], "max": x.amax(1), "mean": x.sum(1) / span.sum(1, keepdim=True)}[readout]
    pooled_pre, pooled_gate = pool(pre, gate, span, readout)
    torch.testing.assert_close(pooled_pre * pooled_gate, expected, atol=1e-6, rtol=1e-6)
