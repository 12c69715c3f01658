"""Model, SAE and probes as ``smda distill`` and ``smda check`` take them: from options, a configuration, or both."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from smda_callbacks.observe.probes import FORMATS
from smda_callbacks.records import Expected

if TYPE_CHECKING:
    from smda_callbacks.config.schema import SMDAConfig

_EXPECTED = get_args(Expected)

PROBES_HELP = f"""\
prompts to watch, again for every source: FILE[:FORMAT][:refuse|:comply]. FILE is a .jsonl, .json or .csv file or a
data set id (owner/name:split). FORMAT is one of {", ".join(FORMATS)}; refuse or comply says what the model should do
with all of them. Default: the probe set that ships with the library"""


class InputError(ValueError):
    """Options that cannot be used together, or a model that cannot be loaded."""


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The options that name a model, an SAE and probes."""
    add = parser.add_argument_group("what to look at").add_argument
    add("--config", metavar="FILE", type=Path, help="a configuration; the options below go before what it says")
    add("--model", metavar="M", help="a folder, a Hub id, or builtin:quickstart/quickstart-chat")
    add("--sae", metavar="S", help="a folder, a sae-lens release, a Hub repository, or builtin:quickstart/sae")
    add("--sae-id", metavar="ID", help="the SAE inside a release or repository")
    add("--allow-model-mismatch", action="store_true", help="the SAE was trained on another model, and that is wanted")
    add = parser.add_argument_group("probes").add_argument
    add("--probes", metavar="P", action="append", default=[], help=PROBES_HELP)
    add("--format", metavar="F", choices=FORMATS, help="format of every source that names none")
    for name, what in (("text", "the prompts"), ("category", "their categories"), ("label", "what is expected")):
        add(f"--{name}-column", metavar=name[0].upper(), help=f"column that holds {what}, in every source")
    add("--expected", choices=_EXPECTED, help="what the model should do, for every source that does not say")


def resolve_config(args: argparse.Namespace) -> SMDAConfig:
    """The configuration that the options and the file make together.

    Raises:
        InputError: no model or no SAE is named.
        ConfigError: lists every fault of the file.
    """
    from smda_callbacks.config.load import check_config, load_config

    values = load_config(args.config).model_dump(mode="json") if args.config else {}
    for section, given in _given(args).items():
        values[section] = {**values.get(section, {}), **given}
    missing = [
        f"{what} (--{what.lower()}, or {key} in the file of --config)"
        for what, key, there in (
            ("model", "model.id", values.get("model", {}).get("id")),
            ("SAE", "sae.source", values.get("sae", {}).get("source")),
        )
        if not there
    ]
    if missing:
        raise InputError(f"no {' and no '.join(missing)}. Next step: name {'it' if len(missing) == 1 else 'both'}.")
    return check_config(values, "the command line")


def _given(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    if args.model:
        sections["model"] = {"id": args.model}
    if args.sae:
        # Another SAE: its place and scale do not carry over from the one in the file.
        sections["sae"] = {"source": args.sae, "sae_id": None, "hook_name": None, "norm_scaling_factor": None}
    if args.sae_id:
        sections.setdefault("sae", {})["sae_id"] = args.sae_id
    if args.allow_model_mismatch:
        sections.setdefault("sae", {})["allow_model_mismatch"] = True
    if args.probes:
        sections["probes"] = {"sources": [read_source(each, args) for each in args.probes]}
    elif args.format or args.expected or args.text_column or args.category_column or args.label_column:
        raise InputError("--format, --expected and the column options speak of --probes. Next step: name a source.")
    return sections


def read_source(text: str, args: argparse.Namespace) -> dict[str, Any]:
    """``FILE[:FORMAT][:refuse|:comply]`` as a source of a configuration; a suffix that is neither belongs to FILE."""
    expected, format = args.expected, args.format
    head, _, last = text.rpartition(":")
    if head and last in _EXPECTED:
        expected, text = last, head
        head, _, last = text.rpartition(":")
    if head and last in FORMATS:
        format, text = last, head
    columns = {name: getattr(args, f"{name}_column") for name in ("text", "category", "label")}
    return {
        "source": text,
        "format": format or "smda",
        "columns": {name: value for name, value in columns.items() if value is not None},
        "expected": expected,
    }


def load_model(config: SMDAConfig) -> tuple[Any, Any]:
    """The model of a configuration in evaluation mode, on the GPU where there is one, and its tokenizer.

    Raises:
        InputError: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smda_callbacks.config.build import builtin_path

    quiet_libraries()
    name = config.model.id
    try:
        source = builtin_path(str(name))
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=config.model.dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"model {name!r} cannot be loaded: {reason} Next step: give a folder that holds a model and its "
            "tokenizer, a Hub id, or builtin:quickstart/quickstart-chat."
        ) from error
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer


def quiet_libraries() -> None:
    """No progress bars for loading weights: what these commands load is loaded in a moment, or downloaded with one."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
