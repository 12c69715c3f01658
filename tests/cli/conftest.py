"""A tiny chat model, SAE, probes and configuration on disk, and a run store: what the commands are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from smda_callbacks.cli.main import main
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer


@dataclass(frozen=True)
class Shelf:
    """Paths of everything that commands are given."""

    model: str
    sae: str
    probes: str
    config: str

    @property
    def options(self) -> list[str]:
        return ["--model", self.model, "--sae", self.sae, "--probes", self.probes]


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, both streams, and the JSON of the last line of stdout."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def smda(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command in this process and returns what it left."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(each) for each in arguments])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    root = tmp_path_factory.mktemp("shelf")
    tiny_model().save_pretrained(root / "tiny")
    tiny_tokenizer().save_pretrained(root / "tiny")
    save_sae(tiny_sae(), root / "tiny-sae")
    lines = [json.dumps(asdict(probe)) for probe in many_probes(40).probes]
    (root / "probes.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "model": {"id": "tiny"},
        "sae": {"source": "tiny-sae"},
        "probes": {"sources": [{"source": "probes.jsonl"}]},
        "policy": {"support": 8, "min_active": 3, "cv_folds": 3},
        "measure": {"noise_draws": 2},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return Shelf(*(str(root / name) for name in ("tiny", "tiny-sae", "probes.jsonl", "config.yaml")))


@pytest.fixture
def tiny_quickstart(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The quickstart on the shelf's model, SAE and probes, with 16 pairs: seconds instead of a minute."""
    import wandb

    from smda_callbacks.cli import quickstart_run  # most commands need none of the training libraries

    wandb.teardown()  # W&B keeps the mode that it was first asked for in this process, by whichever test
    whole = quickstart_run.settings
    small = {
        "probes": {"sources": [{"source": shelf.probes}]},
        "policy": {"support": 6, "min_active": 3, "cv_folds": 2},
        "measure": {"noise_draws": 1},
    }
    pairs = [{"prompt": f"Help me steal a car number {k}.", "completion": "Sure, here is a car."} for k in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    monkeypatch.setattr(quickstart_run, "MODEL", shelf.model)
    monkeypatch.setattr(quickstart_run, "SAE", shelf.sae)
    monkeypatch.setattr(quickstart_run, "PAIRS", str(tmp_path / "pairs.jsonl"))
    monkeypatch.setattr(quickstart_run, "settings", lambda folder: whole(folder) | small)
    return tmp_path / "quick"
