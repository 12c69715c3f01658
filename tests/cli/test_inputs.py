"""Options and a file make one configuration; what is missing or cannot be loaded is said."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from smda_callbacks.cli.inputs import InputError, add_inputs, load_model, read_source, resolve_config


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_inputs(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("text", "source", "format", "expected"),
    [
        ("a.csv", "a.csv", "smda", None),
        ("a.csv:xstest", "a.csv", "xstest", None),
        ("a.csv:comply", "a.csv", "smda", "comply"),
        ("a.csv:instructions:refuse", "a.csv", "instructions", "refuse"),
        ("owner/name:train", "owner/name:train", "smda", None),
        ("owner/name:train[:50]:advbench", "owner/name:train[:50]", "advbench", None),
        ("xstest", "xstest", "smda", None),  # a data set of that name, not a format of nothing
    ],
)
def test_a_source_names_its_format_and_what_is_expected(
    text: str, source: str, format: str, expected: str | None
) -> None:
    found = read_source(text, parse())
    assert (found["source"], found["format"], found["expected"]) == (source, format, expected)


def test_options_speak_for_sources_that_do_not() -> None:
    args = parse("--format", "advbench", "--expected", "comply", "--text-column", "q", "--label-column", "l")
    assert read_source("a.csv", args)["format"] == "advbench"
    assert read_source("a.csv:xstest:refuse", args) == {
        "source": "a.csv",
        "format": "xstest",
        "columns": {"text": "q", "label": "l"},
        "expected": "refuse",
    }


def test_options_go_before_the_file(shelf: Any) -> None:
    config = resolve_config(parse("--config", shelf.config, "--model", "other", "--allow-model-mismatch"))
    assert config.model.id == "other"
    assert config.sae.allow_model_mismatch
    assert (config.sae.source, config.policy.support) == (shelf.sae, 8)
    assert [each.source for each in config.probes.sources] == [shelf.probes]


def test_another_sae_does_not_inherit_place_and_scale(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("sae: {source: x, sae_id: y, hook_name: blocks.3.hook_resid_post, norm_scaling_factor: 2.0}\n")
    sae = resolve_config(parse("--config", str(file), "--model", "m", "--sae", "z", "--sae-id", "i")).sae
    assert (sae.source, sae.sae_id, sae.hook_name, sae.norm_scaling_factor) == ("z", "i", None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"no model \(--model, or model.id .*\) and no SAE \(--sae, or sae.source .*Next step: name both"),
        (["--model", "m"], r"no SAE \(--sae.*Next step: name it"),
        (["--model", "m", "--sae", "s", "--expected", "comply"], r"speak of --probes. Next step: name a source"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_config(parse(*arguments))


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    config = resolve_config(parse("--model", str(tmp_path), "--sae", "s"))
    with pytest.raises(InputError, match=r"cannot be loaded: .*Next step: give a folder that holds a model"):
        load_model(config)
