"""What really happens: trainings made again without some pairs, read at their end, and kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from recipes.evidence.queries import query_gradients, run_slopes, state
from recipes.evidence.retrain import Array, Batch, Run, Step, flat_weights, layout, put, recorded_batches, train
from recipes.evidence.setups import Setup
from smda_callbacks.maths.functionals import Slopes, measured
from smda_callbacks.maths.pathways import State
from smda_callbacks.records import policy_hash

#: Seconds between two savings of what was made.
SAVE_EVERY = 60.0


class Truth:
    """Outcomes of one setup and one order of the pairs, by the pairs' weights.

    An outcome is the exact change of every functional over the run, and once more of the coefficients' parts as they
    would be if the SAE's gates were open and shut at the end as in the training with all pairs (``:held``): what no
    method that differentiates can know is left out of those. ``work``: keeps outcomes; None keeps them in memory.
    """

    def __init__(self, setup: Setup, order: int, work: Path | None = None) -> None:
        self.setup, self.order = setup, order
        self.model, self.tokenizer = setup.adapted()
        self.start_weights = flat_weights(self.model)
        self.instrument = setup.instrument(self.model, self.tokenizer)
        self.start = state(self.instrument, self.model)
        self.batches = _kept_batches(setup, order, work)
        self.seconds: list[float] = []  # of trainings
        self._path = None if work is None else work / f"truth_{setup.name}_{order}_{fingerprint(setup)}.npz"
        self._known = _load(self._path)
        self._saved = time.monotonic()

    @property
    def names(self) -> tuple[str, ...]:
        """Of what an outcome holds."""
        functionals = self.setup.functionals
        return functionals.names + tuple(f"{each.name}:held" for each in functionals.shifts)

    @cached_property
    def _gates(self) -> Array:
        """Gates at the end of the training with all pairs, ``[probe, feature]``."""
        self.trained(np.ones(len(self.setup.rows)))
        return state(self.instrument, self.model).gate

    @cached_property
    def full(self) -> Array:
        """The outcome with all pairs, ``[functional]``."""
        return self.outcome(np.ones(len(self.setup.rows)))

    def outcomes(self, weights: Array, what: str = "trainings") -> Array:
        """Outcomes ``[subset, functional]`` for ``weights [subset, pair]``; a progress bar where any must be made."""
        missing = sum(_key(row) not in self._known for row in weights)
        label = f"{self.setup.name}, order {self.order}: {what}"
        bar = tqdm(total=missing, desc=label, unit="run", mininterval=5, disable=missing < 2)
        found = []
        for row in weights:
            new = _key(row) not in self._known
            found.append(self.outcome(row))
            bar.update(int(new))
        bar.close()
        self.save()
        return np.array(found)

    def outcome(self, weights: Array) -> Array:
        """The outcome of one training, made now unless it is known."""
        key = _key(weights)
        if key not in self._known:
            gates = self._gates
            began = time.perf_counter()
            self.trained(weights)
            self.seconds.append(time.perf_counter() - began)
            end = state(self.instrument, self.model)
            held = self.measured(State(end.pre, gates, end.y))[len(self.setup.functionals.means) :]
            self._known[key] = np.concatenate([self.measured(end), held])
            if time.monotonic() - self._saved > SAVE_EVERY:
                self.save()
        return self._known[key]

    def trained(self, weights: Array) -> list[Step]:
        """Train the model of this object from the start; it is left at the end of the training."""
        put(self.model, self.start_weights)
        return list(train(self.model, self.batches, self.setup.hyper, weights))

    def measured(self, end: State) -> Array:
        """The change of every functional from the start to ``end``."""
        policy = self.setup.policy
        return measured(self.setup.functionals, self.start, end, scale=policy.scale, lam=policy.lam)

    def run(self) -> Run:
        """The training with all pairs, recorded, and the targets' gradients at its end."""
        began = time.perf_counter()
        steps = self.trained(np.ones(len(self.setup.rows)))
        seconds = time.perf_counter() - began
        end, policy = state(self.instrument, self.model), self.setup.policy
        found = run_slopes(self.setup.functionals, self.start, end, scale=policy.scale, lam=policy.lam)
        names, shapes = layout(self.model)
        chosen = [k for k, name in enumerate(self.setup.functionals.names) if not name.endswith(":logit")]
        found = Slopes(found.y[chosen], found.pre[chosen])
        return Run(
            setup=self.setup,
            order=self.order,
            pairs=self.setup.pairs(self.tokenizer),
            names=names,
            shapes=shapes,
            steps=tuple(steps),
            final=flat_weights(self.model),
            targets=tuple(self.names[k] for k in chosen),
            queries=query_gradients(self.instrument, self.model, found),
            slopes=found,
            seconds=seconds,
        )

    def save(self) -> None:
        """Write what is known, at once."""
        self._saved = time.monotonic()
        if self._path is not None and self._known:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(".part.npz")
            np.savez(part, keys=np.array(list(self._known)), outcomes=np.array(list(self._known.values())))
            part.replace(self._path)


def drops(pairs: int, count: int, share: float, seed: int) -> Array:
    """Weights ``[subset, pair]`` of ``count`` subsets that leave out this share of the pairs, drawn at random."""
    rng = np.random.default_rng([seed, round(1000 * share)])
    weights = np.ones((count, pairs))
    for row in weights:
        row[rng.choice(pairs, size=round(share * pairs), replace=False)] = 0.0
    return weights


def fingerprint(setup: Setup) -> str:
    """Of everything that outcomes depend on, the model's files by name, policy and rows by content."""
    config = {**setup.config, "torch": torch.__version__}
    text = json.dumps([config, list(map(dict, setup.rows)), asdict(setup.hyper), policy_hash(setup.policy)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _key(weights: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(weights, dtype=np.float64).tobytes()).hexdigest()[:24]


def _load(path: Path | None) -> dict[str, Array]:
    if path is None or not path.is_file():
        return {}
    with np.load(path) as kept:
        return dict(zip(kept["keys"].tolist(), kept["outcomes"], strict=True))


def _kept_batches(setup: Setup, order: int, work: Path | None) -> Sequence[Batch]:
    """TRL's own batches of this order; a training of TRL's is made for them once."""
    path = None if work is None else work / f"batches_{setup.name}_{order}_{fingerprint(setup)}.npz"
    if path is not None and path.is_file():
        with np.load(path) as kept:
            return [_batch(kept, k) for k in range(int(kept["count"]))]
    batches, _ = recorded_batches(setup, order)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"count": np.array(len(batches))}
        for k, batch in enumerate(batches):
            arrays |= {f"{k}_{name}": np.asarray(value) for name, value in vars(batch).items()}
        np.savez(path, **arrays)
    return batches


def _batch(kept: Any, k: int) -> Batch:
    tensors = {name: torch.from_numpy(kept[f"{k}_{name}"]) for name in ("input_ids", "attention_mask", "labels")}
    return Batch(tuple(kept[f"{k}_pairs"].tolist()), **tensors)
