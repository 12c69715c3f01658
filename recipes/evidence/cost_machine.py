"""Work of a machine, and the seconds that it takes: everything that computes in units of FLOPs, over F, and calls.

``F``, the FLOP/s that a plain training step reaches, is the one number that is measured. The others are stated per kind
of machine (:class:`Stated`); where they would make the step that calibrates longer than it was, calls take less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Cost:
    """What is done. Of all ``flops``, ``single``: those in single precision whatever the model's precision, and
    ``thin``: those of them in products with LoRA's rank as one of their sizes.

    ``bytes``, ``cached``: moved by element-wise work on arrays that fit into no cache, and on such as stay in one
    (those of one LoRA matrix). ``fresh``: bytes of new arrays of more than :data:`KEPT_BY_MALLOC`. ``calls``: of
    torch's operations, views included. ``python``: of functions within Python, such as a walk over the modules of a
    model makes.
    """

    flops: float = 0.0
    bytes: float = 0.0
    cached: float = 0.0
    calls: float = 0.0
    python: float = 0.0
    single: float = 0.0
    thin: float = 0.0
    fresh: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(each * times for each in astuple(self)))


def total(costs: Sequence[Cost]) -> Cost:
    """The sum."""
    return sum(costs, Cost())


#: Bytes of an array above which glibc takes its memory from the system and gives it back, every time.
KEPT_BY_MALLOC = 32 * 2**20


def fresh(size: float, arrays: float) -> Cost:
    """So many new arrays of ``size`` bytes, beside what is done with them."""
    return Cost(fresh=size * arrays) if size > KEPT_BY_MALLOC else Cost()


class Stated(NamedTuple):
    """What is stated of a kind of machine, not measured.

    ``balance``, ``cached``, ``fresh``: FLOPs in the time of one byte from memory, from a cache, and of new memory.
    ``single``, ``thin``: FLOPs more in the time of such a FLOP. ``launch``, ``python``: seconds of a call of an
    operation of torch, and of a function of Python.
    """

    balance: float
    cached: float
    fresh: float
    single: float
    thin: float
    launch: float
    python: float


#: One thread of 50 GFLOP/s moves about 10 GB/s from and to memory and 50 within its caches, gets 1.7 GB/s of new memory
#: page by page, and reaches a fifth in products of rank 8. An operation of torch on few numbers takes it 1 (a view) to
#: 10 µs (within a backward pass), a call within Python 0.1 to 0.2 µs.
CPU_THREAD = Stated(balance=5.0, cached=1.0, fresh=30.0, single=0.0, thin=4.0, launch=5e-6, python=1.5e-7)

#: A data-centre GPU of 1000 TFLOP/s in bf16 at 40 % moves about 3 TB/s and makes 67 TFLOP/s in single precision; torch
#: keeps its memory. A CPU thread as above issues its kernels: about 8 µs each, 1 to 2 for a view.
DATACENTRE_GPU = Stated(balance=130.0, cached=130.0, fresh=0.0, single=5.0, thin=0.0, launch=6e-6, python=1.5e-7)


@dataclass(frozen=True)
class Machine:
    """``flops``: FLOP/s reached in training; ``stated``: all else."""

    flops: float
    stated: Stated

    def seconds(self, cost: Cost) -> float:
        """Seconds of this cost."""
        return self.computing(cost) / self.flops + self.calling(cost)

    def computing(self, cost: Cost) -> float:
        """FLOPs, and those in the time of all else that computes."""
        s = self.stated
        moved = cost.bytes * s.balance + cost.cached * s.cached + cost.fresh * s.fresh
        return cost.flops + cost.single * s.single + cost.thin * s.thin + moved

    def calling(self, cost: Cost) -> float:
        """Seconds of the calls."""
        return cost.calls * self.stated.launch + cost.python * self.stated.python


#: Calls take at most this share of the step that calibrates. What is stated of them holds to a factor of two or so; of
#: a step that they make most of nothing would be left to tell F by.
MOST_CALLS = 0.5


def calibrated(step: Cost, seconds: float, stated: Stated = CPU_THREAD) -> Machine:
    """The machine on which a plain training step of this cost takes so long.

    Raises:
        ValueError: it took no time.
    """
    if not seconds > 0:
        raise ValueError(f"a training step took {seconds:.3g} s. Next step: calibrate by one that was measured.")
    one = Machine(1.0, stated)
    less = min(1.0, MOST_CALLS * seconds / max(one.calling(step), 1e-300))
    left = seconds - less * one.calling(step)
    lowered = stated._replace(launch=less * stated.launch, python=less * stated.python)
    return Machine(one.computing(step) / left, lowered)
