"""Health over a run: each snapshot encoded once, the same numbers; SAEs that normalise what they read."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from smda_callbacks.observe import health as health_module
from smda_callbacks.observe.activations import parse_hook
from smda_callbacks.observe.health import HealthMeter, sae_health
from smda_callbacks.observe.sae import ARCHITECTURES, SAEHandle
from tests.helpers.tiny import tiny_sae

NORMS = ("none", "layer_norm", "constant_norm_rescale")


def handle(architecture: str = "topk", norm: str = "none") -> SAEHandle:
    sae = tiny_sae(architecture, normalize_activations=norm)
    return SAEHandle("tiny", sae, architecture, parse_hook("blocks.1.hook_resid_post"), 32, 96, None, None)


def run(snapshots: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(20, 32, generator=generator)]
    for _ in range(snapshots - 1):
        found.append(found[-1] + 0.05 * torch.randn(20, 32, generator=generator))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm", NORMS)
def test_a_run_equals_each_snapshot_on_its_own(architecture: str, norm: str) -> None:
    sae, (start, *rest) = handle(architecture, norm), run()
    meter = HealthMeter(sae, start)
    assert meter.read(start) == sae_health(sae, start, start=start)
    before = start
    for hidden in rest:
        assert meter.read(hidden, before) == sae_health(sae, hidden, start=start, before=before)
        before = hidden


def test_a_snapshot_that_was_not_read_last_is_encoded_again() -> None:
    """As when health is taken at every third measurement, or a window failed."""
    sae, (start, first, second, third) = handle(), run()
    meter = HealthMeter(sae, start)
    meter.read(first, start)
    assert meter.read(third, second) == sae_health(sae, third, start=start, before=second)


def test_each_snapshot_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, snapshots = handle(), run()
    real, encoded = health_module.encode_all, []

    def count(handle: SAEHandle, hidden: Tensor) -> health_module.Encoded:
        encoded.append(hidden)
        return real(handle, hidden)

    monkeypatch.setattr(health_module, "encode_all", count)
    meter = HealthMeter(sae, snapshots[0])
    meter.read(snapshots[0])
    for before, hidden in pairwise(snapshots):
        meter.read(hidden, before)
    assert len(encoded) == len(snapshots)
    assert all(a is b for a, b in zip(encoded, snapshots, strict=True))


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_delta_fvu_of_an_sae_that_normalises_its_input(norm: str) -> None:
    """Plain: from sae-lens's own round trip. At fixed gates: decoded at the scale of the snapshot before."""
    made = handle("standard", norm)
    sae, (start, moved, *_) = made.sae, run()
    found = sae_health(made, moved, start=start, before=start)
    change = (moved - start).double()
    plain = change - (sae(moved) - sae(start)).double()
    assert found.delta_fvu == pytest.approx((plain.square().sum() / change.square().sum()).item(), rel=1e-5)

    def pre(hidden: Tensor) -> Tensor:
        values: Tensor = sae.process_sae_in(hidden) @ sae.W_enc + sae.b_enc
        return values

    scale = torch.ones(20, 1)
    if norm == "layer_norm":
        scale = start.std(dim=-1, keepdim=True)
    elif norm == "constant_norm_rescale":
        scale = start.norm(dim=-1, keepdim=True) / 32**0.5
    gate = ((pre(start) > 0).float() + (pre(moved) > 0).float()) / 2
    fixed = change - (scale * ((gate * (pre(moved) - pre(start))) @ sae.W_dec)).double()
    expected = (fixed.square().sum() / change.square().sum()).item()
    assert found.delta_fvu_magnitude == pytest.approx(expected, rel=1e-4)
