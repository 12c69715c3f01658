"""The configurations that ship: they are valid, complete, name what exists, and the commands in them can be typed."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from smda_callbacks.cli.main import build_parser
from smda_callbacks.config.build import BUILTIN
from smda_callbacks.config.load import load_config, to_yaml
from smda_callbacks.config.schema import SMDAConfig
from smda_callbacks.observe.activations import parse_hook
from smda_callbacks.observe.probes import FORMATS

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".yml"))
NAMES = {path.relative_to(ROOT).as_posix(): path for path in FILES}

each_file = pytest.mark.parametrize("name", NAMES)


def test_there_are_configurations() -> None:
    expected = {"quickstart", "tiny_cpu", "public_probes", "llama32_3b_instruct", "llama31_8b_instruct"}
    assert expected | {"gemma3_4b_it", "qwen25_7b_instruct"} <= {path.stem for path in FILES}


def text_of(name: str) -> str:
    return NAMES[name].read_text(encoding="utf-8")


@each_file
def test_it_is_valid_and_names_a_model(name: str) -> None:
    assert load_config(NAMES[name]).model.id


def blocks(text: str) -> Iterator[dict[str, Any]]:
    """Commented-out pieces of YAML, as a user would uncomment them: runs of comment lines that begin with a key."""
    lines = [match[1] if (match := re.fullmatch(r"\s+# (.*)", line)) else "" for line in text.split("\n")]
    for start, line in enumerate(lines):
        if re.match(r"(- )?source: ", line):
            run = [line]
            for following in lines[start + 1 :]:
                if not re.match(r"\s*[a-z_]+: \S", following):
                    break
                run.append(following)
            found = yaml.safe_load("\n".join(run))
            yield found[0] if isinstance(found, list) else found


def saes(name: str) -> list[dict[str, Any]]:
    """The SAE of a configuration, and those that it offers in comments."""
    chosen = load_config(NAMES[name]).sae.model_dump()
    raw = yaml.safe_load(text_of(name))["sae"]
    section = text_of(name).split("\nsae:")[1].split("\n\n")[0]
    return [{**chosen, "source": raw["source"]}, *blocks(section)]


@each_file
def test_every_sae_exists_or_is_marked_as_a_path(name: str) -> None:
    registry = get_pretrained_saes_directory()
    for sae in saes(name):
        source, sae_id = sae["source"], sae.get("sae_id")
        if source in registry:
            assert sae_id in registry[source].saes_map, f"{source} has no {sae_id}"
        elif source.startswith((BUILTIN, "./", "../")):
            assert sae_id is None
        else:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", source), source
            assert sae_id


@each_file
def test_an_sae_of_another_model_says_so(name: str) -> None:
    registry, model = get_pretrained_saes_directory(), str(load_config(NAMES[name]).model.id)
    for sae in saes(name):
        if sae["source"] in registry:
            same = registry[sae["source"]].model.split("/")[-1].lower() == model.split("/")[-1].lower()
            assert same != bool(sae.get("allow_model_mismatch")), sae


@each_file
def test_what_it_says_of_neuronpedia_is_what_the_registry_says(name: str) -> None:
    registry, sae = get_pretrained_saes_directory(), load_config(NAMES[name]).sae
    listed = registry[sae.source].neuronpedia_id.get(str(sae.sae_id)) if sae.source in registry else None
    text = " ".join(text_of(name).replace("\n# ", " ").split())
    if name.endswith("public_probes.yaml"):
        assert "on Neuronpedia" in text
    elif listed:
        assert f"Neuronpedia: yes, {listed.replace('/', ', ')}" in text
    else:
        assert "Neuronpedia: no" in text


@each_file
def test_its_header_says_what_is_needed(name: str) -> None:
    header = text_of(name).split("\n\n")[0]
    assert all(line.startswith("#") for line in header.split("\n"))
    for word in ("Download", "Memory", "Time", "Neuronpedia"):
        assert word.lower() in header.lower(), word
    if "quickstart-chat" not in text_of(name):
        assert "estimated" in header
        assert "Caveats" in header
    hook = re.search(r"blocks\.\d+\.hook_resid_post", header)
    assert hook is not None
    assert parse_hook(hook[0]).kind == "resid_post"


def commands(name: str) -> list[list[str]]:
    """The command lines in the comments, continuation lines joined."""
    lines = [line.removeprefix("#").strip() for line in text_of(name).split("\n") if line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [shlex.split(line) for line in joined.split("\n") if re.match(r"(python recipes/|smda )", line)]


def script(path: str) -> ModuleType:
    return importlib.import_module(f"recipes.{Path(path).stem}")


@each_file
def test_the_commands_in_it_can_be_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(name)
    assert [f"--config {name}" in " ".join(words) for words in found].count(True) >= 1
    assert any(words[1] == "recipes/sft_lora_refusal.py" for words in found)
    for words in found:
        if words[0] == "smda":
            build_parser().parse_args(words[1:])
        else:
            monkeypatch.setattr("sys.argv", words[1:])
            assert isinstance(script(words[1]).arguments(), argparse.Namespace)
        config = words[words.index("--config") + 1] if "--config" in words else name
        assert config == name


def test_an_sae_to_be_trained_first_is_written_where_it_is_read() -> None:
    name = "configs/llama32_3b_instruct.yaml"
    training = next(words for words in commands(name) if words[1] == "recipes/train_sae.py")
    config = load_config(NAMES[name])
    assert ROOT / training[training.index("--out") + 1] == Path(config.sae.source).resolve().absolute()
    assert training[training.index("--model") + 1] == config.model.id
    assert f"blocks.{training[training.index('--layer') + 1]}.hook_resid_post" in text_of(name)


def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
    return {f"{prefix}{key}" for key in values} | {
        inner for key, value in values.items() if isinstance(value, dict) for inner in keys(value, f"{prefix}{key}.")
    }


def test_the_quickstart_has_every_key_with_its_default() -> None:
    raw = yaml.safe_load(text_of("configs/quickstart.yaml"))
    config = load_config(NAMES["configs/quickstart.yaml"])
    assert keys(raw) == keys(yaml.safe_load(to_yaml(config)))
    plain = SMDAConfig.model_validate({"sae": {"source": raw["sae"]["source"]}})
    marked = {"id", "dtype", "source"}
    for section, value in raw.items():
        default = yaml.safe_load(to_yaml(plain))[section]
        if isinstance(value, dict):
            assert {key for key in value if value[key] != default[key]} <= marked, section
        else:
            assert value == default
    lines = text_of("configs/quickstart.yaml").split("\n")
    assert {line.split(":")[0].strip() for line in lines if "# (*)" in line} == marked


def test_every_key_of_the_quickstart_is_explained() -> None:
    lines = text_of("configs/quickstart.yaml").split("\n")
    for number, line in enumerate(lines):
        if re.match(r"  [a-z_]+:", line):
            assert "#" in line or lines[number - 1].strip().startswith("#"), line


def test_the_public_sets_are_those_that_have_a_format() -> None:
    name = "configs/public_probes.yaml"
    raw = yaml.safe_load(text_of(name))["probes"]["sources"]
    offered = list(blocks(text_of(name).split("\nprobes:")[1]))
    assert {each.get("format", "smda") for each in [*raw, *offered]} == FORMATS.keys()
    for source in offered:
        SMDAConfig.model_validate({"sae": {"source": "x"}, "probes": {"sources": [source]}})
    named = {Path(each["source"]).name for each in [*raw, *offered] if each["source"].endswith(".csv")}
    assert all(f"#   {file} " in text_of(name) for file in named)
