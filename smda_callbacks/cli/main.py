"""The command ``smda``: finds the command that is asked for, runs it, and turns what goes wrong into a message.

Exit codes: 0 it held, 1 a check failed, 2 the usage or the input cannot be used (the message is on stderr).
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from smda_callbacks import __version__
from smda_callbacks.cli import audit, check, compare, config_cmd, distill, pairs, quickstart, report, rescore, verify
from smda_callbacks.cli import run as run_cmd
from smda_callbacks.cli import wandb as wandb_cmd

#: Every command: its module has ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args) -> exit code``.
COMMANDS: dict[str, Any] = {
    "quickstart": quickstart,
    "check": check,
    "distill": distill,
    "run": run_cmd,
    "audit": audit,
    "report": report,
    "pairs": pairs,
    "rescore": rescore,
    "compare": compare,
    "verify": verify,
    "wandb": wandb_cmd,
    "config": config_cmd,
}

_EPILOG = """\
start here:
  smda quickstart                       a real LoRA run on a tiny model, watched; a minute or two, no download
  smda check --config refusal.yaml      before a run: do model, SAE, probes and openings fit together?
  smda run --config C -- script.py ...  a run: an unedited training script, with the callback in it
  smda verify RUN, smda report RUN      after a run: do its numbers hold, and what did it do?
  smda pairs RUN --by refusal:harmful   after a run: which training pairs did it?
  smda rescore RUN                      after a run: what did each pair do to its end, exactly?
  smda compare A B                      after two runs: in what did they come apart?

exit codes: 0 it held, 1 a check failed, 2 usage or input that cannot be used"""


_CHOICE = re.compile(r"(argument .+): invalid choice: '(.*)' \(choose from (.*)\)")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the next step."""

    def error(self, message: str) -> NoReturn:
        print(f"smda: {_with_hint(message)}. Next step: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``smda`` with the arguments ``argv`` (default: those of the process) and return its exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse leaves this way, after --help too
        return int(stop.code or 0)
    try:
        code: int = args.run(args)
    except KeyboardInterrupt:
        print("smda: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_foreseen(error):
            raise
        return _refuse(error, debug=hasattr(args, "debug"))
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="smda",
        description="Watch what a LoRA fine-tuning run does to a model's behaviour, through which SAE features.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"smda {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the full traceback of an error"
        )
        command.set_defaults(run=module.run)
    return parser


def _is_foreseen(error: Exception) -> bool:
    """Whether the message alone tells the user what to do: refusals of this library, bad values, files out of reach."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("smda_callbacks.")


def _refuse(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    else:
        # Text from files and libraries may hold control characters, which a terminal would obey.
        shown = "".join(c if c.isprintable() or c == "\n" else " " for c in str(error))
        print(f"smda: {shown or type(error).__name__}", file=sys.stderr)
    return 2


def _with_hint(message: str) -> str:
    """Argparse's message; where a word is none of those allowed, with the nearest one."""
    match = _CHOICE.fullmatch(message)
    if match is None:
        return message
    what, got = match[1].replace("argument COMMAND", "command").replace("argument ", "value of "), match[2]
    allowed = match[3].replace("'", "").split(", ")
    near = get_close_matches(got, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {got!r}; {hint}Allowed: {', '.join(allowed)}"
