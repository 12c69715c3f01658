"""What a reading need not compute again, or at all; each saving is exact but for rounding and has a switch.

* ``keep_gib``: layers below everything trained are computed once (:mod:`smda_callbacks.observe.kept`).
* ``share_prefix``: the start that all probes share (BOS, system prompt) is one row, whose keys and values every probe
  attends to. Not with gradients: those of single probes could not be told apart there.
* ``trim``: the last layer's MLP works only where next-token probabilities are read.

Savings are tried before they are relied on, see :mod:`smda_callbacks.observe.trials`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from smda_callbacks.observe.activations import HookSite, decoder_layers
from smda_callbacks.observe.batches import ProbeBatch, ProbeBatches
from smda_callbacks.observe.features import Readout
from smda_callbacks.observe.kept import Key, LowerLayers, begun_at, seen_entering

#: A shared start is worth a pass of its own from so many tokens on, if it saves this share of all tokens.
SHORTEST_PREFIX, LEAST_SAVED = 4, 0.03

KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SavingOptions:
    """Which savings readings make.

    Args:
        keep_gib: memory for what untrained lower layers make of the probes, on the model's device; 0: compute it anew.
        share_prefix, trim: see the module.
    """

    keep_gib: float = 1.0
    share_prefix: bool = True
    trim: bool = True

    def __post_init__(self) -> None:
        if not self.keep_gib >= 0:
            raise ValueError(f"keep_gib must be at least 0, got {self.keep_gib}.")


class Prefix(DynamicCache):
    """Keys and values of the shared start, which every row of a pass attends to; holds on to nothing else."""

    def __init__(self, states: dict[int, KeysAndValues], length: int) -> None:
        super().__init__()
        self.states, self.length = states, length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysAndValues:
        rows = len(key_states)
        keys, values = (each.expand(rows, -1, -1, -1) for each in self.states[layer_idx])
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


@dataclass(frozen=True)
class Saving:
    """The savings of one reading. The default makes none.

    ``lower``: None where every layer is computed. ``skip``: tokens of the shared start that rows leave out.
    """

    lower: LowerLayers | None = None
    skip: int = 0
    states: dict[int, KeysAndValues] = field(default_factory=dict)
    trim: bool = False
    readout: Readout = "mean"

    def inputs(self) -> dict[str, Any]:
        """Further arguments of the model."""
        return {"past_key_values": Prefix(self.states, self.skip)} if self.skip else {}

    @contextlib.contextmanager
    def lower_layers(
        self, model: nn.Module, batch: ProbeBatch, site: HookSite, *, end: int | None = None
    ) -> Iterator[Lower]:
        """Context in which the layers below the trained ones are left out of a pass, or seen, so that they are next
        time. ``end``: the pass has only so many of the columns (and is not kept for others)."""
        lower = self.lower
        if lower is None or not lower.first:
            yield Lower()
            return
        key: Key = (int(batch.index[0]), len(batch.index), self.skip)
        kept = lower.of(key)
        if kept is not None:
            with begun_at(model, lower.first, kept.stream[:, :end]):
                yield Lower(site=kept.site[:, :end] if kept.site is not None else None)
            return
        with seen_entering(model, lower.first) as seen:
            yield Lower(
                keep=lambda stream: (
                    lower.add(key, seen[0], stream if lower.is_below(site) else None) if seen and end is None else None
                )
            )

    @contextlib.contextmanager
    def trimmed(self, model: nn.Module, site: HookSite, columns: int) -> Iterator[None]:
        """Context in which the last layer's MLP works on the last ``columns`` tokens only, and adds nothing to the
        others: no token is read there, unless the site is that layer's and features are pooled over the prompt."""
        number = len(decoder_layers(model)) - 1
        pooled = site.layer == number and site.kind != "resid_pre" and self.readout != "last"
        with last_tokens(model, number, columns) if self.trim and not pooled else contextlib.nullcontext():
            yield


#: Computes everything.
NO_SAVING = Saving()


@dataclass(frozen=True)
class Lower:
    """A pass's lower layers. ``site``: what was kept of the site; ``keep``: called with it where it may be."""

    site: Tensor | None = None
    keep: Callable[[Tensor], None] = lambda stream: None


@contextlib.contextmanager
def last_tokens(model: nn.Module, layer: int, columns: int) -> Iterator[None]:
    """Context in which the MLP of a layer works on the last ``columns`` tokens and gives zero for the others."""
    mlp = getattr(decoder_layers(model)[layer], "mlp", None)
    if mlp is None:
        yield
        return
    widths: list[int] = []

    def cut(_: nn.Module, args: tuple[Any, ...]) -> Any:
        widths.append(args[0].shape[1] if args else columns)
        return (args[0][:, -columns:].contiguous(), *args[1:]) if args else None

    def pad(_: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        missing = widths.pop() - columns
        if missing <= 0:
            return None
        whole = torch.nn.functional.pad(first, (0, 0, missing, 0))
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    handles = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(pad)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def worthwhile_prefix(batches: ProbeBatches) -> int:
    """Length of the start that all probes share, where computing it once is worth while; else 0."""
    length = batches.shared
    tokens = sum(batch.input_ids.numel() for batch in batches.batches)
    saved = length * (batches.n_probes - 1)
    return length if length >= SHORTEST_PREFIX and saved >= LEAST_SAVED * tokens else 0
