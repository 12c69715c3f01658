"""What recipes/benchmark_overhead.py computes: times taken in turns, figures with their range, and the refit's part."""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.maths.sparse import SparseRows, to_dense

COMPARE: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}

#: The columns of a printed table of figures.
HEADER = f"{'':<34}{'value':>10}{'min':>10}{'max':>10}{'n':>5}   target"

#: Sizes of common SAE dictionaries, and the numbers of probes to refit on; the first is the headline.
DICTIONARIES: Mapping[str, int] = {"16k": 16_384, "131k": 131_072}
PROBES = (400, 200)
LAM = 10.0

#: Refits in a turn: one alone is too short to be timed.
REFITS = 10


@dataclass(frozen=True)
class Figure:
    """One figure: all its repetitions, what sums them up, and what that should keep to (``<= 1.15``), if anything."""

    name: str
    values: Sequence[float]
    target: str | None = None
    unit: str = "ratio"
    summary: Callable[[Sequence[float]], float] = statistics.median

    @property
    def value(self) -> float:
        """The figure itself: the median, or for a difference the largest."""
        return self.summary(self.values)

    @property
    def ok(self) -> bool | None:
        """Whether the value keeps to the target; None without one."""
        if self.target is None:
            return None
        sign, limit = self.target.split()
        return COMPARE[sign](self.value, float(limit))

    def as_json(self) -> dict[str, Any]:
        """Value, range, number of repetitions, unit, target and verdict."""
        return {
            "value": self.value,
            "min": min(self.values),
            "max": max(self.values),
            "repetitions": len(self.values),
            "unit": self.unit,
            "target": self.target,
            "ok": self.ok,
        }

    def __str__(self) -> str:
        row = self.as_json()
        verdict = {None: "", True: "ok", False: "MISSED"}[self.ok]
        numbers = "".join(f"{row[key]:>10.3g}" for key in ("value", "min", "max"))
        return f"{self.name:<34}{numbers}{len(self.values):>5}   {self.target or '':<9}{verdict}".rstrip()


@dataclass(frozen=True)
class Times:
    """Seconds of one call: by the clock, and of the processor (all threads)."""

    wall: float
    cpu: float


def in_turns(
    first: Callable[[], object], second: Callable[[], object], repeats: int, device: str = "cpu"
) -> list[tuple[Times, Times]]:
    """Times of both, A B A B, so that a busy machine slows both alike. A turn before warms up and does not count."""
    return [(_timed(first, device), _timed(second, device)) for _ in range(repeats + 1)][1:]


def _timed(function: Callable[[], object], device: str) -> Times:
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wait()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def refit(
    repeats: int, n_probes: Sequence[int] = PROBES, dictionaries: Mapping[str, int] = DICTIONARIES
) -> Iterator[Figure]:
    """Speed of a refit on non-zeros against scikit-learn's on the dense matrix, and how far the coefficients differ."""
    differences = []
    for n in n_probes:
        for name, d in dictionaries.items():
            speedups, difference = refit_at(n, d, repeats)
            differences.append(difference)
            yield Figure(f"refit_speedup_{name}" + ("" if n == n_probes[0] else f"_n{n}"), speedups, ">= 20")
    yield Figure("refit_max_abs_diff", differences, "<= 1e-8", "coefficient", max)


def refit_at(n: int, d: int, repeats: int) -> tuple[list[float], float]:
    """Speedups, and the largest difference of a coefficient, with ``n`` probes and ``d`` features."""
    x, y = sparse_problem(n, d)
    dense = to_dense(x)

    def ours() -> NDArray[np.float64]:
        return fit_ridge(x, y, LAM).coef[:, 0]

    def theirs() -> NDArray[np.float64]:
        return np.asarray(Ridge(alpha=LAM).fit(dense, y[:, 0]).coef_)

    turns = in_turns(lambda: [ours() for _ in range(REFITS)], theirs, repeats)
    return [REFITS * b.cpu / a.cpu for a, b in turns], float(np.abs(ours() - theirs()).max())


def sparse_problem(n: int, d: int, *, active: int = 70, seed: int = 0) -> tuple[SparseRows, NDArray[np.float64]]:
    """Features as an SAE's: ``active`` per probe, drawn without replacement by Zipf's law, exponential activations."""
    rng = np.random.default_rng(seed)
    weight = -np.log(rng.permutation(d) + 1.0)
    # The largest of log-weights plus Gumbel noise are a draw without replacement (Gumbel-top-k).
    rows = [np.argpartition(-(weight + rng.gumbel(size=d)), active)[:active] for _ in range(n)]
    indices = np.sort(np.stack(rows), axis=1).ravel()
    x = SparseRows(np.arange(n + 1) * active, indices, rng.exponential(size=n * active), (n, d))
    return x, rng.uniform(size=(n, 1))
