"""Run a training script, unedited, with the callback in every trainer that it trains.

    smda run --config smda.yaml -- script.py --its arguments
    smda run --config smda.yaml -m trl.scripts.sft -- --config sft.yaml
    torchrun --nproc_per_node 2 -m smda_callbacks run -m trl.scripts.sft -- --config sft.yaml
    accelerate launch -m smda_callbacks run -- script.py --its arguments

Without --config the environment variable SMDA_CONFIG names the configuration. Processes that the script starts are
watched too. The exit code is that of the script.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

HELP = "run an unedited training script, watched"


class LaunchError(ValueError):
    """There is nothing to run, or no configuration."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda run``."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="of the callback; default: SMDA_CONFIG")
    parser.add_argument(
        "-m", metavar="MODULE", dest="module", nargs=argparse.REMAINDER, help="run a module, as python -m does"
    )
    parser.add_argument("script", metavar="SCRIPT", nargs=argparse.REMAINDER, help="a script and its arguments")


def run(args: argparse.Namespace) -> int:
    """Inject the callback, and become the script."""
    is_module = args.module is not None
    words = [*(args.module or ()), *args.script]  # what follows -m ends for argparse at the first --
    name, *rest = command_of(words, is_module=is_module)
    os.environ["SMDA_CONFIG"] = str(config_of(args.config))
    os.environ["SMDA"] = "1"  # for the processes that the script starts

    from smda_callbacks.launch.inject import install

    install()
    sys.argv = [name, *rest]
    if not sys.flags.safe_path:  # what python itself puts there
        sys.path[0] = str(Path.cwd() if is_module else Path(name).resolve().parent)
    try:
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # the script's own error, told as it would be without this command
        return 1
    return 0


def command_of(words: list[str], *, is_module: bool) -> list[str]:
    """The script or module and its arguments, without the ``--`` that sets them off.

    Raises:
        LaunchError: nothing is named, or no such script.
    """
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise LaunchError("nothing to run. Next step: smda run -- script.py ARGUMENTS, or -m MODULE -- ARGUMENTS.")
    if is_module:
        return [words[0], *(words[2:] if words[1:2] == ["--"] else words[1:])]
    if not Path(words[0]).is_file():
        raise LaunchError(
            f"script {words[0]!r} does not exist. Next step: check the path; options of smda run go before --."
        )
    return words


def config_of(given: Path | None) -> Path:
    """The configuration's path, absolute: the script may change the working directory.

    Raises:
        LaunchError: none is named, or it is no file. Its content is checked when the trainer begins.
    """
    named = given or (Path(os.environ["SMDA_CONFIG"]) if os.environ.get("SMDA_CONFIG") else None)
    if named is None:
        raise LaunchError("no configuration is named. Next step: smda run --config FILE, or set SMDA_CONFIG.")
    if not named.is_file():
        raise LaunchError(f"configuration {str(named)!r} does not exist. Next step: check the path.")
    return named.absolute()
