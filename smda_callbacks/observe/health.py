"""Does the SAE still describe the model that is being trained? Read at the last prompt token, over the probes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smda_callbacks.observe.features import centered, decode, encoder
from smda_callbacks.observe.sae import SAEHandle
from smda_callbacks.records import SAEHealth


@dataclass(frozen=True, eq=False)
class Encoded:
    """One snapshot through the whole dictionary: the costly part of its health, worth doing once."""

    hidden: Tensor  # [probe, d_in], as it was read
    stream: Tensor  # [probe, d_in], as the SAE sees it
    pre: Tensor  # [probe, d_sae]
    active: Tensor  # [probe, d_sae] bool: the gate, in a quarter of its memory
    reconstruction: Tensor  # [probe, d_in]


@torch.no_grad()
def encode_all(handle: SAEHandle, hidden: Tensor) -> Encoded:
    """``hidden [probe, d_in]`` through the whole dictionary and back."""
    pre, gate = encoder(handle)(hidden)
    return Encoded(hidden, centered(handle, hidden), pre, gate > 0, decode(handle, gate * pre))


def sae_health(handle: SAEHandle, hidden: Tensor, *, start: Tensor, before: Tensor | None = None) -> SAEHealth:
    """Health of the SAE on ``hidden [probe, d_in]``, compared with the start of the run and the snapshot before.

    * FVU = Σ‖h − ĥ‖² / Σ‖h − mean h‖² over probes. The probes' last tokens share most of their direction, so compare
      with the value at the start of the run, not with published ones.
    * delta-FVU = Σ‖Δh − Δĥ‖² / Σ‖Δh‖² since ``before``: 1 means that the SAE says nothing about the change, more that
      it misleads. ``delta_fvu_magnitude`` is the same with Δĥ at fixed gates, (ḡ ⊙ Δpre) W_dec, which leaves out the
      jumps of features that switch on or off.
    """
    return HealthMeter(handle, start).read(hidden, before)


class HealthMeter:
    """:func:`sae_health` at the snapshots of one run, each encoded once: a third of the work when they follow on."""

    def __init__(self, handle: SAEHandle, start: Tensor) -> None:
        self.handle = handle
        self._last = encode_all(handle, start)
        self._active_start = self._last.active

    @torch.no_grad()
    def read(self, hidden: Tensor, before: Tensor | None = None) -> SAEHealth:
        """Health on ``hidden``; ``before`` costs nothing where it is the very tensor that was read last."""
        previous = None if before is None else self._encoded(before)
        self._last = now = self._encoded(hidden)
        both = (now.active & self._active_start).sum(1)
        either = (now.active | self._active_start).sum(1).clamp(min=1)
        plain, magnitude = (None, None) if previous is None else _delta_fvu(self.handle, previous, now)
        return SAEHealth(
            fvu=_ratio(now.stream - now.reconstruction, now.stream - now.stream.mean(0)) or 0.0,
            l0=now.active.sum(1).double().mean().item(),
            jaccard=(both / either).double().mean().item(),
            delta_fvu=plain,
            delta_fvu_magnitude=magnitude,
        )

    def _encoded(self, hidden: Tensor) -> Encoded:
        return self._last if hidden is self._last.hidden else encode_all(self.handle, hidden)


def _delta_fvu(handle: SAEHandle, before: Encoded, now: Encoded) -> tuple[float | None, float | None]:
    change = now.stream - before.stream
    plain = now.reconstruction - before.reconstruction
    # Decoding is affine, so the difference of two decodings is the decoding of the difference without its offset.
    moved = (now.active.float() + before.active) / 2 * (now.pre - before.pre)
    fixed = _decode_beside(handle, before, moved) - _decode_beside(handle, before, torch.zeros_like(moved))
    return _ratio(change - plain, change), _ratio(change - fixed, change)


def _decode_beside(handle: SAEHandle, snapshot: Encoded, acts: Tensor) -> Tensor:
    """Decode ``acts`` at the scale of ``snapshot``: sae-lens forgets a scale after one use."""
    handle.sae.process_sae_in(snapshot.stream)
    return decode(handle, acts)


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    total = whole.double().square().sum().item()
    return part.double().square().sum().item() / total if total > 0 else None
