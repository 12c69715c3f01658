"""Whom an alert on a category is about: the feature that moved it most, and the pairs, over the run so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from smda_callbacks.records import Alert, Array, Pair, PairBook, PolicyRecord, Probe, WindowRecord

#: Pairs that an alert names.
MOST = 3


class Causes:
    """Adds up what the windows of a run say of the policy's first behaviour.

    ``functionals``: names on the axis ``functional`` of the books of pairs; none where pairs are not attributed.
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
        self._effects: dict[int, Array] = {}  # pair -> [category with a column], float32: a run may see many pairs
        self._rows: dict[int, tuple[int, ...]] = {}

    def add_all(self, windows: Iterable[WindowRecord]) -> None:
        """Add windows of any status, as a store gives them back."""
        for window in windows:
            self.add(window.feature_account, window.pairs, window.pairs_seen)

    def add(self, account: Mapping[str, Array], book: PairBook | None, seen: Sequence[Pair]) -> None:
        """Add a window: its ``feature_account``, its pairs and those that it saw first."""
        for part in account.values():
            self._moved += part[:, :, 0]
        self._rows |= {pair.id: pair.rows for pair in seen}
        if book is None or not self._columns:
            return
        columns = list(self._columns.values())
        for ids, effects in ((book.ids, book.effect), (book.later_ids, book.later_effect)):
            for number, effect in zip(ids.tolist(), effects[:, columns].astype(np.float32), strict=True):
                self._effects[number] = self._effects.get(number, np.float32(0.0)) + effect

    def named(self, alert: Alert) -> Alert:
        """``alert`` with the feature and the pairs that moved its category most in its direction, where known."""
        if alert.category not in self._categories or alert.value is None:
            return alert
        category, sign = self._categories.index(alert.category), np.sign(alert.value)
        moved = sign * self._moved[category]
        feature = int(self._features[int(moved.argmax())]) if moved.max(initial=0.0) > 0 else None
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
        effects = sign * np.array([each[place] for each in self._effects.values()])
        return tuple(int(numbers[k]) for k in np.argsort(-effects, kind="stable")[:MOST] if effects[k] > 0)

    def _name(self, pair: int) -> str:
        rows = self._rows.get(pair, ())
        return f"row {'='.join(map(str, rows))}" if rows else f"pair {pair}"
