"""The cost model against everything that was measured: relative errors of all rows, and its predictions for large runs.

``own``: calibrated by the bare training step of the same set-up: forward, backward, optimizer, and no trainer around
it. ``one``: by that of one set-up, the first of the scaling's, for all of them. Of a training by TRL what is predicted
is the time that watching adds; it is set over the step that was measured without, whose trainer takes time of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recipes.evidence.cost_machine import CPU_THREAD, DATACENTRE_GPU, Machine, Stated, calibrated
from recipes.evidence.cost_model import Work
from recipes.evidence.cost_parts import book, capture, exact, functional_gradients, measure, parts, train
from recipes.evidence.cost_runs import lines as run_lines
from recipes.evidence.cost_runs import predict
from recipes.evidence.overhead_setups import pairs_made
from recipes.evidence.overhead_turns import FEW, STEPS, blocks

#: Parts that are checked.
CHECKED = ("forward", "measure", "capture", "ghost", "exact", "refit")

#: A part that takes less than this share of a training step is no cost worth predicting; errors are summed up without
#: it.
WORTH = 0.1


def check_model(found: Mapping[str, Any]) -> dict[str, Any]:
    """Errors of every row, what sums them up, and the predictions.

    Raises:
        ValueError: nothing was measured that it could be checked against.
    """
    cases = list(dict(_cases(found)).items())
    if not cases:
        raise ValueError("the file holds no measured part. Next step: measure quickstart, llama-512 or scaling first.")
    device = [part["environment"]["machine"] for part in found.values() if "environment" in part]
    stated = DATACENTRE_GPU if any("NVIDIA" in each for each in device) else CPU_THREAD
    one = machine_of(next((row for name, row in cases if ":" in name), cases[0][1]), stated)
    rows = [each for name, row in cases for each in _part_errors(name, row, one, stated)]
    rows += [each for name in found for each in _ratio_errors(name, found[name], stated)]
    predicted = predict()
    summary = {part: summed([each for each in rows if each["part"] == part]) for part in (*CHECKED, "ratio")}
    summary["all"] = summed([each for each in rows if each["worth"]])
    return {
        "errors": rows,
        "summary": summary,
        "flops_per_second": {"one": one.flops, **{name: machine_of(row, stated).flops for name, row in cases}},
        "stated": {"machine": stated._asdict(), "worth": WORTH},
        "predicted": predicted,
        "lines": [*_lines(summary), "", *run_lines(predicted)],
    }


def _cases(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Measured set-ups by name, no one twice."""
    seen = []
    for axis, result in found.get("scaling", {}).get("axes", {}).items():
        for value, row in result["rows"].items():
            if row["case"] not in seen:
                seen.append(row["case"])
                yield f"{axis}: {value}", row
    for name, part in found.items():
        if "parts" in part:
            yield name, part["parts"]


def machine_of(row: Mapping[str, Any], stated: Stated) -> Machine:
    """Calibrated by this set-up's plain training step."""
    return calibrated(train(Work.from_json(row["work"])), row["seconds"]["train"]["value"], stated)


def _part_errors(name: str, row: Mapping[str, Any], one: Machine, stated: Stated) -> Iterator[dict[str, Any]]:
    costs, own = parts(Work.from_json(row["work"])), machine_of(row, stated)
    step = row["seconds"]["train"]["value"]
    for part in CHECKED:
        measured = row["seconds"].get(part, {}).get("value")
        if measured is None or measured <= 0:
            continue
        errors = {which: machine.seconds(costs[part]) / measured - 1 for which, machine in (("own", own), ("one", one))}
        worth = bool(measured >= WORTH * step)
        yield {"row": name, "part": part, "measured": measured, **errors, "worth": worth}


def _ratio_errors(name: str, part: Mapping[str, Any], stated: Stated) -> Iterator[dict[str, Any]]:
    """Trainings by TRL, watched over not watched."""
    if "parts" not in part:
        return
    own, work = machine_of(part["parts"], stated), Work.from_json(part["parts"]["work"])
    step = part["rows"]["plain"]["milliseconds"] / 1e3
    for row in ratio_costs(work):
        if row in part["rows"]:
            measured = part["rows"][row]["value"]
            carried = carried_at(part["rows"][row]["steps"], row, work.carried)
            costs = ratio_costs(replace(work, carried=carried))[row]
            ratio = 1 + sum(own.seconds(each) for each in costs) / step
            yield {
                "row": f"{name}: {row}",
                "part": "ratio",
                "measured": measured,
                "predicted": ratio,
                "own": ratio / measured - 1,
                "worth": True,
            }


def carried_at(steps: int, row: str, most: int) -> int:
    """Earlier steps whose momentum a training has followed, on the mean over the steps that its figure is taken of."""
    _, warm, size = FEW.get(row, STEPS)
    counted = [step for block in blocks(steps, warm, size) for step in block]
    return round(sum(min(step, most) for step in counted) / max(len(counted), 1))


def ratio_costs(work: Work) -> dict[str, list[Any]]:
    """Costs that a training by name of its row has per step beside the training's own."""
    found = {"capture": [capture(work)]}
    for suffix, every in (("", 1), ("_every_10", 10)):
        window = measure(work) * (1 / every)
        found[f"step{suffix}"] = [window]
        found[f"ghost{suffix}"] = [window, capture(work), functional_gradients(work) * (1 / every), book(work)]
        pairs = min(work.pairs * every, pairs_made(work.pairs))  # those of a window, once each
        found[f"exact{suffix}"] = [window, capture(work), exact(work, pairs=pairs, steps=every) * (1 / every)]
    return found


def summed(errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and worst size of the errors, by both calibrations where there are both, and how many."""
    found: dict[str, Any] = {"rows": len(errors)}
    for which in ("own", "one"):
        sizes = [abs(each[which]) for each in errors if which in each]
        if sizes:
            worst = max((each for each in errors if which in each), key=lambda each: abs(each[which]))
            found[which] = {"median": float(np.median(sizes)), "worst": worst[which], "where": worst["row"]}
    return found


def _lines(summary: Mapping[str, Any]) -> list[str]:
    found = [f"{'part':<10}{'rows':>5}{'median error':>14}{'worst':>8}  where (own step); one step for all"]
    for part, row in summary.items():
        if "own" not in row:
            continue
        one = f"; {row['one']['median']:.0%}, worst {row['one']['worst']:+.0%}" if "one" in row else ""
        own = row["own"]
        found.append(f"{part:<10}{row['rows']:>5}{own['median']:>14.0%}{own['worst']:>+8.0%}  {own['where']}{one}")
    return found
