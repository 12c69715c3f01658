"""What would each of these training pairs do alone? One LoRA step per pair, always from the same model.

For every pair: a fresh adapter, one update on that pair, one reading of the probes, everything put back. Nothing is
trained and the model is not changed. The same command with the same --out goes on with an audit that was stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smda_callbacks.cli.inputs import InputError, load_model
from smda_callbacks.cli.output import Screen, add_json, change, count, number, screen, show_table, styled

if TYPE_CHECKING:
    from smda_callbacks.config.audit import AuditJob
    from smda_callbacks.records import WindowRecord
    from smda_callbacks.sinks.store_reader import RunStore

HELP = "what would each training pair do alone, from a fixed model?"

TOP = 10
TEXT = 60  # characters of a pair's text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda audit``."""
    add = parser.add_argument
    add("--config", metavar="FILE", type=Path, required=True, help="a configuration; its section audit is the update")
    add("--pairs", metavar="FILE", required=True, help="JSONL with prompt and completion, or messages, in every line")
    add("--out", metavar="RUN", type=Path, help="folder of the store; an audit in it is gone on with (smda-audit)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Audit, and say what came of it."""
    from smda_callbacks.config.audit import carry_out, prepare_audit
    from smda_callbacks.config.load import load_config
    from smda_callbacks.sinks.store_reader import RunStore

    out, config = screen(args), load_config(args.config)
    if not config.model.id:
        raise InputError(f"{args.config} names no model. Next step: set model.id to the model to audit.")
    job = prepare_audit(config, args.pairs, args.out)
    again = f"smda audit --config {args.config} --pairs {args.pairs} --out {job.folder}"
    _announce(out, job, args)
    began = time.perf_counter()
    try:
        end = carry_out(job, *load_model(config))
    except KeyboardInterrupt:
        out.say(f"Stopped. What was measured is kept in {job.folder}. To go on where it stopped: {again}", "bold")
        raise
    store = RunStore.open(job.folder)
    facts = summary(store)
    new = end.step - job.done
    facts |= {"resumed_after": job.done, "seconds": time.perf_counter() - began}
    facts |= {"seconds_per_step": end.train_seconds / new if new else None}
    show(out, store, facts)
    out.emit(facts)
    return 0


def _announce(out: Screen, job: AuditJob, args: argparse.Namespace) -> None:
    if job.done:
        out.say(f"Going on with the audit in {job.folder} after step {job.done:,}.")
    audit = job.config.audit
    out.say(
        f"Auditing {count(len(job.rows), 'row')} of {args.pairs} on {job.config.model.id}: {audit.optimizer}, learning "
        f"rate {audit.learning_rate:g}, {count(audit.steps, 'step')}, {count(audit.repeats, 'repeat')}. Into "
        f"{job.folder}.",
        "dim",
    )


def summary(store: RunStore) -> dict[str, Any]:
    """What an audit found, for programs: its largest pairs and the means of its groups on the first functional."""
    from smda_callbacks.report.ranking import ranked
    from smda_callbacks.sinks.pair_table import pair_table

    windows, audit = store.windows(), store.manifest["audit"]
    status = [window.status for window in windows]
    table = pair_table(store.start, windows)
    name = None if table is None else table.functionals[0]
    return {
        "run": str(store.path),
        "pairs": audit["pairs"],
        "rows": audit["rows"],
        "repeats": audit["repeats"],
        "steps": audit["steps"],
        "windows": {kind: status.count(kind) for kind in ("ok", "not_finite", "failed")},
        "functional": name,
        "top": [] if table is None or name is None else ranked(table, store.policy, name, top=TOP),
        "groups": groups_of(store),
        **_health(windows),
    }


def _health(windows: list[WindowRecord]) -> dict[str, float | None]:
    """Medians over the windows of what the SAE misses of a change, plainly and at fixed gates."""
    from statistics import median

    found: dict[str, float | None] = {}
    for name in ("delta_fvu", "delta_fvu_magnitude"):
        values = [getattr(window.health, name) for window in windows if window.health is not None]
        known = [value for value in values if value is not None]
        found[name] = median(known) if known else None
    return found


def groups_of(store: RunStore) -> list[dict[str, Any]]:
    """Mean effect on the first functional per kind of pair (per category, or all in one, where there is no kind).

    ``mean``: over all windows of the group. ``spread``: standard deviation over the repeats of the group's mean; None
    with one repeat. ``error``: standard error of the mean over the group's pairs; None with one pair.
    """
    import numpy as np

    records, repeats = store.windows(), store.manifest["audit"]["repeats"]
    pairs = {pair.id: pair for window in records for pair in window.pairs_seen}
    key = next((k for k in ("kind", "category") if any(k in pair.columns for pair in pairs.values())), None)
    found: dict[str, dict[tuple[int, int], float]] = {}
    for window in records:
        if window.pairs is not None:
            pair = int(window.pairs.ids[0])
            group = "all" if key is None else pairs[pair].columns.get(key, "–")
            found.setdefault(group, {})[pair, (window.step - 1) % repeats] = float(window.pairs.effect[0, 0])
    rows = []
    for group, values in found.items():
        by_repeat = _means(values, 1)
        by_pair = _means(values, 0)
        rows.append(
            {
                "group": group,
                "pairs": len(by_pair),
                "mean": float(np.mean(list(values.values()))),
                "spread": float(np.std(by_repeat, ddof=1)) if len(by_repeat) > 1 else None,
                "error": float(np.std(by_pair, ddof=1) / np.sqrt(len(by_pair))) if len(by_pair) > 1 else None,
            }
        )
    return rows


def _means(values: dict[tuple[int, int], float], axis: int) -> list[float]:
    """Means of values keyed by (pair, repeat), over everything but one of the two."""
    sums: dict[int, list[float]] = {}
    for key, value in values.items():
        sums.setdefault(key[axis], []).append(value)
    return [sum(each) / len(each) for each in sums.values()]


def show(out: Screen, store: RunStore, facts: dict[str, Any]) -> None:
    """Print a summary."""
    name, folder = facts["functional"], facts["run"]
    if name is None:
        out.say("No pair could be measured: every reading failed or was not finite.", "bold red")
    else:
        _show_top(out, facts["top"], name, facts["pairs"])
        _show_groups(out, facts["groups"], name)
    bad = facts["windows"]["failed"] + facts["windows"]["not_finite"]
    if bad:
        out.say(f"{count(bad, 'step')} could not be measured and {'is' if bad == 1 else 'are'} in no figure.", "yellow")
    if (facts["delta_fvu"] or 0.0) > store.manifest["config"]["alerts"]["delta_fvu"]:
        fixed = facts["delta_fvu_magnitude"]
        out.say(
            f"The SAE misses most of these changes (median delta-FVU {facts['delta_fvu']:.2g}, at fixed gates "
            f"{number(fixed, 2)}; from 1 on it says nothing of a change): trust effects on behaviours, and shifts of "
            "single features only where this is below 1.",
            "yellow",
        )
    if facts["seconds_per_step"] is not None:
        out.say(f"{facts['seconds_per_step']:.2f} s per pair and repeat.")
    out.say(f"The store is {folder}. Next: smda pairs {folder}, smda report {folder}, smda verify {folder}.")


def _show_top(out: Screen, rows: list[dict[str, Any]], name: str, pairs: int) -> None:
    digits, spread = _digits([row["effect"] for row in rows]), any(row["spread"] is not None for row in rows)
    kind = any("kind" in row["columns"] for row in rows)
    cells = []
    for row in rows:
        noise = {True: "above", False: styled("below", "dim"), None: None}[row["above_noise"]]
        text, strong = " ".join((row["text"] or "").split()), row["above_noise"] is not False
        cells.append(
            [
                ", ".join(map(str, row["rows"][:3])),
                *([row["columns"].get("kind")] if kind else []),
                _toned(change(row["effect"], digits), strong),
                *([_toned(number(row["spread"], digits), strong)] if spread else []),
                noise,
                _toned(text[:TEXT] + ("…" if len(text) > TEXT else ""), strong),
            ]
        )
    columns = ["#row", *(["kind"] if kind else []), "#effect", *(["#spread"] if spread else []), "noise", "text"]
    caption = "Effect: change of the mean behaviour after one update on this pair alone" + (
        "; spread: standard deviation over the repeats." if spread else "."
    )
    show_table(
        out, f"{name}: the {len(rows)} of {count(pairs, 'pair')} that move it most", columns, cells, caption=caption
    )


def _toned(text: str, strong: bool) -> object:
    return text if strong else styled(text, "dim")


def _show_groups(out: Screen, rows: list[dict[str, Any]], name: str) -> None:
    digits, spread = _digits([row["mean"] for row in rows]), any(row["spread"] is not None for row in rows)
    cells = [
        [
            row["group"],
            row["pairs"],
            change(row["mean"], digits),
            number(row["error"], digits),
            *([number(row["spread"], digits)] if spread else []),
        ]
        for row in rows
    ]
    columns = ["group", "#pairs", f"#mean effect on {name}", "#error", *(["#spread"] if spread else [])]
    caption = "Error: standard error over the pairs." + (" Spread: of the mean over the repeats." if spread else "")
    show_table(out, "By kind of pair", columns, cells, caption=caption)


def _digits(values: list[float]) -> int:
    """Decimals that show the largest value with three digits."""
    import math

    largest = max(map(abs, values), default=0.0)
    return 3 if largest <= 0 else min(9, max(3, 2 - math.floor(math.log10(largest))))
