"""Send a stored run to Weights & Biases; make a workspace or a report of runs there.

A run store is complete whatever became of W&B: sync sends what W&B has not, once it answers; it can be repeated, and
nothing is sent twice. A RUN of workspace and report is a run store, or entity/project/run of a W&B server.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from smda_callbacks.cli.output import add_json, count, screen
from smda_callbacks.cli.runs import cache_folder, run_folder, run_source

if TYPE_CHECKING:
    from smda_callbacks.records import RunStart
    from smda_callbacks.sinks.wandb_views_build import Named

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
    workspace = commands.add_parser("workspace", help="a workspace of runs, sections in reading order")
    report = commands.add_parser("report", help="a report that compares runs")
    for each, what in ((workspace, "SMDA"), (report, "SMDA: what the runs did")):
        each.add_argument("runs", metavar="RUN", nargs="+", help="a run store, or entity/project/run")
        each.add_argument("--name", default=what, help=f"default: {what}")
        each.add_argument("--entity", help="of the runs whose store does not say it; default: W&B's")
        each.add_argument("--dry-run", action="store_true", help="print the specification as JSON; nothing is sent")
    for each in (sync, workspace, report):
        add_json(each)


def run(args: argparse.Namespace) -> int:
    """``smda wandb sync``, ``workspace`` or ``report``."""
    return sync(args) if args.what == "sync" else view(args)


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
        out.say(f"{count(found.rows, 'row')}, tables, summary and artifacts were written offline.", "green")
        out.lines(f"see it:  wandb leet {found.folder}\nsend it: wandb sync {found.folder}")
    else:
        rows = f"{count(found.rows, 'row')} of {found.of:,}"
        out.say(f"{rows} and what else was missing were sent to {found.url or where}.", "green")
    out.emit({**vars(found), "folder": None if found.folder is None else str(found.folder), "run": str(args.folder)})
    return 0


def view(args: argparse.Namespace) -> int:
    """Make a workspace or a report, or print what would be sent."""
    from smda_callbacks.sinks import wandb_views as views
    from smda_callbacks.sinks import wandb_views_build as build

    out = screen(args)
    found = [_named(text, args.entity) for text in args.runs]
    runs, starts = [each[0] for each in found], [each[1] for each in found]
    sections = views.sections_of(starts)
    if args.what == "workspace":
        made = build.workspace(args.name, runs, sections)
    else:
        made = build.report(args.name, runs, sections, views.compared(starts), offline=args.dry_run)
    if args.dry_run:
        print(json.dumps(build.specification(made), indent=2, ensure_ascii=False))
        return 0
    build.save(made)
    out.say(f"{made.url} shows {count(len(runs), 'run')} in {count(len(sections), 'section')}.", "green")
    out.emit({"url": made.url, "runs": [vars(each) for each in runs], "sections": [each.title for each in sections]})
    return 0


def _named(text: str, entity: str | None) -> tuple[Named, RunStart]:
    """A run's name in W&B, and what it began with."""
    from smda_callbacks.sinks.wandb_runs import sent_to
    from smda_callbacks.sinks.wandb_views_build import Named, ViewError

    source = run_source(text, cache_folder())
    if source.store is None:
        raise ViewError(
            f"{text}: no run store was found, only metrics, and they do not say what the run can show. Next step: give "
            "its run store."
        )
    if source.kind == "W&B":
        return Named(*text.split("/")), source.store.start
    sent = sent_to(source.store.path)
    if sent is None:
        raise ViewError(f"{text} was never sent to W&B. Next step: smda wandb sync {text}")
    return Named(sent["entity"] or entity, sent["project"], sent["id"]), source.store.start
