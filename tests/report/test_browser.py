"""Reports as a browser shows them: every figure is drawn and has data, and nothing is asked of the network."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from smda_callbacks.report.compare import compare
from smda_callbacks.report.compare_page import write_comparison
from smda_callbacks.report.page import write_report
from tests.helpers.compared import stored
from tests.helpers.runs import make_run, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

#: Elements that plotly draws data with: lines and points, bars, heat maps, filled areas.
MARKS = re.compile(r'class="(?:point|point js-[^"]*|js-line|hm|trace bars|js-fill)"|<path class="point"|<image')


def shown(page: Path, profile: Path) -> tuple[str, str]:
    """The page's elements after its scripts have run in a window that shows all of it, and the browser's messages."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    window = ["--virtual-time-budget=10000", "--window-size=1366,20000", "--dump-dom", page.as_uri()]
    done = subprocess.run([CHROMIUM, *options, *window], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def report(folder: Path) -> Path:
    return write_report(write_run(folder / "run", make_run(windows=4, pairs=12)), folder / "report.html")


def comparison(folder: Path) -> Path:
    found = compare(stored(folder, make_run(windows=4, pairs=8), make_run(windows=3, pairs=8, run_id="other")))
    return write_comparison(found, folder / "compare.html")


@pytest.mark.parametrize("make", [report, pytest.param(comparison, marks=pytest.mark.slow)])
def test_every_figure_is_drawn_with_data(make: Callable[[Path], Path], tmp_path: Path) -> None:
    page = make(tmp_path)
    text, messages = shown(page, tmp_path / "profile")
    places = re.split(r'(?=<div class="figure)', text)[1:]
    names = [re.search(r'data-figure="([^"]+)"', place)[1] for place in places]  # type: ignore[index]
    assert len(names) >= 4
    for name, place in zip(names, places, strict=True):
        drawn = place.split("</figure>")[0]
        assert "main-svg" in drawn, f"{name} is not drawn"
        plot, _, legend = drawn.partition('class="infolayer"')  # a legend has marks, too
        assert legend
        assert MARKS.search(plot), f"{name} has no data"
    assert not re.findall(r"CONSOLE.*(?:[Ee]rror|Refused)", messages)
