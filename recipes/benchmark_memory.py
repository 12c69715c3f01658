"""What watching a run takes in memory: the part of recipes/benchmark_overhead.py that is about peaks.

``extra_peak_memory``: the most memory that a watched training takes, less that of one that is not, each in a process of
its own. On a GPU it is what torch allocates there, on a CPU the resident set (Linux).
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from recipes.benchmark_maths import Figure

MIB = 2**20


def extra_peaks(
    train: Callable[[dict[str, Any] | None], object], watched: Mapping[str, dict[str, Any]], repeats: int
) -> Iterator[Figure]:
    """``train`` is called with the settings of a watched run, or None; it has to be picklable."""
    extra: dict[str, list[float]] = {name: [] for name in watched}
    for _ in range(repeats):
        plain = peak(train, None)
        for name, chosen in watched.items():
            extra[name].append(peak(train, chosen) - plain)
    for name, values in extra.items():
        yield Figure(name, values, unit="MiB")


def peak(call: Callable[[Any], object], argument: Any) -> float:
    """MiB that a new process takes at most while it makes this call."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, call, argument).result()


def _peak(call: Callable[[Any], object], argument: Any) -> float:
    call(argument)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    # Not getrusage: what that gives a new process begins at the peak of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / MIB  # type: ignore[index]
