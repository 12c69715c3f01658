"""Layers below everything that training changes: what they make of the probes is computed once and kept.

The stream that enters layer L is then the same at every reading, so a pass may begin there: layers below it hand on
what they get, and a hook on layer L puts in what was kept. Nothing is approximated, and the numbers are the same to
the last bit: the same operations on the same tensors, less often. What is kept counts only as long as the weights below
are the same objects in the same memory, with the same version and the same sums.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from smda_callbacks.observe.activations import HookSite, decoder_layers
from smda_callbacks.observe.untrained import Weights, after_layers, lowest_trained, placed_modules

logger = logging.getLogger("smda_callbacks")

#: Which pass over which rows: number of the first probe, rows, columns left out.
Key = tuple[int, int, int]

#: How often the weights below may turn out to have changed before nothing is kept any more.
PATIENCE = 3


@dataclass(frozen=True)
class Kept:
    """What a pass over some rows leaves below layer L: the stream that enters it, and the site if that is lower."""

    stream: Tensor  # [row, token, d_model]
    site: Tensor | None  # [row, token, d_in]
    versions: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [each for each in (self.stream, self.site) if each is not None]

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self.tensors)

    @property
    def untouched(self) -> bool:
        """Whether nothing was written into it: a layer that works in place would spoil it."""
        return tuple(each._version for each in self.tensors) == self.versions


class LowerLayers:
    """Keeps what the untrained lower layers of one model make of the probes, up to ``limit`` bytes.

    ``first``: layer that passes begin at, as of the last :meth:`begin`; 0 where nothing is kept.
    """

    def __init__(self, limit: int, first: int = 0) -> None:
        self.limit, self.first, self.bytes = limit, first, 0
        self._kept: dict[Key, Kept] = {}
        self._weights: Weights | None = None
        self._faults = 0
        self._full = False
        self._too_large: set[Hashable] = set()
        self._blamed: tuple[Hashable, int] | None = None  # whose pass made room, and the limit until then

    def begin(self, model: nn.Module) -> None:
        """Before a reading: find the layer that it may begin at, and forget what no longer holds."""
        self.first, self._blamed = 0, None
        if not self.limit or self._faults == PATIENCE:
            return
        placed, late = placed_modules(model), after_layers(model)
        self.first = lowest_trained(placed, late)
        if not self.first:
            return
        now = Weights.below(model, self.first, placed, late)
        if self._weights is not None and not self._weights.same_as(now):
            self._changed()
        self._weights = now

    def _changed(self) -> None:
        if self._kept:
            self._faults += 1
            logger.info(
                "the layers below the trained ones have changed since the last reading, so what was kept of them is "
                "computed anew%s",
                "; this happens often, so nothing is kept from now on" if self._faults == PATIENCE else "",
            )
        self.forget()
        self.first = self.first if self._faults < PATIENCE else 0

    def forget(self) -> None:
        """Let go of everything that is kept."""
        self._kept, self.bytes, self._full = {}, 0, False

    def give_way(self, what: Hashable) -> bool:
        """Let go of everything, for memory did not suffice for the pass ``what``; False where that is no help.

        Half as much is kept from then on, or the next pass would find as little room. A pass that does not fit with
        nothing kept either has nothing to do with it: the limit stays, and it is known for the next time.
        """
        if not self.bytes:
            self.limit = self._blamed[1] if self._blamed is not None and self._blamed[0] == what else self.limit
            self._blamed = None
            self._too_large.add(what)
            return False
        if what in self._too_large:
            return False
        logger.info(
            "out of memory with %.2f GiB kept of what lower layers make of the probes: it is let go, and at most half "
            "of it kept from now on. Next step: lower measure.keep_gib or measure.batch_size",
            self.bytes / 2**30,
        )
        self._blamed = (what, self.limit)
        self.limit = self.bytes // 2
        self.forget()
        self._full = True  # raising the room, as is advised where it is small, would be wrong here
        return True

    def drop(self, key: Key) -> None:
        """Let go of one pass."""
        kept = self._kept.pop(key, None)
        self.bytes -= kept.bytes if kept is not None else 0

    def of(self, key: Key) -> Kept | None:
        """What is kept of a pass, if anything is."""
        kept = self._kept.get(key) if self.first else None
        if kept is not None and not kept.untouched:
            self.drop(key)
            return None
        return kept

    def add(self, key: Key, stream: Tensor, site: Tensor | None) -> None:
        """Keep what a pass showed, if there is room."""
        self.drop(key)
        given = [each.detach() for each in (stream, site) if each is not None]
        if self.bytes + sum(each.numel() * each.element_size() for each in given) <= self.limit:
            tensors = [each.clone() for each in given]
            kept = Kept(tensors[0], tensors[1] if site is not None else None, tuple(t._version for t in tensors))
            self._kept[key] = kept
            self.bytes += kept.bytes
        elif not self._full:
            self._full = True
            logger.info(
                "what the layers below layer %d make of the probes is kept in part only: measure.keep_gib allows "
                "%.2f GiB. Next step: raise it, for readings that cost less",
                self.first, self.limit / 2**30,
            )  # fmt: skip

    def is_below(self, site: HookSite) -> bool:
        """Whether the site is reached before layer ``first``; what enters that layer is seen there."""
        return site.layer < self.first


@contextlib.contextmanager
def begun_at(model: nn.Module, first: int, stream: Tensor) -> Iterator[None]:
    """Context in which forward passes begin at layer ``first``, whose input is ``stream``."""
    layers: Sequence[Any] = list(decoder_layers(model))
    put_in = layers[first].register_forward_pre_hook(_replaced_by(stream), with_kwargs=True)
    before = [vars(layer).get("forward") for layer in layers[:first]]
    try:
        for layer in layers[:first]:
            layer.forward = _hand_on
        yield
    finally:
        put_in.remove()
        for layer, forward in zip(layers[:first], before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def _hand_on(*args: Any, **kwargs: Any) -> Any:
    """A layer that does nothing."""
    return args[0] if args else kwargs["hidden_states"]


def _replaced_by(stream: Tensor) -> Any:
    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (stream, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": stream}

    return replace


@contextlib.contextmanager
def seen_entering(model: nn.Module, first: int) -> Iterator[list[Tensor]]:
    """Context that collects what enters layer ``first``."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = decoder_layers(model)[first].register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
