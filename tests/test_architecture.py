"""Rules between the parts that import contracts cannot say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import smda_callbacks

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "smda_callbacks").rglob("*.py"))
SCRIPTS = sorted((ROOT / "recipes").rglob("*.py"))

IMPORTS_RECIPE = re.compile(r"^\s*(?:from|import)\s+recipes\b|import_module\(.recipes\b", re.MULTILINE)


def test_the_library_imports_no_recipe() -> None:
    assert len(SOURCES) > 50
    assert [path.name for path in SOURCES if IMPORTS_RECIPE.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("line", ["from recipes import a", "    import recipes.a", "import_module('recipes.a')"])
def test_the_search_for_recipes_can_find_one(line: str) -> None:
    assert IMPORTS_RECIPE.search(f"x = 1\n{line}\n")


def test_recipes_are_no_package() -> None:
    assert SCRIPTS
    assert not list((ROOT / "recipes").rglob("__init__.py"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["smda_callbacks"]


@pytest.mark.parametrize("name", ["sft_lora_refusal.py", "train_sae.py"])
def test_a_script_to_copy_needs_no_other(name: str) -> None:
    assert not IMPORTS_RECIPE.search((ROOT / "recipes" / name).read_text(encoding="utf-8"))


def loaded_after(statement: str) -> set[str]:
    """Those of the heavy packages that a fresh interpreter has loaded after ``statement``."""
    heavy = ("torch", "transformers", "trl", "peft", "sae_lens", "wandb", "datasets", "numpy", "plotly", "pydantic")
    probe = f"{statement}\nimport sys\nprint(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import smda_callbacks") == set()


def test_reading_a_run_needs_no_model() -> None:
    loaded = loaded_after("from smda_callbacks import RunStore, write_report")
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers", "trl", "peft", "sae_lens", "wandb", "datasets"}


@pytest.mark.parametrize("name", smda_callbacks.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(smda_callbacks, name) is not None


def test_another_name_is_refused_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'SMDACalback'\. Available: .*SMDACallback"):
        _ = smda_callbacks.SMDACalback
