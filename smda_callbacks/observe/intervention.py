"""Act on SAE features in the residual stream while the probes are read: does the model do what the policy says?

A feature is scaled by adding its decoder direction: ``(factor - 1) · x_j · d_j`` at the SAE's hook, 0 to ablate it.
What is measured then is a causal effect; what a policy predicts of it, ``Δz_j · β_j``, is a correlation over probes
until it agrees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from smda_callbacks.observe.activations import HookSite, find_module
from smda_callbacks.observe.batches import ProbeBatch
from smda_callbacks.observe.features import decode, encoder
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.reading import MASK_ATTENTION, Reading, assemble, read_parts, tree_in_one_pass
from smda_callbacks.observe.sae import SAEHandle

#: Where the stream is edited: at the last prompt token; at every token of the prompt but the start that all probes
#: share (the activations there are outliers that SAEs do not know); or at all.
Where = Literal["last", "prompt", "all"]

#: Residual stream ``[..., d_model]`` float32 -> what is added to it, same shape; told which probe every row is.
Edit = Callable[[Tensor, Tensor], Tensor]


class InterventionError(ValueError):
    """An intervention that cannot be made on this model."""


@dataclass(frozen=True)
class Scaling:
    """The edit that multiplies SAE features by ``factors`` (SAE index -> factor; 0 ablates) and leaves all else be."""

    handle: SAEHandle
    factors: Mapping[int, float]

    def __post_init__(self) -> None:
        wrong = [feature for feature in self.factors if not 0 <= feature < self.handle.d_sae]
        if wrong or not self.factors:
            raise InterventionError(
                f"features {wrong} are not in an SAE of {self.handle.d_sae:,}; allowed are 0 to "
                f"{self.handle.d_sae - 1}, one at least. Next step: give SAE indices, as in policy.features."
            )

    def __call__(self, hidden: Tensor, probes: Tensor) -> Tensor:
        pre, gate = encoder(self.handle)(hidden)
        acts = pre * gate
        changed = acts.clone()
        for feature, factor in self.factors.items():
            changed[..., feature] *= factor
        # The difference of two reconstructions: biases cancel, and whatever norm the SAE folds in applies to both.
        return decode(self.handle, changed) - decode(self.handle, acts)


class Recording:
    """A model's stream, kept by one reading and put into another's place by the next (activation patching).

    ``keep`` is the edit of the first, which changes nothing, ``put`` that of the second; both with one ``where``.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], Tensor] = {}

    def keep(self, hidden: Tensor, probes: Tensor) -> Tensor:
        """Remember the stream of these probes."""
        self._seen[tuple(probes.tolist())] = hidden.detach().clone()
        return torch.zeros_like(hidden)

    def put(self, hidden: Tensor, probes: Tensor) -> Tensor:
        """What turns this stream into the one that was kept."""
        kept = self._seen.get(tuple(probes.tolist()))
        if kept is None or kept.shape != hidden.shape:
            raise InterventionError(
                "these probes were not recorded, or elsewhere. Next step: read with Recording.keep first, with the "
                "same instrument and the same where."
            )
        return kept - hidden


def read_edited(model: nn.Module, instrument: Instrument, edit: Edit, where: Where = "last") -> Reading:
    """Read every probe with the residual stream edited at the SAE's hook; nothing stays behind in the model.

    Features are read behind the edit: what the SAE sees there then. A stream that is edited at the last prompt token is
    seen by the answer's tokens too, through attention.

    Raises:
        InterventionError: unknown ``where``, attention that reads openings in a pass of their own, or a batch that does
            not fit into memory.
        NotFiniteError: the edited model's activations are not finite.
    """
    if where not in get_args(Where):
        raise InterventionError(f"where is {where!r}. Allowed: {', '.join(get_args(Where))}. Next step: choose one.")
    if not tree_in_one_pass(model):
        raise InterventionError(
            f"the model's attention takes no masks of our own. Allowed: {', '.join(MASK_ATTENTION)}. Next step: load "
            "it with attn_implementation='sdpa'."
        )
    batches, site, parts = instrument.batches, instrument.handle.site, []
    for batch in batches.batches:
        with edited(model, site, _of_batch(batch, edit, where)):
            parts += read_parts(model, batches, [batch], site, instrument.encode, readout=instrument.readout)
    return assemble(parts, batches)


def _of_batch(batch: ProbeBatch, edit: Edit, where: Where) -> Callable[[Tensor], Tensor]:
    """The edit of a batch's whole stream ``[row, token, d_model]``, the columns of the openings left as they are."""
    own = int(batch.span.any(dim=0).int().argmax())
    start = {"last": batch.width, "prompt": own, "all": 0}[where]

    def whole(stream: Tensor) -> Tensor:
        if len(stream) != len(batch.index):  # half of a batch that did not fit: which half is not known here
            raise InterventionError(
                f"a batch of {len(batch.index)} probes does not fit into memory and would be read in parts. Next "
                f"step: build the instrument with batch_size={max(1, len(batch.index) // 2)}."
            )
        part = stream[:, start : batch.width + 1]
        changed = stream.clone()
        changed[:, start : batch.width + 1] = part + edit(part.float(), batch.index.to(stream.device)).to(part.dtype)
        return changed

    return whole


@contextlib.contextmanager
def edited(model: nn.Module, site: HookSite, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context in which every forward pass goes on with ``change`` of the site's activation ``[row, token, d_model]``.

    Hooks that are set inside of the context see the changed activation.
    """
    module = find_module(model, site)

    def of_output(_: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def of_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    if site.kind == "resid_pre":
        handle = module.register_forward_pre_hook(of_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(of_output)
    try:
        yield
    finally:
        handle.remove()
