"""Write a run as one HTML page that opens offline, in any browser. Nothing is trained or loaded; the store suffices."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from smda_callbacks.cli.output import add_json, screen
from smda_callbacks.cli.runs import run_folder

HELP = "write a run as one HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda report``."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run store, for example smda-quickstart/run")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write the page (default: inside the store)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    from smda_callbacks.report.page import write_report

    out = screen(args)
    began = time.perf_counter()
    path = write_report(run_folder(args.folder), args.out)
    seconds = time.perf_counter() - began
    size = path.stat().st_size
    out.say(f"{path} ({size / 1e6:.1f} MB, {seconds:.1f} s). Open it in a browser; it needs no network.")
    out.emit({"report": str(path), "run": str(args.folder), "seconds": seconds, "bytes": size})
    return 0
