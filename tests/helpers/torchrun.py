"""Two processes over gloo, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Found:
    """What the processes left: their notes by rank, a folder with the stores, and what they said on stderr."""

    notes: tuple[dict[str, Any], ...]
    out: Path
    said: str = ""


def found_by(module: str, sae: Path, out: Path, *given: object) -> Found:
    """Run ``python -m MODULE SAE OUT GIVEN...`` twice, and read the notes that it leaves as ``OUT/<rank>.pt``."""
    done = torchrun(module, sae, out, *given, cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    return Found(tuple(torch.load(out / f"{rank}.pt") for rank in range(2)), out, done.stderr)


def torchrun(module: str, *given: object, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE GIVEN...`` twice; raises ``subprocess.TimeoutExpired`` where they hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", module, *map(str, given)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
