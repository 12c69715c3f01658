"""What a process holds on to after a reading that failed: nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from smda_callbacks.observe.sharding import Command, Team


class Alone(Team):
    """A process that hears nothing of the others."""

    def tell(self, command: Command) -> None:
        pass

    def gather(self, found: Any) -> list[Any]:
        return [[]] if self.rank == 0 else []


class Held:
    """Stands for what a pass has allocated."""


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_failed_pass_had_allocated_is_let_go_of_at_once(rank: int) -> None:
    """Not when Python next looks for cycles: training goes on, and wants the memory."""
    seen: list[weakref.ref[Held]] = []

    def own() -> Any:
        held = Held()
        seen.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def read() -> None:
        team = Alone(rank, 2, None)
        if rank:
            team.answer(own)
            return
        with pytest.raises(RuntimeError, match="out of memory") as caught:
            team.read(Command("gradients"), own)
        del caught

    gc.collect()
    gc.disable()
    try:
        read()
        assert seen[0]() is None
    finally:
        gc.enable()
