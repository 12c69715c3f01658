"""Which savings a model bears: each is tried on two probes before a run relies on it, and said if it is left out.

Families differ in what travels from layer to layer, and in what their attention and MLPs take. Nearly all bear all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from smda_callbacks.observe.activations import unwrap
from smda_callbacks.observe.batches import ProbeBatch, ProbeBatches
from smda_callbacks.observe.features import Readout
from smda_callbacks.observe.kept import LowerLayers
from smda_callbacks.observe.memory import is_out_of_memory
from smda_callbacks.observe.savings import Saving, SavingOptions, worthwhile_prefix

logger = logging.getLogger("smda_callbacks")

#: How far a trial may be off, relative to the numbers' size. Passes that begin at a higher layer make the same
#: operations on the same tensors; others round otherwise, as TF32 does (numbers of four bytes) or bfloat16 (of two).
SAME, ROUNDED, COARSE = 1e-5, 1e-3, 0.1

#: A pass over a batch with savings: stream ``[row, token, d]`` and log P of the tree's edges ``[row, edge]``.
Pass = Callable[[ProbeBatch, Saving], tuple[Tensor, Tensor]]

#: Puts keys and values of the shared start into a saving that leaves it out of rows.
StatesOf = Callable[[Saving, ProbeBatch], Saving]

_TOLD = {
    "trim": ("computing the last layer's MLP only where it is read", "trim: false"),
    "lower": ("keeping what the untrained lower layers make of the probes", "keep_gib: 0"),
    "prefix": ("computing the start that all probes share only once", "share_prefix: false"),
}


class Savings:
    """The savings of one instrument, over all of its readings: what is kept, and what the model bears."""

    def __init__(self, options: SavingOptions | None = None) -> None:
        self.options = SavingOptions() if options is None else options
        self.lower = LowerLayers(int(self.options.keep_gib * 2**30))
        self._borne: dict[tuple[str, int, type], bool] = {}

    def begin(
        self,
        model: nn.Module,
        batches: ProbeBatches,
        readout: Readout,
        one_pass: Pass,
        states: StatesOf,
        *,
        gradients: bool,
    ) -> Saving:
        """What a reading that begins now may leave out."""
        self.lower.begin(model)
        skip = worthwhile_prefix(batches) if self.options.share_prefix and not gradients else 0
        wanted = {"trim": int(self.options.trim), "lower": self.lower.first, "prefix": skip}
        kind, two, none = type(unwrap(model)), batches.batches[0].rows(0, 2), Saving(readout=readout)
        untried = {
            what: number for what, number in wanted.items() if number and (what, number, kind) not in self._borne
        }
        if untried:
            with torch.no_grad():
                self._try(untried, kind, two, none, one_pass, states)
        borne = {what for what, number in wanted.items() if self._borne.get((what, number, kind), False)}
        saving = replace(none, trim="trim" in borne, lower=self.lower if "lower" in borne else None)
        return states(replace(saving, skip=skip), batches.batches[0]) if "prefix" in borne else saving

    def _try(
        self, untried: dict[str, int], kind: type, two: ProbeBatch, none: Saving, one_pass: Pass, states: StatesOf
    ) -> None:
        """Read two probes without savings and with each.

        Where memory does not suffice, or numbers are not finite, nothing is known of the model: it is asked again.
        """
        try:
            stream, edges = one_pass(two, none)
        except RuntimeError as error:
            if is_out_of_memory(error):
                return
            raise
        if not (torch.isfinite(stream).all() and torch.isfinite(edges).all()):
            return
        for what, number in untried.items():
            try:
                found = _with(what, number, two, none, one_pass, states)
                tolerance = SAME if what == "lower" else COARSE if stream.dtype.itemsize < 4 else ROUNDED
                borne = alike(stream[:, -1], found[0][:, -1], tolerance) and alike(edges, found[1], tolerance)
            except Exception as error:
                logger.debug("a saving failed on trial", exc_info=error)
                if is_out_of_memory(error):
                    continue
                borne = False
            self._borne[what, number, kind] = borne
            if not borne:
                logger.warning(
                    "%s was tried on two probes of this %s and does not give the same, so readings do without; "
                    "measure.%s leaves out the trial",
                    _TOLD[what][0], kind.__name__, _TOLD[what][1],
                )  # fmt: skip


def _with(
    what: str, number: int, two: ProbeBatch, none: Saving, one_pass: Pass, states: StatesOf
) -> tuple[Tensor, Tensor]:
    if what == "trim":
        return one_pass(two, replace(none, trim=True))
    if what == "prefix":
        return one_pass(two, states(replace(none, skip=number), two))
    trial = replace(none, lower=LowerLayers(2**62, first=number))
    one_pass(two, trial)  # which keeps
    return one_pass(two, trial)


def alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether ``b`` is ``a`` but for this share of its size."""
    error, size = (a.double() - b.double()).norm(), a.double().norm()
    return bool((error <= tolerance * size).item())
