"""Whom an alert on a category is about: the feature that moved it most, and the pairs, over the run so far.

Only what is above its noise floor is named, by the rule of all views: more than twice as large. The floor of what went
through one feature is that of the category's whole change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import Alert, Array, NoiseFloor, Pair, PairBook, PolicyRecord, Probe, WindowRecord
from smda_callbacks.sinks.noise_in_force import MEANS, floors_at, in_force, known
from smda_callbacks.sinks.pair_totals import effect_floors

#: Pairs that an alert names.
MOST = 3


class Causes:
    """Adds up what the windows of a run say of the policy's first behaviour.

    ``functionals``: names on the axis ``functional`` of the books of pairs; none where pairs are not attributed.
    ``noise``: the floor in force, set before a window is added that it holds for; without it whatever moved most is
    named.
    """

    def __init__(self, policy: PolicyRecord, probes: Sequence[Probe], functionals: Sequence[str]) -> None:
        self._features = policy.features
        self._categories = list(dict.fromkeys(probe.category for probe in probes))
        self._moved = np.zeros((len(self._categories), len(policy.features)))
        behaviour, column = policy.behaviours[0], {name: place for place, name in enumerate(functionals)}
        self._columns = {
            number: column[f"{behaviour}:{name}"]
            for number, name in enumerate(self._categories)
            if f"{behaviour}:{name}" in column
        }
        # Pair -> [category with a column], float32: a run may see many pairs. Effects, and their floors as in
        # sinks.pair_totals: of the last window of its own with what momentum made of it, and squares of earlier ones.
        self._effects: dict[int, Array] = {}
        self._floors: dict[int, Array] = {}
        self._closed: dict[int, Array] = {}
        self.noise: NoiseFloor | None = None
        self._squares = np.zeros(len(self._categories))  # of the floor of every category's change so far
        self._rows: dict[int, tuple[int, ...]] = {}

    def add_all(self, windows: Iterable[WindowRecord]) -> None:
        """Add windows of any status, as a store gives them back, with the floors that they bring."""
        for window in windows:
            self.noise = in_force(self.noise, window)
            self.add(window.feature_account, window.pairs, window.pairs_seen, window.update_rms)

    def add(self, account: Mapping[str, Array], book: PairBook | None, seen: Sequence[Pair], size: float) -> None:
        """Add a window: its ``feature_account``, its pairs and those that it saw first, the size of its update."""
        for part in account.values():
            self._moved += part[:, :, 0]
        floors_here = floors_at(self.noise, size)
        if account and floors_here is not None:
            self._squares += np.square(floors_here[MEANS][:, 0])
        self._rows |= {pair.id: pair.rows for pair in seen}
        if book is None or not self._columns:
            return
        for later, ids, effects in ((False, book.ids, book.effect), (True, book.later_ids, book.later_effect)):
            floors = effect_floors(book, self.noise, later=later)
            self._add_effects(ids.tolist(), effects, np.zeros_like(effects) if floors is None else floors, later)

    def _add_effects(self, ids: Sequence[int], effects: Array, floors: Array, later: bool) -> None:
        columns = list(self._columns.values())
        small = (each[:, columns].astype(np.float32) for each in (effects, floors))
        for number, effect, floor in zip(ids, *small, strict=True):
            self._effects[number] = self._effects.get(number, np.float32(0.0)) + effect
            open_floor = self._floors.get(number, np.zeros_like(floor))
            if not later:  # a window of its own closes the last one
                self._closed[number] = self._closed.get(number, np.float32(0.0)) + np.square(open_floor)
            self._floors[number] = floor + open_floor if later else floor

    def named(self, alert: Alert) -> Alert:
        """``alert`` with the feature and the pairs that moved its category most in its direction, where known.

        What is not above noise is not named; and of a change that is not, that is said and nothing named.
        """
        if alert.category not in self._categories or alert.value is None:
            return alert
        category, sign = self._categories.index(alert.category), np.sign(alert.value)
        limit = float(np.sqrt(self._squares[category]))
        if known(self.noise) is not None and not above_floor(alert.value, limit):
            return replace(alert, message=f"{alert.message}; not above noise: a change of this size may be chance")
        moved = sign * self._moved[category]
        largest = float(moved.max(initial=0.0))
        feature = int(self._features[int(moved.argmax())]) if largest > 0 and above_floor(largest, limit) else None
        pairs = self._top_pairs(category, sign)
        through = [] if feature is None else [f"most through feature {feature}"]
        by = [f"most by the effects of {', '.join(self._name(pair) for pair in pairs)}"] if pairs else []
        message = "; ".join([alert.message, *through, *by])
        return replace(alert, message=message, feature=feature, pairs=pairs)

    def _top_pairs(self, category: int, sign: float) -> tuple[int, ...]:
        place = list(self._columns).index(category) if category in self._columns else None
        if place is None or not self._effects:
            return ()
        numbers = np.array(list(self._effects))
        effects = sign * np.array([each[place] for each in self._effects.values()], dtype=np.float64)
        strong = (effects > 0) & above_floor(effects, self._effect_floors(place))
        return tuple(int(numbers[k]) for k in np.argsort(-effects, kind="stable")[:MOST] if strong[k])

    def _effect_floors(self, place: int) -> Array:
        """Noise floor of every pair's effect on a category, ``[pair]``; zeros where the noise is not known.

        Infinite for a pair without a window of its own: nothing says how large the noise of its effect is.
        """
        noise = known(self.noise)
        if noise is None or noise.functional_random is None:
            return np.zeros(len(self._effects))
        return np.array(
            [
                np.sqrt(float(self._closed[pair][place]) + float(self._floors[pair][place]) ** 2)
                if pair in self._closed
                else np.inf
                for pair in self._effects
            ]
        )

    def _name(self, pair: int) -> str:
        rows = self._rows.get(pair, ())
        return f"row {'='.join(map(str, rows))}" if rows else f"pair {pair}"
