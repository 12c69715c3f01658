"""The run in a few sentences, made from its numbers."""

from __future__ import annotations

import numpy as np

from smda_callbacks.maths.uncertainty import LEAST_RELIABILITY
from smda_callbacks.records import FEATURE_ROWS, PATHWAYS, Array
from smda_callbacks.report.audit_verdict import audit_verdict
from smda_callbacks.report.data import TIMES, RunData, behaviour_floors, missed
from smda_callbacks.report.figures import PART_NAMES
from smda_callbacks.report.markup import count, fixed, number, percent, signed
from smda_callbacks.report.shifts import cumulative_shifts, norms, run_reliability, shift_floors, unreliable_parts
from smda_callbacks.report.waterfall import most_changed

#: Smaller changes of a mean are said to be none.
STILL = 0.005


def verdict(data: RunData, behaviour: int) -> list[str]:
    """Sentences on one behaviour, in reading order: groups, worst category, what carried it, noise, SAE.

    Of an audit, what its pairs did instead.
    """
    if data.audit:
        *said, last = audit_verdict(data, behaviour)
        return [*said, sae_sentence(data), last] if data.ok else [*said, last]
    if not data.ok:
        return [f"Nothing has been booked yet. {_levels(data, behaviour)}", state(data)]
    return [
        groups_sentence(data, behaviour),
        *_category_sentences(data, behaviour),
        noise_sentence(data, behaviour),
        reliability_sentence(data),
        sae_sentence(data),
        state(data),
    ]


def _category_sentences(data: RunData, behaviour: int) -> list[str]:
    """The worst category, if any went wrong, and the account of it; else of the one that changed most."""
    category = worst_category(data, behaviour)
    if wrong_way(data, behaviour)[category] >= STILL:
        return [worst_sentence(data, behaviour, category), carried_sentence(data, behaviour, category)]
    said = [f"No category moved away from what is expected of it by {STILL:g} or more."]
    category = most_changed(data, behaviour)
    if abs(data.means[-1, category, behaviour] - data.means[0, category, behaviour]) >= STILL:
        said.append(carried_sentence(data, behaviour, category))
    return said


def groups_sentence(data: RunData, behaviour: int) -> str:
    """Start and end of the mean over the probes to refuse and over those to comply with."""
    parts = []
    for group, means in data.group_means.items():
        start, end = float(means[0, behaviour]), float(means[-1, behaviour])
        parts.append(f"on {probes_to(group)} it {_moved(start, end)}")
    name = data.behaviours[behaviour].capitalize()
    return f"{name} ({data.unit}), step {data.steps[0]} to {data.steps[-1]}: {'; '.join(parts)}."


def probes_to(group: str) -> str:
    """``probes to refuse``, ``probes to comply with``."""
    return "probes to refuse" if group == "refuse" else "probes to comply with"


def wrong_way(data: RunData, behaviour: int) -> Array:
    """How far each category moved away from what is expected of it (refuse fell, comply rose), ``[category]``."""
    change = data.means[-1, :, behaviour] - data.means[0, :, behaviour]
    signs = np.array([-1.0 if data.expected[name] == "refuse" else 1.0 for name in data.categories])
    moved: Array = signs * change
    return moved


def worst_category(data: RunData, behaviour: int) -> int:
    """The category that moved furthest away from what is expected of it."""
    return int(np.argmax(wrong_way(data, behaviour)))


def worst_sentence(data: RunData, behaviour: int, category: int) -> str:
    """The worst category, and whether its change is above the noise floor."""
    name = data.categories[category]
    start, end = (float(data.means[record, category, behaviour]) for record in (0, -1))
    floors = behaviour_floors(data)
    note = "its noise floor was not measured"
    if floors is not None:
        floor = float(floors[-1, category, behaviour])
        word = "above" if abs(end - start) > TIMES * floor else "not above"
        note = f"{word} {TIMES:g} times its noise floor of {number(floor, 2)}"
    return f"Worst category: {name} (should {data.expected[name]}) {_moved(start, end)}, {note}."


def carried_sentence(data: RunData, behaviour: int, category: int) -> str:
    """How much of a category's change the policy's features carry, and how much the policy cannot express."""
    rows = {row: float(values[category, behaviour]) for row, values in data.account.rows.items()}
    change = sum(rows.values())
    parts = {
        "through the policy's features": sum(rows[row] for row in FEATURE_ROWS),
        "through the intercept": rows["intercept"],
        "in the residual, which the policy cannot express": rows["residual"],
    }
    said = [f"{signed(value)} ({percent(value / change)}) {where}" for where, value in parts.items()]
    return f"Of the change of {signed(change)} in {data.categories[category]}: {said[0]}, {said[1]} and {said[2]}."


def noise_sentence(data: RunData, behaviour: int) -> str:
    """Which parts of the policy's shift rise above the noise floor over the run."""
    floors = shift_floors(data)
    if floors is None:
        return "The noise floor was not measured, so no shift can be told from noise."
    shifts = cumulative_shifts(data)
    said: dict[bool, list[str]] = {True: [], False: []}
    for part in PATHWAYS:
        shift, floor = float(norms(shifts[part], behaviour)[-1]), float(norms(floors[part], behaviour)[-1])
        # A floor may be as good as 0: nothing flipped in the random updates.
        ratio = "over 1000" if shift > 1000 * floor else number(shift / floor, 2) if floor > 0 else "0"
        said[shift > TIMES * floor].append(f"{PART_NAMES[part]} ({ratio} times)")
    listed = {above: ", ".join(names) or "nothing" for above, names in said.items()}
    return (
        f"Shifts of the policy over the run that are above {TIMES:g} times their noise floor: {listed[True]}; "
        f"not above: {listed[False]}."
    )


def reliability_sentence(data: RunData) -> str:
    """Split-half reliability of the run's shift, and of a window's in the median; which parts are not to be read."""
    whole, said, greyed = run_reliability(data), [], unreliable_parts(data)
    for part in PATHWAYS:
        values = [value for window in data.ok if (value := window.reliability.get(part)) is not None]
        median = fixed(float(np.median(values)) if values else None)
        said.append(f"{PART_NAMES[part]} {fixed(whole.get(part))} ({median})")
    rest = "every part may be read"
    if greyed:
        rest = f"{', '.join(PART_NAMES[part] for part in greyed)} may not be read and is greyed"
    return (
        f"Reliability of the run's shift between two halves of the probes (and a window's, in the median): "
        f"{', '.join(said)}. Below {LEAST_RELIABILITY:.2f}, which features shifted depends on the probes, whatever the "
        f"noise floor says: {rest}."
    )


def sae_sentence(data: RunData) -> str:
    """Whether the account by SAE features may be read: delta-FVU at fixed gates."""
    checked, bad = missed(data)
    if not checked:
        return "Delta-FVU was not measured, so it is not known whether the feature account is valid."
    values = [
        window.health.delta_fvu_magnitude
        for window in data.ok
        if window.health is not None and window.health.delta_fvu_magnitude is not None
    ]
    median = f"delta-FVU at fixed gates has a median of {fixed(float(np.median(values)))}"
    noun = _noun(data)
    every = f"the one {noun}" if len(checked) == 1 else f"all {len(checked)} {noun}s"
    if not bad:
        return f"The SAE account is valid: {median} and stays at or below 1 in {every} checked."
    if len(bad) == len(checked):
        return f"The SAE account is not valid: {median} and is above 1 in {every} checked. Do not read features."
    return (
        f"The SAE account is valid in part: {median} but is above 1 in {len(bad)} of {len(checked)} {noun}s checked; "
        "do not read features there."
    )


def state(data: RunData) -> str:
    """Whether the run has ended, and which windows are missing from the account."""
    unbooked = len(data.windows) - len(data.ok)
    note = ""
    if unbooked:
        was = "was" if unbooked == 1 else "were"
        note = f" {count(unbooked, 'window')} could not be measured and {was} not booked; the next good one spans it."
    if data.end is None:
        last = data.windows[-1].step if data.windows else data.steps[0]
        return f"The run has no end record: it is in progress, or was stopped. Read up to step {last}.{note}"
    ended = "finished" if data.end.status == "finished" else "was interrupted"
    return f"The run {ended} at step {data.end.step}.{note}"


def warning(data: RunData) -> str | None:
    """What must be said beside every view of features; None where the SAE follows the change."""
    checked, bad = missed(data)
    if not bad:
        return None
    if len(bad) == len(checked):
        return (
            f"Features must not be read: in every {_noun(data)} checked, delta-FVU at fixed gates is above 1. The SAE "
            "misses more than all of the change."
        )
    sums, ends = ("means over repeats", "They are number") if data.audit else ("sums over the run", "They end at step")
    steps = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    return (
        f"In {len(bad)} of {count(len(checked), _noun(data))} checked, delta-FVU at fixed gates is above 1: the "
        f"features of these {_noun(data)}s must not be read, and {sums} contain them. {ends} {steps}."
    )


def _noun(data: RunData) -> str:
    return "measurement" if data.audit else "window"


def _levels(data: RunData, behaviour: int) -> str:
    parts = [f"{fixed(float(means[-1, behaviour]))} on {probes_to(group)}" for group, means in data.group_means.items()]
    name = data.behaviours[behaviour].capitalize()
    return f"{name} ({data.unit}) at step {data.steps[0]} is {' and '.join(parts)}."


def _moved(start: float, end: float) -> str:
    change = end - start
    if abs(change) < STILL:
        return f"stayed at {fixed(end)} ({signed(change, 3)})"
    return f"{'rose' if change > 0 else 'fell'} from {fixed(start)} to {fixed(end)} ({signed(change)})"
