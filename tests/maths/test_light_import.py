"""The ground floor is light: importing all of ``maths`` loads numpy and nothing heavier."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import smda_callbacks.maths as maths

HEAVY = ("torch", "transformers", "scipy", "sklearn", "pandas", "pyarrow", "wandb")
MODULES = sorted(f"smda_callbacks.maths.{module.name}" for module in pkgutil.iter_modules(maths.__path__))


def heavy_after(statement: str) -> list[str]:
    """The packages of HEAVY that a fresh interpreter has loaded after ``statement``."""
    root = str(Path(next(iter(maths.__path__))).parents[1])
    probe = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_maths_loads_nothing_heavy() -> None:
    assert {"smda_callbacks.maths.ridge", "smda_callbacks.maths.sparse"} <= set(MODULES)
    assert heavy_after(f"import {', '.join(MODULES)}") == []


@pytest.mark.parametrize("package", ["scipy", "sklearn"])
def test_the_probe_can_fail(package: str) -> None:
    assert package in heavy_after(f"import {MODULES[0]}, {package}")
