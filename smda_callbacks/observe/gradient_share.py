"""What the other processes of a training (DDP) do for the gradients that the main one reads: a share of the batches.

The main process is :func:`smda_callbacks.observe.probe_gradients.gradient_reading`. What goes wrong here is sent in
place of a part of the reading, so that nothing is added up, and the main process knows why.
"""

from __future__ import annotations

from torch import Tensor, nn

from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.lora import LoraSite, lora_sites
from smda_callbacks.observe.memory import is_out_of_memory
from smda_callbacks.observe.probe_gradients import NO_ROOM, add_features, basis_visitor, zeros
from smda_callbacks.observe.reading import Part
from smda_callbacks.observe.sharding import Command, ProcessError, Team


class GradientShare:
    """Gradients over one process's batches. Holds them until they are added up, or something else is asked for."""

    def __init__(self, model: nn.Module, team: Team) -> None:
        self._model, self._team = model, team
        self._held: list[Tensor] = []

    def parts(self, command: Command, instrument: Instrument) -> list[Part]:
        """Do what ``command`` asks for with the batches of this process; returns its part of the reading.

        Raises:
            ProcessError: out of memory. Other errors come through as they are.
        """
        self.forget()
        sites = lora_sites(self._model)
        try:
            take = self._basis if command.what == "gradients" else self._features
            return take(command, instrument, sites)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            instrument.savings.lower.give_way("gradients")
            raise ProcessError(NO_ROOM) from error

    def add_up(self) -> None:
        """Add what is held up on the main process."""
        try:
            self._team.add_up(self._held)
        finally:
            self.forget()

    def forget(self) -> None:
        """Let go of what is held."""
        self._held = []

    def _basis(self, command: Command, instrument: Instrument, sites: tuple[LoraSite, ...]) -> list[Part]:
        assert command.functionals is not None
        assert command.scale is not None
        with basis_visitor(instrument, sites, command.functionals, command.scale) as (visit, basis):
            parts = instrument.read_share(self._model, visit)
        self._held = basis
        return parts

    def _features(self, command: Command, instrument: Instrument, sites: tuple[LoraSite, ...]) -> list[Part]:
        assert command.slope is not None
        sums = zeros(sites, len(command.slope))
        add_features(instrument, self._model, sites, command.slope, [list(total) for total in sums])
        self._held = sums
        return []
