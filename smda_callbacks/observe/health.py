"""Does the SAE still describe the model that is being trained? Read at the last prompt token, over the probes."""

from __future__ import annotations

import torch
from torch import Tensor

from smda_callbacks.observe.features import centered, decode, encoder
from smda_callbacks.observe.sae import SAEHandle
from smda_callbacks.records import SAEHealth


def sae_health(handle: SAEHandle, hidden: Tensor, *, start: Tensor, before: Tensor | None = None) -> SAEHealth:
    """Health of the SAE on ``hidden [probe, d_in]``, compared with the start of the run and the snapshot before.

    * FVU = Σ‖h − ĥ‖² / Σ‖h − mean h‖² over probes. The probes' last tokens share most of their direction, so compare
      with the value at the start of the run, not with published ones.
    * delta-FVU = Σ‖Δh − Δĥ‖² / Σ‖Δh‖² since ``before``: 1 means that the SAE says nothing about the change, more that
      it misleads. ``delta_fvu_magnitude`` is the same with Δĥ at fixed gates, (ḡ ⊙ Δpre) W_dec, which leaves out the
      jumps of features that switch on or off.
    """
    encode = encoder(handle)
    with torch.no_grad():
        pre, gate = encode(hidden)
        reconstruction = decode(handle, gate * pre)
        stream = centered(handle, hidden)
        active, active_start = gate > 0, encode(start)[1] > 0
        both = (active & active_start).sum(1)
        either = (active | active_start).sum(1).clamp(min=1)
        plain = magnitude = None
        if before is not None:
            plain, magnitude = _delta_fvu(handle, before, stream, reconstruction, pre, gate)
        return SAEHealth(
            fvu=_ratio(stream - reconstruction, stream - stream.mean(0)) or 0.0,
            l0=active.sum(1).double().mean().item(),
            jaccard=(both / either).double().mean().item(),
            delta_fvu=plain,
            delta_fvu_magnitude=magnitude,
        )


def _delta_fvu(
    handle: SAEHandle, before: Tensor, stream: Tensor, reconstruction: Tensor, pre: Tensor, gate: Tensor
) -> tuple[float | None, float | None]:
    pre_before, gate_before = encoder(handle)(before)
    change = stream - centered(handle, before)
    plain = reconstruction - decode(handle, gate_before * pre_before)
    # Decoding is affine, so the difference of two decodings is the decoding of the difference without its offset.
    moved = (gate + gate_before) / 2 * (pre - pre_before)
    fixed = decode(handle, moved) - decode(handle, torch.zeros_like(moved))
    return _ratio(change - plain, change), _ratio(change - fixed, change)


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    total = whole.double().square().sum().item()
    return part.double().square().sum().item() / total if total > 0 else None
