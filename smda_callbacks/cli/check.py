"""Is this model, with this SAE, these probes and this configuration, fit for a watched run? Found out before the run.

Loads the model, lets it answer some probes greedily, and reads all of them once. Every check says OK, WARN or FAIL,
why, and what to do. Exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from smda_callbacks.cli.check_stages import STAGES, Bench
from smda_callbacks.cli.findings import Finding
from smda_callbacks.cli.inputs import add_inputs, resolve_config
from smda_callbacks.cli.output import Screen, add_json, screen, show_table

if TYPE_CHECKING:
    from smda_callbacks.observe.calibration import Calibration

HELP = "before a run: do model, SAE, probes and openings fit together?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda check``."""
    add_inputs(parser)
    parser.add_argument(
        "--answers", metavar="N", type=int, default=32, help="greedy answers per group of probes (default: 32)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """All checks; 1 if one fails."""
    from smda_callbacks.config.load import ConfigError

    out = screen(args)
    try:
        config = resolve_config(args)
    except ConfigError as error:
        if args.config is not None and not args.config.is_file():
            raise
        return _conclude(out, [Finding("configuration", "FAIL", str(error), "correct the file")], {}, [])
    out.say(f"Checking {config.model.id} with {config.sae.source} ...", "dim")
    bench = Bench(config, args.answers, [Finding("configuration", "OK", "valid")])
    for name, (stage, needs) in STAGES.items():
        if any(getattr(bench, each) is None for each in needs):
            bench.skipped.append(name)
            continue
        with _caught(bench, name):
            stage(bench)
    return _conclude(out, bench.found, bench.facts, bench.skipped, bench.calibration)


@contextmanager
def _caught(bench: Bench, name: str) -> Iterator[None]:
    """A refusal inside becomes a finding: its message says what to do."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("smda_callbacks."):
            raise
        reason, _, step = str(error).partition("Next step: ")
        bench.found.append(Finding(name, "FAIL", reason.strip(), step.strip()))


def _show_missed(out: Screen, found: Calibration, most: int = 10) -> None:
    rows = [(each.refuse, each.comply, repr(each.opening)) for each in found.missed[:most]]
    left = len(found.missed) - most
    show_table(
        out,
        "Openings that no list holds, by number of greedy answers",
        ["#to refuse", "#to comply", "opening"],
        rows,
        caption=f"and {left} more (--json has all)" if left > 0 else None,
    )


def _conclude(
    out: Screen,
    found: Sequence[Finding],
    facts: Mapping[str, Any],
    skipped: Sequence[str],
    calibration: Calibration | None = None,
) -> int:
    rows = [
        (each.status, each.name, each.detail + (f"\n→ {each.next_step}" if each.next_step else "")) for each in found
    ]
    show_table(out, "Checks", ["", "check", "found, and what to do"], rows)
    if calibration is not None and calibration.missed:
        _show_missed(out, calibration)
    fails = sum(each.status == "FAIL" for each in found)
    warns = sum(each.status == "WARN" for each in found)
    if skipped:
        out.say(f"Not checked, because of the above: {', '.join(skipped)}.", "yellow")
    if fails:
        out.say("Not fit for a run: see FAIL above.", "bold red")
    else:
        out.say(f"Fit for a run{f', with {warns} to keep in mind' if warns else ''}.", "green")
    checks = [vars(each) for each in found]
    out.emit({"ok": not fails, "checks": checks, "not_checked": list(skipped), "missed_openings": [], **facts})
    return 1 if fails else 0
