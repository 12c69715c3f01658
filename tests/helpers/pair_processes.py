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

from smda_callbacks.observe import probe_gradients
from smda_callbacks.observe.lora import lora_sites
from smda_callbacks.observe.pair_gradients import Captured, PairCapture
from smda_callbacks.observe.probe_gradients import gradient_reading
from smda_callbacks.observe.sharding import ProcessError, join_team
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.training.attribution import Attributor
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.ghost import Ghost
from smda_callbacks.training.plan import Plan
from tests.helpers.processes import make_plan, train


def pair_plan(sae: Path, sinks: Sequence[Sink] = (), **options: Any) -> Plan:
    return replace(make_plan(sae, sinks), attribution=AttributionOptions(renew=None, **options), noise_draws=0)


@contextmanager
def failing(faults: dict[tuple[Any, str], tuple[int, ...]]) -> Iterator[None]:
    """Context in which methods, or functions of a module, raise at the calls of these numbers, from 1."""
    real = {place: getattr(*place) for place in faults}

    def broken(place: tuple[Any, str]) -> Callable[..., Any]:
        calls = itertools.count(1)

        def method(*given: Any, **named: Any) -> Any:
            if next(calls) in faults[place]:
                raise RuntimeError(f"{place[1]} is out of luck")
            return real[place](*given, **named)

        return method

    for place in faults:
        setattr(*place, broken(place))
    yield
    for place, method in real.items():
        setattr(*place, method)


@contextmanager
def visited() -> Iterator[dict[str, list[list[int]]]]:
    """Context that collects the probes of every batch whose gradients this process takes, in the order of passes."""
    seen: dict[str, list[list[int]]] = {"scores": [], "features": []}
    local_slopes, prompt_pass = probe_gradients.local_slopes, probe_gradients.prompt_pass

    def scores(functionals: Any, probes: Any, *given: Any, **named: Any) -> Any:
        seen["scores"].append(probes.tolist())
        return local_slopes(functionals, probes, *given, **named)

    def features(model: Any, batch: Any, *given: Any) -> Any:
        seen["features"].append(batch.index.tolist())
        return prompt_pass(model, batch, *given)

    probe_gradients.local_slopes, probe_gradients.prompt_pass = scores, features
    yield seen
    probe_gradients.local_slopes, probe_gradients.prompt_pass = local_slopes, prompt_pass


class Alone(TrainerCallback):
    """Takes all gradients on the main process after every step, and compares with what the processes took together.

    ``errors``: per reading and functional the norm of the difference over the norm.
    """

    def __init__(self, watching: MeasuringCallback) -> None:
        self.watching, self.errors = watching, list[list[float]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        monitor = self.watching.monitor
        if monitor is None or monitor.attributor is None:
            return
        engine, policy, model = monitor.attributor.engine, monitor.policy, kwargs["model"]
        assert isinstance(engine, Ghost)
        assert engine.last is not None
        _, alone = gradient_reading(
            monitor.instrument.with_team(None),
            model,
            lora_sites(model),
            monitor.attributor.functionals,
            scale=policy.scale,
            lam=policy.lam,
        )
        one, together = torch.cat(alone, dim=1), torch.cat(engine.last, dim=1)
        self.errors.append(((together - one).norm(dim=1) / one.norm(dim=1)).tolist())


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
        watching = MeasuringCallback(pair_plan(sae, sinks, **options))
        alone = [Alone(watching)] if name == "store" else []
        found["errors"] = [each.errors for each in alone] or found["errors"]
        return train(out / "trainer", watching, *alone, dropout=0.0, rows_per_process=2)

    found: dict[str, Any] = {"errors": [], "without": train(out / "trainer", dropout=0.0, rows_per_process=2)}
    found["watched"] = watched("store")
    with visited() as found["visited"]:
        found["every"] = watched("every", every=2)
    faults: list[dict[tuple[Any, str], tuple[int, ...]]] = [
        {(Attributor, "before_step"): (4,)},
        {(PairCapture, "take"): (2,), (Captured, "to"): (2,), (PairCapture, "attach"): (5,)},
    ]
    with failing(faults[rank]):
        found["failing"] = watched("failing")
    # Of its batches the main process reads three and the other two, per reading with gradients: one at the start, then
    # one after every step, and one more where the last one failed.
    faults = [
        {(probe_gradients, "local_slopes"): (20,)},  # the seventh reading, after step 4
        {(probe_gradients, "local_slopes"): (4,), (probe_gradients, "pool"): (6,)},  # the second and the fourth
    ]
    with failing(faults[rank]):
        found["gradients"] = watched("gradients")

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

    team = join_team()
    assert team is not None
    sums = [torch.full((4,), 1.0 + rank), torch.full((2,), 10.0 + 10 * rank, dtype=torch.float64)]
    team.add_up(sums)
    found["sums"] = [each.tolist() for each in sums]
    try:
        team.add_up([torch.ones(3 + rank)])
    except ProcessError as error:
        found["different"] = str(error)
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
