"""How the callback's time and memory grow: one size at a time is changed, all parts are measured in turn at each value.

Growth is the slope of log seconds over log size, a power of the size; beside it stands the slope that the cost model
(recipes/evidence/cost_parts.py) has over the same values.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recipes.evidence.cost_machine import Machine, calibrated
from recipes.evidence.cost_model import Work
from recipes.evidence.cost_parts import parts as cost_parts
from recipes.evidence.overhead_parts import CARRIED, Parts, median, seconds, timed_parts
from recipes.evidence.overhead_setups import Case, Setup, random_setup

#: Engine exact is left out where its readings would take longer than this; from LONG on, one repetition does.
EXACT_SECONDS, LONG = 8.0, 1.0

#: Repetitions.
REPEATS = 2

#: Parts in the order of the table.
NAMES = ("train", "forward", "measure", "capture", "ghost", "exact", "refit")


@dataclass(frozen=True)
class Axis:
    """``name``: of the size; ``cases``: by its value."""

    name: str
    cases: Mapping[int, Case]


def axes(quick: bool = False) -> list[Axis]:
    """What is changed, from which case, to which values; two of the sizes, and tiny, where it is to be quick."""

    def axis(name: str, field: str, values: Sequence[int], start: Case) -> Axis:
        return Axis(name, {value: replace(start, **{field: value}) for value in values})

    if quick:
        tiny = Case(width=32, layers=2, adapted=2, probes=16, prompt=12, answer=12, features=64, support=4, pairs=2)
        return [axis("pairs per step", "pairs", (2, 4), tiny), axis("width", "width", (32, 64), tiny)]
    base = Case()
    grown = {d: replace(base, features=d, support=s) for d, s in ((1024, 16), (4096, 64), (16384, 256))}
    return [
        axis("probes", "probes", (50, 100, 200, 400, 800), base),
        axis("SAE features, policy of 16", "features", (1024, 4096, 16384, 65536, 131072), base),
        Axis("SAE features, policy growing", grown),
        axis("pairs per step", "pairs", (2, 4, 8, 16, 32), base),
        axis("layers adapted", "adapted", (1, 2, 4), base),
        axis("width", "width", (128, 256, 512, 1024), replace(base, probes=32, pairs=2)),
    ]


def measure_case(setup: Setup, sizes: Mapping[str, Any], *, quick: bool) -> dict[str, Any]:
    """All parts of one set-up: seconds (median, min, max), MiB, and the work that the cost model computes them from."""
    parts, repeats = Parts(setup, 1 if quick else CARRIED), 1 if quick else REPEATS
    parts.warm_up()
    work = parts.work()
    parts.forward()
    readings = 3 * work.pairs + 2
    bare = seconds(parts.forward, parts.device)
    exact = 0 if readings * bare > EXACT_SECONDS else 1 if readings * bare > LONG else repeats
    timed = timed_parts(parts, 1 if bare > LONG else repeats, exact=exact)
    return {
        "case": dict(sizes),
        "seconds": {name: spread(values) for name, values in timed.seconds.items()},
        "mib": {name: round(value, 2) for name, value in timed.mib.items()},
        "left_out": {} if exact else {"exact": f"its {readings} readings take more than {EXACT_SECONDS:g} s"},
        "work": work.as_json(),
        "default_engine": parts.default_engine(),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, range, number."""
    return {"value": median(values), "min": min(values), "max": max(values), "repetitions": len(values)}


def measure_axes(quick: bool, device: str, tick: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """All axes; a case that stands on several is measured once."""
    known: dict[Case, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for axis in axes(quick):
        rows = {}
        for value, case in axis.cases.items():
            tick(f"{axis.name} {value}")
            if case not in known:
                with tempfile.TemporaryDirectory() as folder:
                    setup = random_setup("model", case, Path(folder), device)
                    known[case] = measure_case(setup, asdict(case), quick=quick)
            rows[str(value)] = known[case]
        found[axis.name] = {"rows": rows, "growth": growth(rows)}
    return found


def growth(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Per part the power of the size that its time grows by: ``measured``, and ``model``'s; for memory ``measured``."""
    sizes = [float(value) for value in rows]
    cases = list(rows.values())
    costs = [cost_parts(Work.from_json(row["work"])) for row in cases]
    machine = base_machine(cases)
    found: dict[str, dict[str, float | None]] = {}
    for name in NAMES:
        measured = [row["seconds"].get(name, {}).get("value") for row in cases]
        model = [machine.seconds(cost[name]) for cost in costs]
        found[name] = {"measured": slope(sizes, measured), "model": slope(sizes, model)}
    for name in ("train", "measure", "ghost"):
        found[f"{name} MiB"] = {"measured": slope(sizes, [row["mib"][name] for row in cases]), "model": None}
    return found


def base_machine(cases: Sequence[Mapping[str, Any]]) -> Machine:
    """Calibrated by the plain training step of the first case."""
    return calibrated(cost_parts(Work.from_json(cases[0]["work"]))["train"], cases[0]["seconds"]["train"]["value"])


def slope(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Least-squares slope of log value over log size, of values above zero; None where there are fewer than two."""
    known = [(size, value) for size, value in zip(sizes, values, strict=True) if value is not None and value > 0]
    if len(known) < 2:
        return None
    x, y = np.log(np.array(known)).T
    return float(np.polyfit(x, y, 1)[0])


def table(found: Mapping[str, Any]) -> list[str]:
    """Lines of text: milliseconds per part, and growth below."""
    lines = []
    for axis, result in found.items():
        lines += ["", f"{axis:<30}" + "".join(f"{name:>12}" for name in NAMES) + f"{'MiB':>8}{'ghost MiB':>11}"]
        for value, row in result["rows"].items():
            times = [row["seconds"].get(name, {}).get("value") for name in NAMES]
            text = "".join(f"{'-' if each is None else f'{1e3 * each:.1f} ms':>12}" for each in times)
            lines.append(f"{value:>30}{text}{row['mib']['measure']:>8.0f}{row['mib']['ghost']:>11.0f}")
        for label, source in (("grows as size to the", "measured"), ("by the model", "model")):
            powers = [result["growth"][name][source] for name in NAMES]
            lines.append(f"{label:>30}" + "".join(f"{'-' if each is None else f'{each:.2f}':>12}" for each in powers))
    return lines
