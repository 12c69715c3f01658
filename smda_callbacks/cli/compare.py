"""Compare runs: trajectories, policy by feature and pathway, pairs that act in one run and not in the other, cost.

A RUN is a run store, the folder that W&B keeps of a run (wandb/offline-run-…), or entity/project/run of a W&B server,
from which the run store that was logged is downloaded. The first one is the reference. Runs are called A, B, C … in the
order given. Runs with different probes, SAE, policy, behaviours or target are refused: their numbers do not mean the
same.

Runs are aligned by optimizer step; where they end apart, the end is held against the end. Noise is the root of the sum
of the squares of both runs' noise floors; a difference counts above twice it. The floors are those of random updates:
whether another seed differs as much, only another run says.

With --json: reference; runs (given, source, store, run_id, created, status, first_step, last_step); mismatches (values,
note); settings (value by run); alignment (common_steps, last_step, same_end, text); unit; trajectories by metric
(behaviour, of, name, expected, values as [step, mean], at_end and at_common: difference, floor, above_noise); pathways
(part, norm, apart); features (feature, behaviour, title, start, end, shift, apart by part and total); features_common,
the same at the last common step where runs end apart; pairs (functional, unit, matched_by, warning, trained, unmatched,
shared, only, correlation, differing: text, columns, rows, acts_in, runs: state, effect, floor, windows); cost (windows,
measuring, median, attribution, training, share); summary by metric; notes. What is by run has the run's letter as key;
null is what is not known.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from smda_callbacks.cli.output import add_json, screen
from smda_callbacks.cli.runs import cache_folder, run_source

if TYPE_CHECKING:
    from smda_callbacks.report.compare import Comparison

HELP = "compare runs: behaviour, policy, pairs, cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda compare``."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="two or more; the first is the reference")
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="compare what can be compared of runs that differ in probes, SAE, policy or behaviours",
    )
    parser.add_argument(
        "--by", metavar="F", help="what pairs are compared by, as in smda pairs (default: refusal:harmful)"
    )
    parser.add_argument("--top", metavar="N", type=_positive, default=10, help="rows of a table (default: 10)")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the comparison as one HTML page, too")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="where downloads are kept (default: ~/.cache/smda)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print, and write the page."""
    from smda_callbacks.cli.compare_tables import show_comparison

    out = screen(args)
    found = find(args)
    show_comparison(out, found, args.top)
    html: str | None = None
    if args.html is not None:
        from smda_callbacks.report.compare_page import write_comparison

        html = str(write_comparison(found, args.html))
        out.say(f"{html}: open it in a browser; it needs no network.")
    if args.json:
        from smda_callbacks.report.compare import as_json

        out.emit({**as_json(found), "html": html})
    return 0


def find(args: argparse.Namespace) -> Comparison:
    """The comparison that the arguments ask for."""
    from smda_callbacks.report.compare import compare

    cache = args.cache or cache_folder()
    return compare([run_source(each, cache) for each in args.runs], by=args.by, allow_mismatch=args.allow_mismatch)


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value
