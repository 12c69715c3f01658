"""A configuration is checked as a whole: every fault at once, each with where, what, what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from smda_callbacks.config.load import ConfigError, check_config, load_config, to_yaml
from smda_callbacks.config.schema import SMDAConfig

SAE = {"source": "somewhere"}
CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def faults(values: dict[str, Any]) -> dict[str, str]:
    """What is said of each key; an SAE is added, so that the rest is all that is wrong."""
    with pytest.raises(ConfigError) as caught:
        check_config({"sae": SAE, **values}, "run.yaml")
    head, *lines = str(caught.value).split("\n")
    assert head == f"run.yaml has {len(lines)} fault{'s' if len(lines) > 1 else ''}:"
    return dict(line.removeprefix("  - ").split(": ", 1) for line in lines)


def test_every_fault_is_said_at_once() -> None:
    found = faults(
        {
            "sae": {"saeid": "a"},
            "probes": {"sources": [{"source": "a.csv"}, {"format": "xtest"}], "max_per_category": 0},
            "behaviour": {"refusals": [], "target": "odds"},
            "policy": {"lam": -1, "suport": 8},
            "measure": {"every": "often", "batch_size": 1.5},
            "wandb": {"enabled": "perhaps"},
            "sede": 1,
        }
    )
    assert list(found) == [
        "probes.sources.1.source",
        "probes.sources.1.format",
        "probes.max_per_category",
        "sae.source",
        "sae.saeid",
        "behaviour.refusals",
        "behaviour.target",
        "policy.lam",
        "policy.suport",
        "measure.every",
        "measure.batch_size",
        "wandb.enabled",
        "sede",
    ]
    assert found["probes.sources.1.source"] == "missing, and there is no default"


@pytest.mark.parametrize(
    ("values", "where", "near", "allowed"),
    [
        ({"modle": {}}, "modle", "model", "model, probes, sae, behaviour"),
        ({"policy": {"suport": 8}}, "policy.suport", "support", "path, support, min_active"),
        ({"probes": {"source": []}}, "probes.source", "sources", "sources, max_per_category"),
        (
            {"probes": {"sources": [{"source": "a", "expect": "refuse"}]}},
            "probes.sources.0.expect",
            "expected",
            "source, format, columns, category, expected",
        ),
        (
            {"probes": {"sources": [{"source": "a", "columns": {"labels": "x"}}]}},
            "probes.sources.0.columns.labels",
            "label",
            "text, category, label, refuse_labels, id",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(
    values: dict[str, Any], where: str, near: str, allowed: str
) -> None:
    assert faults(values)[where].startswith(f"unknown key; did you mean {near!r}? Allowed here: {allowed}")


def test_a_key_that_resembles_none_is_answered_with_all() -> None:
    assert faults({"store": {"zzz": 1}})["store.zzz"] == "unknown key; Allowed here: dir"


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("policy", "lam", 0, "must be a finite number above 0, or auto, got 0"),
        ("policy", "lam", float("inf"), "must be a finite number above 0, or auto, got inf"),
        ("policy", "lam", float("nan"), "must be a finite number above 0, or auto, got nan"),
        ("policy", "lam", "big", "Input should be 'auto' or a valid number"),
        ("policy", "lam", True, "true and false"),
        ("policy", "support", 0, "greater than or equal to 1, got 0"),
        ("policy", "support", "many", "valid integer"),
        ("policy", "min_active", 1.5, "valid integer"),
        ("measure", "every", True, "true and false (YAML: also yes, no, on and off) are no value of this key"),
        ("measure", "noise_draws", -1, "greater than or equal to 0"),
        ("measure", "on_error", "ignore", "'warn' or 'raise', got 'ignore'"),
        ("behaviour", "refusals", [], "is empty; name at least one opening, or leave the key out"),
        ("behaviour", "compliances", [], "is empty"),
        ("behaviour", "refusals", "Sorry", "valid tuple"),
        ("behaviour", "readout", "first", "'last', 'mean' or 'max'"),
        ("alerts", "refusal_drop", 0, "greater than 0"),
        ("wandb", "enabled", "perhaps", "Input should be 'auto' or a valid boolean"),
        ("wandb", "log_text", True, "true and false"),
        ("sae", "source", "", "at least 1 character"),
        ("sae", "norm_scaling_factor", -2, "greater than 0"),
        ("probes", "sources", ["a.csv"], "valid dictionary"),
    ],
)
def test_wrong_values_are_refused(section: str, key: str, value: Any, said: str) -> None:
    values = {**(SAE if section == "sae" else {}), key: value}
    found = faults({section: values})
    where = f"{section}.{key}" if key != "sources" else "probes.sources.0"
    assert list(found) == [where]
    assert said in found[where]


def test_an_unknown_format_is_refused_before_anything_is_read() -> None:
    found = faults({"probes": {"sources": [{"source": "a.csv", "format": "xtest"}]}})
    assert found["probes.sources.0.format"].startswith("unknown probe format; did you mean 'xstest'? Allowed: smda,")


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "sae: {source: a}\npolicy: {lam: 1e3}\n")).policy.lam == 1000.0


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sae: {source: a\n", "run.yaml is no valid YAML"),
        ("- sae\n", "run.yaml must hold a mapping of sections, got list"),
        ("", "run.yaml must hold a mapping of sections, got NoneType"),
        ("sae: {source: a}\npolicy: {lam: 1}\npolicy: {support: 2}\n", "'policy' occurs twice"),
        ("sae: {source: a, source: b}\n", "'source' occurs twice"),
        ("sae: !!python/object/apply:os.getcwd []\n", "run.yaml is no valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path, text))


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("sae: {source: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml is no valid YAML"):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist. Next step: check the path"):
        load_config(tmp_path / "none.yaml")


def test_a_checked_configuration_and_a_mapping_pass() -> None:
    config = load_config({"sae": SAE, "seed": 3})
    assert isinstance(config, SMDAConfig)
    assert config.seed == 3
    assert load_config(config) is config


def test_a_configuration_cannot_be_changed() -> None:
    config = load_config({"sae": SAE})
    with pytest.raises(ValueError, match="frozen"):
        config.policy.support = 3  # type: ignore[misc]


PATHS = """\
model: {id: model}
sae: {source: ./sae}
policy: {path: ../policy}
probes: {sources: [{source: a.jsonl}, {source: owner/name}, {source: ./later.csv}, {source: elsewhere.csv}]}
"""


def test_relative_paths_start_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "configs"
    (here / "model").mkdir(parents=True)
    (here / "a.jsonl").touch()
    write(here, PATHS)
    monkeypatch.chdir(tmp_path)
    config = load_config("configs/run.yaml")
    assert config.model.id == "configs/model"
    assert config.sae.source == "configs/sae"  # said with a dot: taken from there, whether it is there or not
    assert config.policy.path == "policy"
    sources = [each.source for each in config.probes.sources]
    assert sources == ["configs/a.jsonl", "owner/name", "configs/later.csv", "elsewhere.csv"]


def test_absolute_and_built_in_sources_stay(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f"sae: {{source: {tmp_path}}}\nmodel: {{id: builtin:quickstart/chat}}\n"))
    assert (config.sae.source, config.model.id) == (str(tmp_path), "builtin:quickstart/chat")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_writing_and_reading_again_is_the_identity(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_the_identity_holds_for_paths_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "other").mkdir(parents=True)
    (tmp_path / "sae").mkdir()
    write(tmp_path, "sae: {source: ./sae}\n")
    monkeypatch.chdir(tmp_path / "work")
    config = load_config("../run.yaml")
    assert Path(config.sae.source).resolve() == tmp_path / "sae"
    assert load_config(write(tmp_path / "work" / "other", to_yaml(config))) == config


def test_every_key_is_written_out() -> None:
    written = yaml.safe_load(to_yaml(load_config({"sae": SAE})))
    assert written.keys() == SMDAConfig.model_fields.keys()
    for name, section in SMDAConfig.model_fields.items():
        if name not in ("seed", "trackers"):
            assert written[name].keys() == section.annotation.model_fields.keys()  # type: ignore[union-attr]
