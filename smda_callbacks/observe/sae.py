"""Loading a sparse autoencoder through sae-lens and refusing those that would be read wrongly.

sae-lens loads; it neither wraps nor hooks the training model. Encoding is in ``observe.features``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smda_callbacks.observe.activations import HookSite, find_module, parse_hook, unwrap

#: Architectures whose activations are a 0/1 gate times a continuous pre-activation. BatchTopK and Matryoshka SAEs are
#: saved by sae-lens as jumprelu.
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")

#: Normalisation modes that sae-lens computes at inference; the others must be folded into the weights first.
APPLIED_NORMS = ("none", "layer_norm", "constant_norm_rescale")


class SAEError(ValueError):
    """An SAE that cannot be loaded, or does not fit the model."""


@dataclass(frozen=True)
class SAEHandle:
    """A loaded SAE in evaluation mode, float32, and where it reads."""

    id: str
    sae: Any  # sae_lens.SAE
    architecture: str
    site: HookSite
    d_in: int
    d_sae: int
    model_name: str | None
    neuronpedia_id: str | None
    center: bool = False

    @property
    def hash(self) -> str:
        """SHA-256 over the weights, in the order of their names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.sae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> SAEHandle:
        """The same SAE on another device."""
        return replace(self, sae=self.sae.to(device))


def load_sae(
    source: str | Path,
    sae_id: str | None = None,
    *,
    device: str | torch.device = "cpu",
    hook_name: str | None = None,
    norm_scaling_factor: float | None = None,
    center: bool = False,
) -> SAEHandle:
    """Load an SAE from a local folder, the sae-lens registry, or a Hugging Face repository.

    Args:
        source: a folder with ``cfg.json`` and ``sae_weights.safetensors``, a registry release, or ``owner/name``.
        sae_id: the id inside the release or repository; not used for a local folder.
        hook_name: overrides the hook in the SAE's own metadata.
        norm_scaling_factor: the activation scale to fold in when the SAE was saved with an unfolded average norm.
        center: subtract the mean over ``d_model`` before encoding: what TransformerLens's weight processing does to
            the residual stream of LayerNorm models (GPT-2, Pythia).

    Raises:
        SAEError: not found, unsupported architecture, normalisation that would silently be left out, or unknown hook.
    """
    sae = _load(source, sae_id, device)
    identity = str(Path(source).name) if Path(source).is_dir() else f"{source}/{sae_id}"
    _settle_normalisation(sae, identity, norm_scaling_factor)
    architecture = sae.cfg.architecture()
    if architecture not in ARCHITECTURES:
        raise SAEError(
            f"SAE {identity!r} has architecture {architecture!r}. Allowed: {', '.join(ARCHITECTURES)} (BatchTopK and "
            "Matryoshka count as jumprelu). Next step: choose a residual-stream SAE of one of these."
        )
    if getattr(sae.cfg, "reshape_activations", "none") != "none":
        raise SAEError(
            f"SAE {identity!r} reads single attention heads (hook_z). Allowed: residual stream and MLP output."
        )
    metadata = sae.cfg.metadata
    return SAEHandle(
        id=identity,
        sae=sae.eval().requires_grad_(False),
        architecture=architecture,
        site=parse_hook(hook_name or metadata.hf_hook_name or metadata.hook_name),
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        model_name=metadata.model_name,
        neuronpedia_id=metadata.neuronpedia_id,
        center=center,
    )


def check_fit(handle: SAEHandle, model: nn.Module, *, allow_model_mismatch: bool = False) -> None:
    """Refuse an SAE that does not belong to ``model``: layer, width, model id.

    Raises:
        SAEError: width or model id differ.
        HookError: the layer does not exist.
    """
    find_module(model, handle.site)
    config = unwrap(model).config
    width = config.get_text_config().hidden_size
    if handle.d_in != width:
        raise SAEError(
            f"SAE {handle.id!r} reads activations of width {handle.d_in}, but {type(unwrap(model)).__name__} has width "
            f"{width}. Next step: choose an SAE that was trained on this model."
        )
    trained_on, here = _short(handle.model_name), _short(getattr(config, "_name_or_path", ""))
    if trained_on and here and trained_on != here and not allow_model_mismatch:
        raise SAEError(
            f"SAE {handle.id!r} was trained on {handle.model_name!r}, but the model is {config._name_or_path!r}. An "
            "SAE of the base model is often used on its chat model; if that is what you want, set "
            "sae.allow_model_mismatch: true and watch FVU at the start (smda check prints it)."
        )


def _load(source: str | Path, sae_id: str | None, device: str | torch.device) -> Any:
    from sae_lens import SAE  # heavy import, only when an SAE is needed

    if Path(source).is_dir():
        missing = [name for name in ("cfg.json", "sae_weights.safetensors") if not (Path(source) / name).is_file()]
        if missing:
            raise SAEError(
                f"SAE folder {Path(source).name!r} has no {' and no '.join(missing)}. Next step: save the SAE with "
                "sae-lens (save_model, or save_inference_model after training)."
            )
        return SAE.load_from_disk(str(source), device=str(device), dtype="float32")
    if sae_id is None:
        raise SAEError(
            f"SAE {str(source)!r} is no folder here, and no sae_id is given. Next step: give a folder, or a release of "
            "the sae-lens registry (or a repository owner/name) together with sae_id."
        )
    try:
        return SAE.from_pretrained(str(source), sae_id, device=str(device), dtype="float32")
    except Exception as error:
        raise SAEError(
            f"SAE {sae_id!r} of {str(source)!r} cannot be loaded: {error}{_nearest_release(str(source))}"
        ) from error


def _nearest_release(release: str) -> str:
    from difflib import get_close_matches

    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release in directory:
        return f" Ids of this release: {', '.join(list(directory[release].saes_map)[:8])}, ..."
    close = get_close_matches(release, directory, n=3, cutoff=0.3)
    return f" Registry releases with a similar name: {', '.join(close)}." if close else ""


def _settle_normalisation(sae: Any, identity: str, factor: float | None) -> None:
    mode = sae.cfg.normalize_activations
    if mode == "expected_average_only_in" and factor is not None:
        sae.fold_activation_norm_scaling_factor(factor)
        return
    if mode not in APPLIED_NORMS:
        raise SAEError(
            f"SAE {identity!r} was saved with normalize_activations={mode!r} unfolded: sae-lens would leave it out "
            f"without a word. Allowed: {', '.join(APPLIED_NORMS)}. Next step: save it with save_inference_model (which "
            "folds the norm), or set sae.norm_scaling_factor (for expected_average_only_in)."
        )


def _short(name: str | None) -> str:
    return Path(str(name or "")).name.lower()
