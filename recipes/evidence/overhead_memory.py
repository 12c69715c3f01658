"""The most memory that a training takes, in a new process: resident on a CPU (VmHWM, Linux), allocated on a GPU."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from recipes.benchmark_memory import _peak
from recipes.benchmark_training import be_silent
from recipes.evidence.overhead_modes import Mode, make_trainer, peers
from recipes.evidence.overhead_setups import Setup

#: Rows, and how many steps each makes: engine ghost takes most when it follows the momentum of all steps that it ever
#: does.
ROWS = {"plain": 4, "step": 4, "ghost": 24, "exact": 1, "by_hand": 2}

#: Rows of --quick.
QUICK_ROWS = ("plain", "ghost")


def peaks(
    name: str, args: argparse.Namespace, setup_of: Callable[[str, Path, argparse.Namespace], Setup]
) -> dict[str, float]:
    """MiB per row. The processes are made from one that has imported everything, so that imports count alike in all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rows = dict.fromkeys(QUICK_ROWS, 2) if args.quick else dict(ROWS)
    if name != "quickstart" and not args.quick:
        rows |= dict.fromkeys(peers(), 4)
    found = {}
    for row, steps in rows.items():
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=context) as pool:
            call = partial(train, name, args, setup_of, Path(folder), steps)
            try:
                found[row] = round(pool.submit(_peak, call, row).result(), 1)
            except ImportError:
                continue
    return found


def train(
    name: str,
    args: argparse.Namespace,
    setup_of: Callable[[str, Path, argparse.Namespace], Setup],
    folder: Path,
    steps: int,
    row: str,
) -> Any:
    """One training of so many steps."""
    be_silent()
    setup = setup_of(name, folder / "setup", args)
    mode = peers().get(row, Mode(row))
    trainer = make_trainer(setup, mode, folder, steps)
    if mode.around is None:
        return trainer.train()
    with mode.around(trainer):
        return trainer.train()
