"""What is built is what is meant: the wheel holds the package with its data and nothing beside it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import smda_callbacks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_package_only(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    started = "smda_callbacks_autostart.pth"  # lands in site-packages itself, where interpreters look for it
    assert tops == {"smda_callbacks", started, f"smda_callbacks-{smda_callbacks.__version__}.dist-info"}


def test_the_wheel_holds_every_tracked_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    command = ["git", "ls-files", "smda_callbacks"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = set(listed.stdout.split())
    assert {"smda_callbacks/py.typed", "smda_callbacks/data/probes.jsonl"} <= tracked
    beside = {"smda_callbacks/launch/smda_callbacks_autostart.pth"}  # see above: not in the package, but next to it
    assert tracked - beside <= set(wheel.namelist())


def test_the_shipped_data_are_small(wheel: zipfile.ZipFile) -> None:
    quickstart = [info.file_size for info in wheel.infolist() if "/data/quickstart/" in info.filename]
    assert quickstart
    assert sum(quickstart) < 4_000_000
