"""``smda verify`` and ``smda report`` on a run store, and how a store is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smda_callbacks.sinks import files
from tests.helpers.runs import make_run, write_run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_run(tmp_path / "work" / "run", make_run())


def test_a_run_as_written_holds(store: Path, smda: Callable[..., Any]) -> None:
    found = smda("verify", store, "--json")
    assert found.code == 0
    assert found.json["ok"]
    assert {each["name"] for each in found.json["checks"]} >= {"shifts", "telescoping", "accounts", "hashes"}
    assert all(each["largest_error"] <= each["tolerance"] for each in found.json["checks"])
    assert "checks hold" in found.err


def test_a_number_changed_afterwards_is_found(store: Path, smda: Callable[..., Any]) -> None:
    probes = store / files.PROBES
    probes.write_text(probes.read_text().replace("cooking question 0", "cooking question 99"))
    found = smda("verify", store)
    assert found.code == 1
    assert re.search(r"FAIL\s+hashes", found.out)
    assert "failed: hashes" in found.out
    assert "Next step" in found.out


def test_a_report_is_written_where_it_is_wanted(store: Path, tmp_path: Path, smda: Callable[..., Any]) -> None:
    found = smda("report", store, "--out", tmp_path / "page.html", "--json")
    assert found.code == 0
    assert found.json["report"] == str(tmp_path / "page.html")
    assert found.json["bytes"] == (tmp_path / "page.html").stat().st_size
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert smda("report", store, "--json").json["report"].startswith(str(store))


@pytest.mark.parametrize("command", ["verify", "report"])
def test_what_is_no_store_is_refused_with_the_store_nearby(command: str, store: Path, smda: Callable[..., Any]) -> None:
    above = smda(command, store.parent)
    assert above.code == 2
    assert f"Next step: give {store}" in above.err
    assert re.search(r"'nowhere' does not exist", smda(command, "nowhere").err)
    assert "no manifest.json" in smda(command, store.parent.parent).err


def test_a_half_written_store_is_called_so(tmp_path: Path, smda: Callable[..., Any]) -> None:
    (tmp_path / files.PROBES).write_text("")
    found = smda("verify", tmp_path)
    assert found.code == 2
    assert "half-written" in found.err
