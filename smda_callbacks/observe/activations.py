"""From an SAE's hook name to a module of a Hugging Face model, under PEFT, DDP and compile wrappers, and its capture.

Hook names follow TransformerLens (``blocks.12.hook_resid_post``) or Hugging Face (``model.layers.12``, optionally with
``.output``). The residual stream after block N is the output of decoder layer N in every supported family.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

HookKind = Literal["resid_post", "resid_pre", "mlp_out"]

#: TransformerLens hook suffix -> kind of site that can be read.
HOOK_KINDS: dict[str, HookKind] = {
    "hook_resid_post": "resid_post",
    "hook_resid_pre": "resid_pre",
    "hook_mlp_out": "mlp_out",
}

_TL_NAME = re.compile(r"^blocks\.(\d+)\.(.+)$")
_HF_NAME = re.compile(r"^(?:[\w.]+\.)?(?:layers|h)\.(\d+)(?:\.output)?$")


class HookError(ValueError):
    """A hook name that this model cannot be read at."""


@dataclass(frozen=True)
class HookSite:
    """Where the SAE reads: layer ``layer`` of the decoder, at ``kind``."""

    name: str
    layer: int
    kind: HookKind


def parse_hook(name: str) -> HookSite:
    """Read a TransformerLens or Hugging Face hook name.

    Raises:
        HookError: the name is not understood, or names a site that is not supported.
    """
    if match := _TL_NAME.match(name or ""):
        kind = HOOK_KINDS.get(match[2])
        if kind is not None:
            return HookSite(name, int(match[1]), kind)
    elif match := _HF_NAME.match(name or ""):
        return HookSite(name, int(match[1]), "resid_post")
    raise HookError(
        f"hook name {name!r} cannot be read. Supported: blocks.N.{{{', '.join(HOOK_KINDS)}}} and Hugging Face layer "
        "paths such as model.layers.N. Next step: choose an SAE of the residual stream, or set sae.hook_name yourself."
    )


def unwrap(model: nn.Module) -> Any:
    """The Hugging Face model inside DDP, torch.compile and PEFT wrappers; adapters stay active."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module) and not hasattr(inner, "config"):  # DDP
            inner = inner.module
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        else:
            return inner


def model_id(model: nn.Module) -> str:
    """The model's hub id, or the name of the folder that it was loaded from: no path of a machine goes into records."""
    name = str(getattr(unwrap(model).config, "_name_or_path", ""))
    return Path(name).name if Path(name).is_dir() else name


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a Hugging Face causal language model.

    Raises:
        HookError: no list of ``num_hidden_layers`` blocks is found.
    """
    inner = unwrap(model)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    count = inner.config.get_text_config().num_hidden_layers
    for owner in (decoder, getattr(inner, "base_model", None), inner):
        for attribute in ("layers", "h", "blocks"):
            layers = getattr(owner, attribute, None)
            if isinstance(layers, nn.ModuleList) and len(layers) == count:
                return layers
    raise HookError(
        f"no list of {count} decoder blocks found in {type(inner).__name__}. Supported: decoder-only models of the "
        "Llama, Mistral, Qwen, Gemma, GPT-NeoX, GPT-2 and Phi families. Next step: report the model class."
    )


def find_module(model: nn.Module, site: HookSite) -> nn.Module:
    """The module whose input (``resid_pre``) or output (the others) is the site.

    Raises:
        HookError: the layer does not exist, or has no such sub-module.
    """
    layers = decoder_layers(model)
    if not 0 <= site.layer < len(layers):
        raise HookError(
            f"hook {site.name!r} names layer {site.layer}, but {type(unwrap(model)).__name__} has layers 0 to "
            f"{len(layers) - 1}. Next step: choose an SAE that was trained on this model."
        )
    layer: Any = layers[site.layer]
    if site.kind != "mlp_out":
        return layer
    # Gemma 2 and 3 normalise the MLP output before it joins the residual stream; TransformerLens hooks after that.
    module = getattr(layer, "post_feedforward_layernorm", None) or getattr(layer, "mlp", None)
    if module is None:
        names = ", ".join(name for name, _ in layer.named_children())
        raise HookError(f"hook {site.name!r}: {type(layer).__name__} has no mlp. Its parts: {names}.")
    return module


@contextlib.contextmanager
def captured(
    model: nn.Module, site: HookSite, *, into: list[torch.Tensor] | None = None
) -> Iterator[list[torch.Tensor]]:
    """Context that appends the site's activation ``[row, token, d_model]`` of every forward pass to the list it yields.

    The hook exists only inside the context: a permanent one would change compiled graphs.
    """
    module = find_module(model, site)
    seen: list[torch.Tensor] = [] if into is None else into

    def keep_output(_: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    if site.kind == "resid_pre":
        handle = module.register_forward_pre_hook(keep_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(keep_output)
    try:
        yield seen
    finally:
        handle.remove()
