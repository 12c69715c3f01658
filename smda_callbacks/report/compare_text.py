"""A comparison in a few sentences, made from its numbers."""

from __future__ import annotations

from smda_callbacks.report.compare import Comparison
from smda_callbacks.report.compare_series import Apart, Trajectory
from smda_callbacks.report.data import TIMES
from smda_callbacks.report.markup import count, fixed, number, signed
from smda_callbacks.report.verdict import probes_to


def sentences(found: Comparison) -> list[str]:
    """How the runs are aligned, how the behaviour came out, policy, pairs, and what is missing."""
    said = [found.alignment.text]
    for each in found.trajectories:
        if each.of == "group":
            said += [_group(found, each, run.name) for run in found.others if each.at_end.get(run.name) is not None]
    return [*said, *_policy(found), *_pairs(found), *found.notes]


def _group(found: Comparison, each: Trajectory, run: str) -> str:
    reference = found.reference.name
    courses = []
    for name in (reference, run):
        values = each.values[name]
        courses.append(f"{name} went from {fixed(values[min(values)])} to {fixed(values[max(values)])}")
    end, common = each.at_end[run], each.at_common.get(run)
    assert end is not None
    text = (
        f"{each.behaviour.capitalize()} ({found.reference.target}) on {probes_to(each.name)}: {', '.join(courses)}; "
        f"{run} − {reference} at the end is {signed(end.difference, 3)}{_noise(end)}"
    )
    if common is not None and not found.alignment.same_end:
        text += f", and {signed(common.difference, 3)} at step {found.alignment.common[-1]}, the last common one"
    return f"{text}."


def _noise(found: Apart) -> str:
    if found.above_noise is None or found.floor is None:
        return ", its noise is not known"
    word = "above" if found.above_noise else "not above"
    return f", {word} {TIMES:g} times its noise of {number(found.floor, 2)}"


def _policy(found: Comparison) -> list[str]:
    said = []
    for behaviour in found.behaviours if found.features is not None else ():
        features = [each for each in found.features or () if each.behaviour == behaviour]
        for run in found.others:
            apart = [(each, each.apart[run.name]) for each in features]
            shared = [(each, one) for each, one in apart if one is not None]
            if not shared:
                said.append(f"The policies of {found.reference.name} and {run.name} share no feature.")
                continue
            above = sum(one["total"].above_noise is True for _, one in shared)
            most, one = max(shared, key=lambda pair: abs(pair[1]["total"].difference))
            known = any(one["total"].above_noise is not None for _, one in shared)
            noise = f"{above} of {count(len(shared), 'shared feature')} differ above the noise" if known else (
                f"{count(len(shared), 'shared feature')}, the noise is not known")  # fmt: skip
            said.append(
                f"Policy of {behaviour}, {run.name} − {found.reference.name}: {noise}; most, feature {most.title}: "
                f"{signed(one['total'].difference, 4)}."
            )
    return said


def _pairs(found: Comparison) -> list[str]:
    pairs = found.pairs
    if pairs is None:
        return []
    by = {"id": "their id", "text": "their text", "row": "row number"}[pairs.matched_by]
    only = ", ".join(f"{number} in {name}" for name, number in pairs.only.items())
    absent = {run.name: sum(each.runs[run.name].state == "absent" for each in pairs.differing) for run in found.runs}
    gone = ", ".join(f"{number} were not trained on in {name}" for name, number in absent.items() if number)
    trained = ", ".join(f"{name} {number}" for name, number in pairs.trained.items())
    text = f"Pairs trained on: {trained}, matched by {by}. Acting on {pairs.functional} in one run and not in another: "
    text += f"{only}{f' ({gone})' if gone else ''}."
    agree = [f"{fixed(value)} in {name}" for name, value in pairs.correlation.items() if value is not None]
    if agree:
        text += (
            f" Effects of the {pairs.shared} pairs that all runs attributed correlate with those in "
            f"{found.reference.name} at {', '.join(agree)}."
        )
    lost = sum(pairs.unmatched.values())
    if lost:
        text += f" {lost} of {sum(pairs.trained.values())} could not be matched."
    return [text] if pairs.warning is None else [text, pairs.warning]
