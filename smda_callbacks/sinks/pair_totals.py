"""Running sums of what pairs did, window by window, for whoever cannot keep all windows.

Every step makes new sums and leaves the old ones as they were, so that another thread may go on reading them; what did
not change is shared between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.uncertainty import step_floor
from smda_callbacks.records import LINES, Array, NoiseFloor, Pair, PairBook, RunStart, WindowRecord
from smda_callbacks.sinks.attribution import is_attributed, is_audit
from smda_callbacks.sinks.noise_in_force import in_force, known


@dataclass(frozen=True, eq=False)
class PairTotal:
    """What one pair did so far, ``[functional]``, later parts included.

    ``floor``: noise floor of what it did since its last own window, which is one direction of the weights and adds up
    with what momentum makes of it; ``closed``: squares of the floors of earlier own windows, summed. ``intended``: see
    :class:`~smda_callbacks.records.PairBook`, of the first attributed window. ``repeats``: effects of each window of
    its own, kept in audits only.
    """

    pair: Pair
    share: Array
    effect: Array
    floor: Array
    closed: Array
    windows: int = 0
    intended: NDArray[np.int64] | None = None
    repeats: tuple[Array, ...] = ()

    @property
    def squares(self) -> Array:
        """Square of the noise floor of the effect; zero without a window of its own."""
        total: Array = self.closed + np.square(self.floor)
        return total


@dataclass(frozen=True, eq=False)
class PairTotals:
    """What all pairs did so far. ``lines``: each of LINES, and ``measured`` -> ``[functional]``.

    ``noise``: the floor in force at the last window so far; None where it was not measured.
    """

    start: RunStart
    functionals: tuple[str, ...]
    pairs: Mapping[int, PairTotal]  # by number of the pair, in the order in which they were seen
    lines: Mapping[str, Array]
    attributed: int = 0  # attributed windows
    booked: int = 0  # ok windows, attributed or not
    noise: NoiseFloor | None = None

    @classmethod
    def at(cls, start: RunStart) -> PairTotals | None:
        """Before the first window; None for a run that attributes nothing to pairs."""
        if not is_attributed(start.manifest):
            return None
        names = tuple(start.manifest["attribution"]["functionals"])
        lines = dict.fromkeys((*LINES, "measured"), np.zeros(len(names)))
        return cls(start, names, {}, lines, noise=known(start.noise))

    def after(self, window: WindowRecord) -> PairTotals:
        """After one more window; of one that is not ok only the descriptions of its pairs count."""
        seen = {pair.id: replace(self._of(pair.id), pair=pair) for pair in window.pairs_seen}
        now = replace(self, pairs={**self.pairs, **seen}) if seen else self
        if window.status != "ok":
            return now
        now = replace(now, noise=in_force(self.noise, window))
        if window.pairs is None:
            return replace(now, booked=self.booked + 1)
        return now._with(window.pairs)

    def _with(self, book: PairBook) -> PairTotals:
        return replace(
            self,
            pairs={**self.pairs, **self._changed(book)},
            lines={name: total + book.lines[name] for name, total in self.lines.items()},
            attributed=self.attributed + 1,
            booked=self.booked + 1,
        )

    def _changed(self, book: PairBook) -> dict[int, PairTotal]:
        """The totals that a book changes."""
        found, audit = effect_floors(book, self.noise), is_audit(self.start.manifest)
        floors = np.zeros((len(book.ids), 1)) if found is None else found
        changed = {}
        own = zip(book.ids.tolist(), book.share, book.effect, floors, book.intended, strict=True)
        for each, share, effect, floor, intended in own:
            old = self._of(each)
            changed[each] = PairTotal(
                pair=old.pair,
                share=old.share + share,
                effect=old.effect + effect,
                floor=floor,
                closed=old.squares,
                windows=old.windows + 1,
                intended=intended.copy() if old.intended is None else old.intended,
                repeats=(*old.repeats, effect.copy()) if audit else (),
            )
        found = effect_floors(book, self.noise, later=True)
        floors = np.zeros((len(book.later_ids), 1)) if found is None else found
        later = zip(book.later_ids.tolist(), book.later_share, book.later_effect, floors, strict=True)
        for each, share, effect, floor in later:
            old = changed.get(each) or self._of(each)
            changed[each] = replace(old, share=old.share + share, effect=old.effect + effect, floor=old.floor + floor)
        return changed

    def _of(self, each: int) -> PairTotal:
        """The total of a pair; of one that no window has described, no more than its number is known."""
        if each in self.pairs:
            return self.pairs[each]
        nothing = np.zeros(len(self.functionals))
        return PairTotal(Pair(each, (), "tokens", {}, None, 0), nothing, nothing, nothing, nothing)


def effect_floors(book: PairBook, noise: NoiseFloor | None, *, later: bool = False) -> Array | None:
    """Noise floor of every effect of a window, ``[pair, functional]``, or ``[later, functional]``; None without noise.

    That of random updates of the size of the pair's own, with the rounding of a reading where effects were read.
    """
    noise = known(noise)
    if noise is None or noise.functional_random is None:
        return None
    # A linear effect is not read from the model, so that no rounding of a reading is in it.
    rounding = noise.functional_rounding if book.engine == "exact" else None
    rounding = np.zeros_like(noise.functional_random) if rounding is None else rounding
    sizes = book.later_size if later else book.size
    floors = [step_floor(noise.functional_random, rounding, float(size) / noise.update_rms) for size in sizes]
    return np.array(floors).reshape(len(sizes), len(noise.functional_random))


def totals_of(start: RunStart, windows: Iterable[WindowRecord]) -> PairTotals | None:
    """The sums over ``windows``, in order; None for a run that attributes nothing to pairs."""
    totals = PairTotals.at(start)
    return None if totals is None else reduce(PairTotals.after, windows, totals)
