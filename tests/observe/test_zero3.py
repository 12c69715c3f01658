"""Weights in the pieces that ZeRO-3 keeps, made by hand: DeepSpeed itself is tried in tests/training/test_zero.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from smda_callbacks.observe.divided import (
    device_of,
    division_fault,
    is_divided,
    own_part,
    part_like,
    put_together,
    shape_of,
)
from smda_callbacks.observe.noise import RandomMoves
from smda_callbacks.observe.sharding import Move
from smda_callbacks.observe.zero3 import piece_of


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    """A group of one process, as DeepSpeed hangs it on its parameters."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def in_pieces(whole: torch.Tensor, group: Any, *, kept: bool = False) -> Any:
    """A parameter as ZeRO-3 leaves it: empty, its piece beside it; ``kept``: a copy stays after a pass."""
    found: Any = torch.nn.Parameter(whole.clone() if kept else torch.empty(0))
    found.ds_id, found.ds_shape, found.ds_numel = 0, whole.shape, whole.numel()
    found.ds_tensor, found.ds_process_group = whole.flatten().clone(), group
    found.ds_status = SimpleNamespace(name="AVAILABLE" if kept else "NOT_AVAILABLE")

    def partition() -> None:
        found.data, found.ds_status = torch.empty(0), SimpleNamespace(name="NOT_AVAILABLE")

    found.partition = partition
    return found


def model_of(parameter: Any) -> torch.nn.Module:
    model = torch.nn.Module()
    model.register_parameter("weight", parameter)
    return model


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_pieces_are_equally_long_and_make_up_the_whole(size: int) -> None:
    whole = torch.arange(1.0, 16.0).reshape(3, 5)
    pieces = [piece_of(whole, number, size) for number in range(size)]
    assert {len(piece) for piece in pieces} == {-(-15 // size)}
    flat = torch.cat(pieces)
    assert torch.equal(flat[:15].reshape(3, 5), whole)
    assert not flat[15:].any()


def test_a_weight_is_put_together_and_moved_in_its_piece(one_process: Any) -> None:
    whole = torch.randn(3, 5)
    parameter = in_pieces(whole, one_process)
    assert is_divided(model_of(parameter))
    assert division_fault(model_of(parameter)) is None
    assert device_of(model_of(parameter)).type == "cpu"
    assert shape_of(parameter) == whole.shape
    assert torch.equal(put_together(parameter), whole)
    assert torch.equal(part_like(whole, parameter), parameter.ds_tensor)
    own_part(parameter).add_(1.0)
    assert torch.equal(put_together(parameter), whole + 1.0)


def test_random_moves_are_those_of_the_whole_and_no_old_copy_is_read(one_process: Any) -> None:
    whole = torch.nn.Parameter(torch.randn(3, 5))
    before = whole.detach().clone()
    parameter = in_pieces(before, one_process, kept=True)
    move = Move(0.1, 5, 2)
    with RandomMoves([whole]).applied(move), RandomMoves([parameter]).applied(move):
        assert parameter.ds_status.name == "NOT_AVAILABLE"  # the copy was of the weight as it was
        assert torch.equal(put_together(parameter), whole)
        parameter.data, parameter.ds_status = whole.detach().clone(), SimpleNamespace(name="AVAILABLE")  # a pass
    assert parameter.ds_status.name == "NOT_AVAILABLE"  # so is this one
    assert torch.equal(put_together(parameter), before)


FAULTS = {
    "on NVMe": lambda each: setattr(each, "nvme_swapper", object()),
    "quantised": lambda each: setattr(each.ds_tensor, "ds_quant_scale", 1.0),
    "second copies": lambda each: setattr(each, "ds_zero_param_process_group", object()),
}


@pytest.mark.parametrize("text", FAULTS)
def test_pieces_that_cannot_be_read_or_moved_are_refused_by_name(text: str, one_process: Any) -> None:
    parameter = in_pieces(torch.randn(3, 5), one_process)
    FAULTS[text](parameter)
    fault = division_fault(model_of(parameter))
    assert fault is not None
    assert f"ZeRO-3 keeps {'second copies of ' if text == 'second copies' else ''}weight and others" in fault
    assert text in fault


def test_pieces_over_some_of_the_processes_are_refused(one_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = in_pieces(torch.randn(3, 5), one_process)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1 if group is one_process else 4)
    assert "over some of the processes only" in str(division_fault(model_of(parameter)))
