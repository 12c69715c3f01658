"""Markdown tables of overhead.json, which recipes/evidence/tables.py takes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
Grid = Callable[[Sequence[str], Iterable[Sequence[str]]], str]

#: Rows of a training in words; peers' names are theirs.
ROWS = {
    "plain": "no callback",
    "step": "step level, every step",
    "step_every_10": "step level, every 10 steps",
    "ghost": "with pairs (ghost), every step",
    "ghost_every_10": "with pairs (ghost), every 10 steps",
    "exact": "with pairs (exact), every step",
    "exact_every_10": "with pairs (exact), every 10 steps",
    "capture": "gradients of pairs captured, nothing else",
    "by_hand": "by hand: a row per probe and opening, all logits, all features, scikit-learn",
}

#: Parts in the order of the scaling table.
PARTS = {
    "train": "training step",
    "forward": "bare pass over probes",
    "measure": "measurement",
    "capture": "capture",
    "ghost": "ghost, beside it",
    "exact": "exact, beside it",
    "refit": "refit",
}


def cost_tables(grid: Grid) -> dict[str, tuple[str, Callable[[Result], str]]]:
    """Name -> file of results, and what makes the table."""

    def table(part: str, make: Callable[[Grid, Result], str]) -> tuple[str, Callable[[Result], str]]:
        return "overhead.json", lambda result: f"{make(grid, result[part])}\n\n{made(result[part]['environment'])}"

    setups = ("quickstart", "llama-512", "llama-1536")
    return {
        **{f"overhead-{setup}": table(setup, training) for setup in setups},
        "overhead-memory": table("memory", memory),
        "overhead-scaling": table("scaling", scaling),
        "overhead-model": table("model", errors),
        "overhead-predicted": table("model", predicted),
    }


def made(environment: Result) -> str:
    """One line on when, on what and with what a part was made."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    quick = "; a quick run" if environment["quick"] else ""
    threads = f"{environment['threads']} of {environment['cores']} cores"
    return f"{environment['date']}{quick}; {environment['machine']}, {threads}; {versions}."


def training(grid: Grid, part: Result) -> str:
    """Time with over without; what was left out, and whether the training stayed what it was."""
    rows = [
        [
            ROWS.get(name, name),
            f"{row['value']:.2f}",
            f"{row['min']:.2f} to {row['max']:.2f}",
            f"{row['milliseconds']:.0f}",
            "yes" if row["same_losses_and_weights"] else "**no**",
        ]
        for name, row in part["rows"].items()
    ]
    found = grid(["training", "× plain", "blocks of steps", "ms a step", "same losses and weights"], rows)
    every, engine = part["default"]["every"], part["default"]["engine"]
    default = f"By default it measures at every {'' if every == 1 else f'{every}. '}step, with engine {engine}."
    over = f"One measurement takes {part['over_forward']:.2f} × one bare forward pass of the probes' tokens. {default}"
    return "\n".join([found, "", over, *(f"{name}: left out ({why})." for name, why in part["missing"].items())])


def memory(grid: Grid, part: Result) -> str:
    """Peak memory per training, and how much more than the plain one takes."""
    rows = [
        [setup, ROWS.get(name, name), f"{value:.0f}", f"{value - peak['plain']:+.0f}"]
        for setup, peak in part["mib"].items()
        for name, value in peak.items()
    ]
    return grid(["set-up", "training", "MiB", "more than plain"], rows)


def scaling(grid: Grid, part: Result) -> str:
    """Milliseconds at the ends of every axis, and the powers that time grows by: measured, and the cost model's."""
    rows = []
    for axis, found in part["axes"].items():
        values = list(found["rows"])
        for value in (values[0], values[-1]):
            row = found["rows"][value]
            times = [row["seconds"].get(name, {}).get("value") for name in PARTS]
            rows.append([f"{axis}: {value}", *("–" if t is None else f"{1e3 * t:.1f}" for t in times)])
            rows[-1].append(f"{row['mib']['ghost']:.0f}")
        powers = [(found["growth"][name]["measured"], found["growth"][name]["model"]) for name in PARTS]
        text = ["–" if a is None or b is None else f"{a:.2f} ({b:.2f})" for a, b in powers]
        memory_power = found["growth"]["ghost MiB"]["measured"]
        rows.append(["grows as (model)", *text, "–" if memory_power is None else f"{memory_power:.2f}"])
    return grid(["ms", *PARTS.values(), "ghost MiB"], rows)


def errors(grid: Grid, part: Result) -> str:
    """Relative errors of the cost model, by part."""
    rows = [
        [name, str(row["rows"]), f"{row['own']['median']:.0%}", f"{row['own']['worst']:+.0%} ({row['own']['where']})"]
        for name, row in part["summary"].items()
        if "own" in row
    ]
    return grid(["part", "rows", "median error", "worst"], rows)


def predicted(grid: Grid, part: Result) -> str:
    """Predicted runs: nothing of this was measured."""
    columns = [f"{engine} every {every}" for engine in ("step", "ghost") for every in (1, 10)]
    rows = []
    for run in part["predicted"]["runs"]:
        ratios = [run["ratios"].get(column) for column in columns]
        held = f"{run['ghost_gib']:.0f} + {run['pairs_gib']:.0f} a step" if "ghost_gib" in run else "–"
        rows.append([f"{run['model']}, {run['how']}, {run['gpus']} GPUs", f"{run['train']:.2f}"])
        rows[-1] += [*("–" if each is None else f"{each:.2f}" for each in ratios), held]
    head = ["predicted, × plain", "training step, s", *columns, "ghost's gradients + pairs', GiB"]
    return grid(head, rows)
