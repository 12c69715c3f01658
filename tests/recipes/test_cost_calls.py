"""The cost model's counts of every part, FLOPs and calls, against what torch and Python count of the part itself."""

from __future__ import annotations

import collections
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from recipes.evidence.cost_parts import FITS, bare, book, capture, exact, fit, functional_gradients, measure, train
from recipes.evidence.overhead_parts import Parts
from recipes.evidence.overhead_setups import Case, random_setup
from smda_callbacks.observe.activations import unwrap

TINY = Case(width=32, layers=3, adapted=3, probes=16, prompt=12, answer=12, features=64, support=4, pairs=4)


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("adapted", [3, 1])
def test_parts_are_what_torch_counts(adapted: int, tmp_path: Path) -> None:
    """Of a real step: everything that is multiplied is in the model, with the library's savings at work. Ridge systems
    are numpy's. Torch does not count attention on a CPU unless it is written out."""
    both = Parts(random_setup("model", replace(TINY, adapted=adapted), tmp_path))
    unwrap(both.model).set_attn_implementation("eager")
    both.train_captured()
    both.measure_ghost()
    both.measure()
    work = replace(both.work(), carried=0)
    books = FITS * fit(work).flops
    assert work.kept == 3 - adapted
    assert counted(both.forward) == bare(work).flops
    plain = counted(both.train)
    assert plain == train(work).flops
    assert counted(both.train_captured) - plain == pytest.approx(capture(work).flops, rel=0.1)
    measured = counted(both.measure)
    assert measured == pytest.approx(measure(work).flops - books, rel=0.02)
    # One earlier step's momentum is followed. Torch does not count products that are added in place.
    expected = (functional_gradients(work) + book(replace(work, carried=1))).flops
    expected -= 2 * 16 * work.basis * work.lora.weights(work.shape)
    assert counted(both.measure_ghost) - measured == pytest.approx(expected, rel=0.03)


class CallsOfTorch(TorchDispatchMode):
    """Counts what goes through torch's dispatcher, backward passes included."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def calls(call: Callable[[], object]) -> int:
    with CallsOfTorch() as counter:
        call()
    return counter.count


def calls_within_python(call: Callable[[], object]) -> int:
    events = collections.Counter[str]()
    sys.setprofile(lambda frame, event, argument: events.update([event]))
    try:
        call()
    finally:
        sys.setprofile(None)
    return events["call"] + events["c_call"]


@pytest.mark.parametrize("adapted", [3, 1])
def test_calls_are_what_torch_and_python_count(adapted: int, tmp_path: Path) -> None:
    """To a fifth: who mends the library a little need not mend the model."""
    both = Parts(random_setup("model", replace(TINY, adapted=adapted), tmp_path))
    both.train_captured()
    both.unhook()
    both.measure_ghost()
    both.measure()  # savings have been tried
    work, close = both.work(), functools.partial(pytest.approx, rel=0.2)
    assert calls(both.forward) == close(bare(work).calls)
    assert calls_within_python(both.forward) == close(bare(work).python)
    assert calls(both.train) == close(train(work).calls)
    assert calls_within_python(both.train) == close(train(work).python)
    captured = calls(both.train_captured)
    both.unhook()
    assert captured == close((train(work) + capture(work)).calls)
    assert calls(both.measure) == close(measure(work).calls)
    assert calls_within_python(both.measure) == close(measure(work).python)
    for carried in (1, 2):
        cost = measure(work) + functional_gradients(work) + book(replace(work, carried=carried))
        assert calls(both.measure_ghost) == close(cost.calls)
        both.train_captured()
        both.unhook()
    both.train_captured(both.exact)
    both.unhook()
    assert calls(both.measure_exact) == close((measure(work) + exact(work)).calls)
