"""Every method of attribution that the evidence compares: scores ``[pair, target]``, what a pair predictably does.

Sign and unit are those of an outcome: with the pair minus without it, so that the sum over pairs that are left out
predicts ``outcome of all - outcome without them``. A family makes several rows from one piece of work, and is made once
per run: scores are kept in the work folder. A target that a method says nothing of is NaN.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.evidence import formulae, live
from recipes.evidence.peers import PEERS
from recipes.evidence.retrain import Array, Batch, Run, losses
from recipes.evidence.truth import fingerprint
from smda_callbacks.observe.metagradient import TrajectoryStep, influence
from smda_callbacks.observe.noise import trained_parameters
from smda_callbacks.observe.optimizer_rules import AdamWRule, Moments


def rescore(run: Run, *, at_once: int = 8) -> dict[str, Array]:
    """The metagradient along the run's own trajectory, from the targets' gradients at its end."""
    model = run.model()
    parameters = trained_parameters(model)
    sizes = [each.numel() for each in parameters]
    total = np.zeros((len(run.pairs), len(run.targets)))

    def share_of_loss(batch: Batch) -> Tensor:
        return losses(model, batch) / batch.tokens

    steps = (_trajectory_step(run, k, sizes) for k in reversed(range(len(run.steps))))
    for found in influence(steps, run.queries.split(sizes, dim=1), share_of_loss, parameters, at_once=at_once):
        np.add.at(total, list(run.steps[found.number - 1].batch.pairs), found.scores.numpy())
    return {"rescore": total}


def _trajectory_step(run: Run, k: int, sizes: list[int]) -> TrajectoryStep:
    step, hyper = run.steps[k], run.setup.hyper
    before = zip(*(each.split(sizes) for each in (step.weights, step.first, step.second)), strict=True)
    rule = AdamWRule(step.lr, hyper.weight_decay, *hyper.betas, hyper.eps, step.number)
    return TrajectoryStep(
        step.number, tuple(Moments(*each) for each in before), (rule,) * len(sizes), hyper.max_grad_norm, (step.batch,)
    )


Family = Callable[[Run], dict[str, Array]]

#: Families by name. Rows of the same family share their cost.
FAMILIES: dict[str, Family] = {
    "random": formulae.random,
    "kind of pair": formulae.kind_of_pair,
    "rescore": rescore,
    "live ghost": live.ghost,
    "audit": live.audit,
    "gradients": formulae.gradients,
    "LESS": formulae.less,
    **{f"peer: {name}": partial(lambda name, run: {name: PEERS[name](run)}, name) for name in PEERS},
    "live exact": live.exact,
}

#: What ``--quick`` compares.
QUICK = ("random", "kind of pair", "rescore", "gradients")


@dataclass(frozen=True, eq=False)
class Scored:
    """``scores [pair, target]`` of one row, and the CPU seconds of its family."""

    name: str
    family: str
    scores: Array
    seconds: float


def scored(
    run: Run, families: Sequence[str], work: Path | None = None, *, missing: dict[str, str] | None = None
) -> Iterator[Scored]:
    """All rows of these families, one after the other. A peer that is not there, or fails, is noted in ``missing``."""
    for family in families:
        path = (
            None if work is None else work / f"scores_{_identity(run)}_{family.replace(' ', '_').replace(':', '')}.npz"
        )
        try:
            rows, seconds = _made(run, family, path)
        except Exception as error:  # a peer's own fault must not end the comparison; a fault of ours must
            if not family.startswith("peer: "):
                raise
            if missing is not None:
                missing[family.removeprefix("peer: ")] = f"{type(error).__name__}: {error}"
            continue
        yield from (Scored(name, family, scores, seconds) for name, scores in rows.items())


def _made(run: Run, family: str, path: Path | None) -> tuple[dict[str, Array], float]:
    if path is not None and path.is_file():
        with np.load(path) as kept:
            names = json.loads(str(kept["names"]))
            return {name: kept[f"scores_{k}"] for k, name in enumerate(names)}, float(kept["seconds"])
    torch.manual_seed(0)
    began = time.process_time()
    rows = FAMILIES[family](run)
    seconds = time.process_time() - began
    for name, scores in rows.items():
        if scores.shape != (len(run.pairs), len(run.targets)):
            raise ValueError(f"{name} gave scores {scores.shape}, not {(len(run.pairs), len(run.targets))}.")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"scores_{k}": scores for k, scores in enumerate(rows.values())}
        np.savez(path, names=np.array(json.dumps(list(rows))), seconds=np.array(seconds), **arrays)  # type: ignore[arg-type]
    return rows, seconds


def _identity(run: Run) -> str:
    return f"{run.setup.name}_{run.order}_{fingerprint(run.setup)}"
