"""Trainings on several processes that are stopped, and gone on with by others; started by torchrun, told by files.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.helpers.resuming SAE OUT ddp|fsdp PART``, first with the
part "begin", then with "go on".
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from smda_callbacks.training.engine import AttributionOptions
from tests.helpers.divided import fsdp_on_cpu
from tests.helpers.stopping import Stop, make_plan, train

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def begin(out: Path, plans: list[Any], options: dict[str, Any]) -> None:
    """Two runs that are never stopped, of which copies are gone on with, and one that is."""
    train(out / "whole", plans[0], **options)
    train(out / "stopped", plans[0], Stop(3), **options)
    train(out / "pairwise", plans[1], **options)
    if dist.get_rank() == 0:
        shutil.copytree(out / "whole", out / "killed")  # windows after the checkpoint are there already
        shutil.copytree(out / "pairwise", out / "inside")


def go_on(out: Path, plans: list[Any], options: dict[str, Any]) -> None:
    """All of them go on; the last from within a window of two steps."""
    train(out / "stopped", plans[0], start=3, **options)
    train(out / "killed", plans[0], start=2, **options)
    train(out / "inside", plans[1], start=3, **options)


def main(sae: Path, out: Path, way: str, part: str) -> None:
    PartialState(cpu=True, backend="gloo")
    options: dict[str, Any] = {"ddp_backend": "gloo", "per_device_train_batch_size": 1}
    plan = make_plan(sae, attribution=AttributionOptions("off"))
    with fsdp_on_cpu():
        (begin if part == "begin" else go_on)(
            out, [plan, replace(plan, every=2)], options | (FSDP if way == "fsdp" else {})
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
