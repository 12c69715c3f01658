"""``smda config``: all faults of all files at once, folders to any depth, and never success without a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from smda_callbacks.cli.config_cmd import find_files
from smda_callbacks.config.load import load_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "good.yaml").write_text("sae: {source: x}\n")
    (tmp_path / "deep" / "bad.yml").write_text("sae: {source: x, sae_ide: y}\nmeasure: {every: 0, batch_size: -1}\n")
    (tmp_path / "deep" / "er" / "broken.yaml").write_text("sae: [\n")
    (tmp_path / "deep" / "notes.txt").write_text("not: [yaml\n")
    return tmp_path


def test_a_folder_is_searched_to_any_depth_and_every_fault_is_told(folder: Path, smda: Callable[..., Any]) -> None:
    found = smda("config", "validate", folder, "--json")
    assert found.code == 1
    by_name = {Path(each["file"]).name: each for each in found.json["files"]}
    assert set(by_name) == {"good.yaml", "bad.yml", "broken.yaml"}
    assert by_name["good.yaml"] == {"file": str(folder / "good.yaml"), "ok": True, "faults": []}
    faults = "\n".join(by_name["bad.yml"]["faults"])
    assert len(by_name["bad.yml"]["faults"]) == 3
    assert "did you mean 'sae_id'?" in faults
    assert "measure.every" in faults
    assert "measure.batch_size" in faults
    assert "no valid YAML" in by_name["broken.yaml"]["faults"][0]


def test_people_see_the_same(folder: Path, smda: Callable[..., Any]) -> None:
    found = smda("config", "validate", folder / "deep", folder / "good.yaml")
    assert found.code == 1
    assert "2 of 3 files cannot be used" in found.out
    assert "sae_ide" in found.out


def test_a_file_that_is_named_twice_is_checked_once(folder: Path) -> None:
    assert len(find_files([folder, folder / "good.yaml", folder / "deep"])) == 3


@pytest.mark.parametrize("name", ["nothing.yaml", "empty"])
def test_nothing_to_check_is_refused(name: str, tmp_path: Path, smda: Callable[..., Any]) -> None:
    (tmp_path / "empty").mkdir()
    found = smda("config", "validate", tmp_path / name)
    assert found.code == 2
    assert "Next step:" in found.err


def test_show_writes_every_key_and_reads_back_as_the_same(folder: Path, smda: Callable[..., Any]) -> None:
    shown = smda("config", "show", folder / "good.yaml")
    assert shown.code == 0
    again = folder / "again.yaml"
    again.write_text(shown.out)
    assert load_config(again) == load_config(folder / "good.yaml")
    assert yaml.safe_load(shown.out)["policy"]["support"] == 16


def test_show_refuses_a_faulty_file_with_its_faults(folder: Path, smda: Callable[..., Any]) -> None:
    found = smda("config", "show", folder / "deep" / "bad.yml")
    assert found.code == 2
    assert "3 faults" in found.err
