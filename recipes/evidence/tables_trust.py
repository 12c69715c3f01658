"""Markdown tables of faithfulness.json and noise.json, which recipes/evidence/tables.py takes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
Grid = Callable[[Sequence[str], Iterable[Sequence[str]]], str]

KINDS = ("factor 0", "factor 0.5", "factor 2", "features of one sign at once", "all features at once")
NULLS = {
    "shift_x_magnitude": "ΔX magnitude",
    "shift_x_gating": "ΔX gating",
    "shift_y": "ΔY",
    "feature, any part": "any part",
    "category": "categories",
}


def trust_tables(grid: Grid) -> dict[str, tuple[str, Callable[[Result], str]]]:
    """Name -> file of results, and what makes the table, for both setups."""
    makers: dict[str, tuple[str, Callable[[Grid, Result, str], str]]] = {
        "faithfulness-settings": ("faithfulness.json", settings),
        "faithfulness-ladder": ("faithfulness.json", ladder),
        "interventions": ("faithfulness.json", interventions),
        "survival": ("noise.json", survival),
        "null": ("noise.json", null),
        "signs": ("noise.json", signs),
    }

    def table(make: Callable[[Grid, Result, str], str], setup: str) -> Callable[[Result], str]:
        return lambda result: f"{make(grid, result['setups'][setup], setup)}\n\n{made(result)}"

    return {
        f"{name}-{setup}": (file, table(make, setup))
        for name, (file, make) in makers.items()
        for setup in ("quickstart", "midi")
    }


def made(result: Result) -> str:
    """One line on when and with what a result was made."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"{result['date']}{'; a quick run' if result['quick'] else ''}; {versions}."


def settings(grid: Grid, found: Result, setup: str) -> str:
    """r of the default, and of the best setting of each half of the pairs on the other half."""
    first = found["steps"]["settings"][0]
    rows = [["the defaults", "all", f"{first['r']:.3f} [{first['r_low']:.2f}, {first['r_high']:.2f}]", "", ""]]
    for side, each in zip(("even", "odd"), found["steps"]["held_out"], strict=True):
        scale = "standardised" if each["standardised"] else "not standardised"
        name = (
            f"{each['support']} features, tolerance {each['tolerance']:g}, {each['readout']}, {each['target']}, {scale}"
        )
        rows.append([name, side, *(f"{each[key]:.3f}" for key in ("r_chosen_on", "r_held_out", "r_default"))])
    head = ["setting", "chosen on pairs", "r there", "r on the others", "defaults on the others"]
    return grid(head, rows)


def ladder(grid: Grid, found: Result, setup: str) -> str:
    """r and slope of every rung."""
    rows = [
        [
            rung,
            f"{row['r']:.3f} [{row['r_low']:.2f}, {row['r_high']:.2f}]",
            *(f"{row[key]:.2f}" for key in ("slope", "r_pairs", "r_categories")),
        ]
        for rung, row in found["steps"]["ladder"].items()
    ]
    return grid(["carried over", "r", "slope", "r over pairs", "r over categories"], rows)


def interventions(grid: Grid, found: Result, setup: str) -> str:
    """Slope, rank correlation and right signs by step, place and kind."""
    rows = []
    for row in found["interventions"]:
        if row["kind"] in KINDS:
            said = row["predicted"]
            cells = [_number(said[key]) for key in ("slope", "r", "rank_r", "right_sign")]
            rows.append([f"{row['step']}, {row['where']}, {row['kind']}", *cells, str(said["said"])])
    return grid(["step, tokens, act", "slope", "r", "rank r", "right sign", "of cases"], rows)


def survival(grid: Grid, found: Result, setup: str) -> str:
    """Share of statements that survive, chance in brackets."""
    kinds = list(found["survival"])
    statements = dict.fromkeys(name for kind in kinds for name in found["survival"][kind])
    rows = []
    for name in statements:
        cells = [found["survival"][kind].get(name) for kind in kinds]
        rows.append([name, *("–" if c is None else f"{c['share']:.2f} ({c['chance']:.2f})" for c in cells)])
    return grid(["statement", *(f"other {kind}" for kind in kinds)], rows)


def null(grid: Grid, found: Result, setup: str) -> str:
    """What is called above noise where nothing happens."""
    rows = [[kind, *(f"{row[key]:.3f}" for key in NULLS), str(int(row["of"]))] for kind, row in found["null"].items()]
    return grid(["random moves", *NULLS.values(), "of"], rows)


def signs(grid: Grid, found: Result, setup: str) -> str:
    """Reliability of windows against features with one sign in both halves."""
    rows = [
        [f"{row['from']:g} to {row['to']:g}", _number(row["same_sign"]), str(row["windows"])]
        for row in found["reliability"]["all"]
    ]
    return grid(["split-half reliability of a window", "features with one sign in both halves", "windows"], rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
