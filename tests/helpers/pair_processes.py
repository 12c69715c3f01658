"""Trainings on two processes whose pairs are attributed; started by torchrun, told by files.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.helpers.pair_processes SAE OUT``
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

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


@contextmanager
def failing(faults: dict[tuple[type[Any], str], tuple[int, ...]]) -> Iterator[None]:
    """Context in which methods raise at the calls of these numbers, from 1."""
    real = {place: getattr(*place) for place in faults}

    def broken(place: tuple[type[Any], str]) -> Callable[..., Any]:
        calls = itertools.count(1)

        def method(*given: Any) -> Any:
            if next(calls) in faults[place]:
                raise RuntimeError(f"{place[1]} is out of luck")
            return real[place](*given)

        return method

    for place in faults:
        setattr(*place, broken(place))
    yield
    for place, method in real.items():
        setattr(*place, method)


class Restless(TrainerCallback):
    """Allocates memory between epochs, so that nothing new lies where something old was."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept += [[None] * size for size in range(2000)]


def main(sae: Path, out: Path) -> None:
    rank = int(os.environ["RANK"])

    def watched(name: str, **options: Any) -> list[list[torch.Tensor]]:
        sinks = [StoreSink(out / name)] if rank == 0 else []
        plan = pair_plan(sae, sinks, **options)
        return train(out / "trainer", MeasuringCallback(plan), dropout=0.0, rows_per_process=2)

    found: dict[str, Any] = {"without": train(out / "trainer", dropout=0.0, rows_per_process=2)}
    found["watched"] = watched("store")
    found["every"] = watched("every", every=2)
    faults: list[dict[tuple[type[Any], str], tuple[int, ...]]] = [
        {(Attributor, "before_step"): (4,)},
        {(PairCapture, "take"): (2,), (Captured, "to"): (2,), (PairCapture, "attach"): (5,)},
    ]
    with failing(faults[rank]):
        found["failing"] = watched("failing")

    sinks = [StoreSink(out / "epochs")] if rank == 0 else []
    watching = MeasuringCallback(pair_plan(sae, sinks))
    train(out / "trainer", watching, Restless(), dropout=0.0, rows=8)

    began = time.monotonic()
    with failing({(Attributor, "before_step"): (2,)}):
        try:
            train(out / "trainer", MeasuringCallback(replace(pair_plan(sae), on_error="raise")), dropout=0.0)
        except RuntimeError as error:
            found["raised"] = str(error)
    found["waited"] = time.monotonic() - began
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
