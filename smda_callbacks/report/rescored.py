"""Influences on the end of a run beside what was booked live."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from smda_callbacks.records import Array
from smda_callbacks.sinks.pair_table import PairTable
from smda_callbacks.sinks.rescored import Rescored, find_rescored


def with_influence(table: PairTable | None, run: Path) -> PairTable | None:
    """The table of a run with what ``smda rescore`` found, if it was asked."""
    record = None if table is None else find_rescored(run)
    if table is None or record is None:
        return table
    influence = np.full(table.effect.shape, np.nan)
    number = {int(pair): row for row, pair in enumerate(record.ids)}
    column = {name: place for place, name in enumerate(record.targets)}
    for row, pair in enumerate(table.pairs):
        for place, name in enumerate(table.functionals):
            if pair.id in number and name in column:
                influence[row, place] = record.influence[number[pair.id], column[name]]
    return replace(table, influence=influence)


def live_effects(record: Rescored, table: PairTable | None, name: str) -> Array | None:
    """What was booked live on a target, ``[pair]`` of ``record``, NaN without an account; None if nothing was."""
    if table is None or name not in table.functionals:
        return None
    place = table.functionals.index(name)
    booked = {pair.id: table.effect[row, place] for row, pair in enumerate(table.pairs) if table.known[row]}
    return np.array([booked.get(int(pair), np.nan) for pair in record.ids], dtype=np.float64)


def agreement(record: Rescored, table: PairTable | None, name: str) -> float | None:
    """Spearman's correlation of live effects and influences over pairs; None where fewer than three have both."""
    live = live_effects(record, table, name)
    if live is None:
        return None
    influence = record.influence[:, record.targets.index(name)]
    both = ~np.isnan(live)
    if both.sum() < 3 or np.ptp(live[both]) == 0 or np.ptp(influence[both]) == 0:
        return None
    return float(spearmanr(live[both], influence[both]).statistic)
