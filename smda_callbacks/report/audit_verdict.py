"""An audit in a few sentences, and its numbers at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from smda_callbacks.report.data import TIMES, RunData
from smda_callbacks.report.markup import count, fixed, number, percent
from smda_callbacks.report.pair_ranking import plus
from smda_callbacks.report.pairs_data import PairData, above_noise, pair_data, pair_name


def audit_facts(data: RunData) -> Mapping[str, Any]:
    """What the manifest says of the audit."""
    found = data.store.manifest.get("audit")
    return found if isinstance(found, Mapping) else {}


def audit_verdict(data: RunData, behaviour: int) -> list[str]:
    """Sentences on one behaviour of an audit: what it is, the largest effects, noise, spread, interference, state."""
    pairs = pair_data(data)
    if pairs is None:
        return [audit_sentence(data), "Nothing has been booked yet.", audit_state(data)]
    return [
        audit_sentence(data),
        *_effect_sentences(data, pairs, behaviour),
        *_spread_sentence(pairs, behaviour),
        f"{count(int(pairs.table.flagged.sum()), 'pair')} flagged: the largest effect is on a feature that the pair's "
        "own prompt does not call for.",
        audit_state(data),
    ]


def audit_sentence(data: RunData) -> str:
    """What the audit did."""
    found = audit_facts(data)
    repeats, steps = int(found.get("repeats", 1)), int(found.get("steps", 1))
    starts = "" if repeats == 1 else " Every repeat starts from another adapter."
    optimizer = f"{found.get('optimizer', 'optimizer')}, learning rate {number(found.get('learning_rate'), 2)}"
    return (
        f"An audit of {count(int(found.get('pairs', 0)), 'pair')}, {count(repeats, 'repeat')} each, from one fixed "
        f"model: every pair alone makes {count(steps, 'step')} ({optimizer}), and the model is put back.{starts}"
    )


def audit_state(data: RunData) -> str:
    """How far the audit got, and what failed."""
    found = audit_facts(data)
    whole = int(found.get("pairs", 0)) * int(found.get("repeats", 1))
    failed = len(data.windows) - len(data.ok)
    text = f"{len(data.windows):,} of {count(whole, 'measurement')} made, {failed} of which failed."
    if data.end is not None and data.end.status == "finished":
        return f"The audit finished. {text}"
    return f"The audit has not finished: it is in progress, or was stopped. {text}"


def _effect_sentences(data: RunData, pairs: PairData, behaviour: int) -> list[str]:
    """Per group of probes: the pairs that raise and lower the behaviour most, and how many are above noise."""
    above, said = above_noise(pairs.table), []
    for each in (group for group in pairs.groups(behaviour) if not group.is_category):
        place, table = pairs.place(each.name), pairs.table
        effect = np.where(table.known, table.effect[:, place], 0.0)
        ends = [int(np.argmax(effect)), int(np.argmin(effect))]
        named = [
            f"most {'raised' if effect[row] > 0 else 'lowered'} by {pair_name(table.pairs[row])} "
            f"({plus(float(effect[row]))}{_note(above, row, place)})"
            for row in ends
            if effect[row]
        ]
        said.append(f"{each.name} ({data.unit}): {_above(above, table.known, place)}; {', '.join(named)}.")
    return said


def _note(above: Any, row: int, place: int) -> str:
    return "" if above is None or above[row, place] else ", not above noise"


def _above(above: Any, known: Any, place: int) -> str:
    if above is None:
        return "the noise floor was not measured"
    some, whole = int(above[:, place].sum()), int(known.sum())
    return f"{some} of {whole} pairs have an effect above {TIMES:g} times their noise floor"


def _spread_sentence(pairs: PairData, behaviour: int) -> list[str]:
    """How much the repeats of a pair differ, where there are several."""
    table = pairs.table
    if table.spread is None:
        return []
    said = []
    for each in (group for group in pairs.groups(behaviour) if not group.is_category):
        place = pairs.place(each.name)
        spread, effect = table.spread[:, place], np.abs(table.effect[:, place])
        known = np.isfinite(spread) & (effect > 0)
        if known.any():
            said.append(f"{percent(float(np.median(spread[known] / effect[known])))} of the effect on {each.name}")
    return [f"Spread over a pair's repeats (standard deviation), in the median: {', '.join(said)}."] if said else []


def audit_tiles(data: RunData, behaviour: int) -> list[tuple[str, str, str]]:
    """Numbers at a glance, as title, value and note."""
    found, pairs = audit_facts(data), pair_data(data)
    tiles = [
        ("pairs × repeats", f"{found.get('pairs', 0)} × {found.get('repeats', 1)}", f"{len(data.ok)} measured"),
        *(
            (f"probes to {group}", fixed(float(means[0, behaviour])), f"{data.behaviours[behaviour]}, fixed model")
            for group, means in data.group_means.items()
        ),
    ]
    if pairs is not None:
        above = above_noise(pairs.table)
        groups = [each for each in pairs.groups(behaviour) if not each.is_category]
        if above is not None and groups:
            some = int(above[:, pairs.place(groups[0].name)].sum())
            tiles.append(("pairs above noise", f"{some} of {len(above)}", f"on {groups[0].name}"))
        tiles.append(("interference", str(int(pairs.table.flagged.sum())), "pairs flagged"))
    return tiles
