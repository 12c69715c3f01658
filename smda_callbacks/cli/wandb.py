"""Send a stored run to Weights & Biases.

A run store is complete whatever became of W&B: sync sends what W&B has not, once it answers. Every command can be
repeated; nothing is sent twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from smda_callbacks.cli.output import add_json, count, screen
from smda_callbacks.cli.runs import run_folder

HELP = "send a stored run to W&B; make its workspace and report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda wandb``."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="what")
    sync = commands.add_parser("sync", help="send what W&B has not of a run store: rows, tables, summary, artifacts")
    sync.add_argument("folder", metavar="RUN", type=Path, help="a run store")
    sync.add_argument("--project", help="default: WANDB_PROJECT, then the run's configuration, then smda")
    sync.add_argument("--entity", help="default: W&B's")
    sync.add_argument("--mode", choices=("online", "offline"), help="offline writes a folder for wandb sync and leet")
    sync.add_argument("--id", help="of the W&B run; default: smda- and the id of the run store")
    sync.add_argument("--timeout", metavar="S", type=float, default=600.0, help="give up after so many seconds (600)")
    add_json(sync)


def run(args: argparse.Namespace) -> int:
    """``smda wandb sync``."""
    return sync(args)


def sync(args: argparse.Namespace) -> int:
    """Send a stored run and say where it is."""
    from smda_callbacks.sinks.store_reader import RunStore
    from smda_callbacks.sinks.wandb_sync import sync_run

    out = screen(args)
    found = sync_run(
        RunStore.open(run_folder(args.folder)),
        project=args.project,
        entity=args.entity,
        mode=args.mode,
        run_id=args.id,
        patience=args.timeout,
    )
    where = f"{found.entity}/{found.project}/{found.id}" if found.entity else f"{found.project}/{found.id}"
    if not found.anything:
        out.say(f"Nothing was sent: {found.folder or where} has all {count(found.of, 'row')} already.", "green")
    elif found.folder is not None:
        out.say(f"{count(found.rows, 'row')}, tables, summary and artifacts were written to {found.folder}.", "green")
        out.say(f"See it: wandb leet {found.folder}. Send it: wandb sync {found.folder}")
    else:
        rows = f"{count(found.rows, 'row')} of {found.of:,}"
        out.say(f"{rows} and what else was missing were sent to {found.url or where}.", "green")
    out.emit({**vars(found), "folder": None if found.folder is None else str(found.folder), "run": str(args.folder)})
    return 0
