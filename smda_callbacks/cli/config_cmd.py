"""Check configuration files, or show one with every default written out. Nothing is loaded or downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from smda_callbacks.cli.output import add_json, count, screen, show_table

HELP = "check configuration files, or show one with every default"

ENDINGS = (".yaml", ".yml")


class NoFileError(ValueError):
    """There is nothing to check."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda config``."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="what")
    validate = commands.add_parser("validate", help="all faults of all files, at once; exit code 1 if there are any")
    validate.add_argument(
        "paths", metavar="FILE|FOLDER", nargs="+", type=Path, help="files, or folders searched to any depth"
    )
    show = commands.add_parser("show", help="the resolved configuration as YAML")
    show.add_argument("file", metavar="FILE", type=Path)
    for each in (validate, show):
        add_json(each)


def run(args: argparse.Namespace) -> int:
    """``smda config validate`` or ``smda config show``."""
    return validate(args) if args.what == "validate" else show(args)


def validate(args: argparse.Namespace) -> int:
    """Every fault of every file; 1 if there is one."""
    from smda_callbacks.config.load import load_config

    out = screen(args)
    found: list[dict[str, object]] = []
    for path in find_files(args.paths):
        try:
            load_config(path)
            found.append({"file": str(path), "ok": True, "faults": []})
        except (ValueError, OSError) as error:
            found.append({"file": str(path), "ok": False, "faults": faults_of(error)})
    rows = [
        ("OK" if each["ok"] else "FAIL", each["file"], "\n".join(map(str, each["faults"])))  # type: ignore[call-overload]
        for each in found
    ]
    show_table(out, "Configurations", ["", "file", "faults"], rows)
    bad = sum(not each["ok"] for each in found)
    out.say(f"{bad} of {count(len(found), 'file')} cannot be used." if bad else f"{count(len(found), 'file')} valid.")
    out.emit({"ok": not bad, "files": found})
    return 1 if bad else 0


def show(args: argparse.Namespace) -> int:
    """The resolved configuration, ready to be saved as a file."""
    from smda_callbacks.config.load import load_config, to_yaml

    out = screen(args)
    config = load_config(args.file)
    out.lines(to_yaml(config).rstrip())
    out.emit(config.model_dump(mode="json"))
    return 0


def find_files(paths: list[Path]) -> list[Path]:
    """The files named, and the YAML files in the folders named, to any depth, each once.

    Raises:
        NoFileError: a path does not exist, or there is no file in all of them.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(each for each in path.rglob("*") if each.suffix in ENDINGS and each.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise NoFileError(f"configuration {str(path)!r} does not exist. Next step: check the path.")
    if not files:
        searched = ", ".join(map(str, paths))
        raise NoFileError(
            f"no configuration found in {searched}: no file there ends in {' or '.join(ENDINGS)}. Next step: name a "
            "folder that holds some, or a file."
        )
    return list(dict.fromkeys(files))


def faults_of(error: Exception) -> list[str]:
    """The faults that an error lists, one text each."""
    head, *rest = str(error).split("\n  - ")
    return rest or [head]
