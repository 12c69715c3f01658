"""Recompute a finished or running run from its store and say whether the stored numbers hold.

Shifts, accounts, policy, hashes, the sequence of steps, and what was sent to a tracker are made again from the stored
snapshots. Exit code 1 if any of it does not agree.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from smda_callbacks.cli.output import add_json, count, screen, show_table
from smda_callbacks.cli.runs import run_folder

HELP = "recompute a run from its store; do its numbers hold?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda verify``."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run store, for example smda-quickstart/run")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check the store; 1 if a check fails."""
    from smda_callbacks.report.verify import verify
    from smda_callbacks.sinks.store_reader import RunStore

    out = screen(args)
    store = RunStore.open(run_folder(args.folder))
    checks = verify(store)
    rows = [
        ("OK" if each.ok else "FAIL", each.name, f"{each.largest_error:.1e}", f"{each.tolerance:.0e}", each.detail)
        for each in checks
    ]
    show_table(out, f"{args.folder}", ["", "check", "#largest error", "#allowed", "what was looked at"], rows)
    failed = [each.name for each in checks if not each.ok]
    if failed:
        out.say(
            f"{len(failed)} of {count(len(checks), 'check')} failed: {', '.join(failed)}. The store was changed after "
            "it was written, or by another version. Next step: do not use these numbers; restore the folder or run "
            "again.",
            "bold red",
        )
    else:
        out.say(f"All {len(checks)} checks hold: the stored numbers follow from the stored snapshots.", "green")
    out.emit({"ok": not failed, "run": str(args.folder), "checks": [vars(each) for each in checks]})
    return 1 if failed else 0
