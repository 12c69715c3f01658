"""Residual stream -> gate and pre-activation of chosen SAE features, exactly as sae-lens would encode them.

Every supported SAE writes x = gate ⊙ pre. Keeping both lets a change of x be split into magnitude and gating.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from smda_callbacks.observe.sae import SAEHandle

Readout = Literal["last", "mean", "max"]
READOUTS: tuple[Readout, ...] = ("last", "mean", "max")


@dataclass(frozen=True)
class Encoder:
    """Encodes the features ``index`` (all when None); weights are sliced once, not at every step.

    TopK needs every pre-activation to know its threshold, so it encodes in full and slices afterwards.
    """

    handle: SAEHandle
    index: Tensor | None
    weights: dict[str, Tensor]

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``hidden [..., d_in]`` -> ``(pre, gate)``, each ``[..., feature]`` float32; gate is 0/1, x = gate * pre."""
        sae = self.handle.sae
        inputs = sae.process_sae_in(centered(self.handle, hidden))
        if self.handle.architecture == "topk":
            return self._topk(inputs)
        pre = inputs @ self.weights["W"] + self.weights["b"]
        if self.handle.architecture == "jumprelu":
            gate = pre > self.weights["threshold"].clamp(min=0)
        elif self.handle.architecture == "gated":
            gate = (inputs @ self.weights["W_gate"] + self.weights["b_gate"] > 0) & (pre > 0)
        else:
            gate = pre > 0
        return pre, gate.to(pre.dtype)

    def _topk(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        sae = self.handle.sae
        pre = inputs @ sae.W_enc + sae.b_enc
        if sae.cfg.rescale_acts_by_decoder_norm:
            pre = pre * sae.W_dec.norm(dim=-1)
        top = pre.topk(sae.cfg.k, dim=-1, sorted=False).indices
        gate = torch.zeros_like(pre).scatter_(-1, top, 1.0) * (pre > 0)
        return (pre, gate) if self.index is None else (pre[..., self.index], gate[..., self.index])


def encoder(handle: SAEHandle, features: Tensor | None = None) -> Encoder:
    """An :class:`Encoder` for SAE indices ``features`` (int64; None: the whole dictionary)."""
    sae = handle.sae
    index = None if features is None else features.to(sae.W_enc.device)
    if handle.architecture == "topk":
        return Encoder(handle, index, {})

    def pick(tensor: Tensor) -> Tensor:
        return tensor if index is None else tensor[..., index].contiguous()

    if handle.architecture == "gated":
        weights = {
            "W": pick(sae.W_enc * sae.r_mag.exp()),
            "b": pick(sae.b_mag),
            "W_gate": pick(sae.W_enc),
            "b_gate": pick(sae.b_gate),
        }
    else:
        weights = {"W": pick(sae.W_enc), "b": pick(sae.b_enc)}
    if handle.architecture == "jumprelu":
        weights["threshold"] = pick(sae.threshold)
    return Encoder(handle, index, weights)


def decode(handle: SAEHandle, acts: Tensor) -> Tensor:
    """Reconstruction ``[..., d_in]`` of ``acts [..., d_sae]``; call right after encoding the same rows."""
    decoded: Any = handle.sae.decode(acts)
    return decoded


def centered(handle: SAEHandle, hidden: Tensor) -> Tensor:
    """``hidden`` as the SAE wants it: float32, minus its mean over ``d_model`` where the handle says so."""
    hidden = hidden.float()
    return hidden - hidden.mean(dim=-1, keepdim=True) if handle.center else hidden


def pool(pre: Tensor, gate: Tensor, span: Tensor, readout: Readout) -> tuple[Tensor, Tensor]:
    """Pool ``[row, token, feature]`` over the tokens of ``span [row, token]`` (bool), keeping x = gate * pre exact.

    ``last``: the last token of the span. ``max``: the token where x is largest; gate says whether any was active.
    ``mean``: gate is the share of active tokens and pre the mean activation where active.
    """
    if readout == "last":
        return pre[:, -1], gate[:, -1]
    mask = span.unsqueeze(-1)
    if readout == "mean":
        active = (gate * mask).sum(1)
        total = (gate * pre * mask).sum(1)
        silent = (pre * mask).sum(1) / mask.sum(1)
        mean_active = torch.where(active > 0, total / active.clamp(min=1), silent)
        return mean_active, active / mask.sum(1)
    any_active = (gate * mask).amax(1)
    score = torch.where(mask & (gate > 0), pre, torch.where(mask & (any_active.unsqueeze(1) == 0), pre, -torch.inf))
    return score.amax(1), any_active
