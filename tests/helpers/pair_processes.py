"""Trainings on two processes whose pairs are attributed; started by torchrun, told by files.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.helpers.pair_processes SAE OUT``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from smda_callbacks.observe.pair_gradients import Captured, PairCapture
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.training.attribution import Attributor
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.plan import Plan
from tests.helpers.processes import make_plan, train


def pair_plan(sae: Path, sinks: Sequence[Sink] = (), **options: Any) -> Plan:
    return replace(make_plan(sae, sinks), attribution=AttributionOptions(renew=None, **options), noise_draws=0)


class Failing:
    """``PairCapture.take`` that fails on one process at one call, and ``Attributor.before_step`` likewise."""

    def __init__(self, rank: int) -> None:
        self.rank, self.takes, self.befores = rank, 0, 0
        self.take, self.before_step = PairCapture.take, Attributor.before_step

    def install(self) -> None:
        fault = self

        def take(capture: PairCapture) -> Captured:
            fault.takes += 1
            if fault.rank == 1 and fault.takes == 2:
                raise RuntimeError("out of luck")
            return fault.take(capture)

        def before_step(attributor: Attributor, optimizer: Any) -> None:
            fault.befores += 1
            if fault.befores == 4:
                raise RuntimeError("out of luck, too")
            fault.before_step(attributor, optimizer)

        PairCapture.take, Attributor.before_step = take, before_step  # type: ignore[method-assign]

    def remove(self) -> None:
        PairCapture.take, Attributor.before_step = self.take, self.before_step  # type: ignore[method-assign]


def main(sae: Path, out: Path) -> None:
    rank = int(os.environ["RANK"])

    def watched(name: str, **options: Any) -> list[list[torch.Tensor]]:
        sinks = [StoreSink(out / name)] if rank == 0 else []
        plan = pair_plan(sae, sinks, **options)
        return train(out / "trainer", MeasuringCallback(plan), dropout=0.0, rows_per_process=2)

    found: dict[str, Any] = {"without": train(out / "trainer", dropout=0.0, rows_per_process=2)}
    found["watched"] = watched("store")
    found["every"] = watched("every", every=2)
    failing = Failing(rank)
    failing.install()
    found["failing"] = watched("failing")
    failing.remove()
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
