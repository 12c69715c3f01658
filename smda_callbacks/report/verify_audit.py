"""The check that stands for contiguity in an audit: every pair and repeat is there, once and in its place."""

from __future__ import annotations

from smda_callbacks.records import WindowRecord
from smda_callbacks.report.check import Check, counted
from smda_callbacks.sinks.store_reader import RunStore


def check_audited(store: RunStore, records: list[WindowRecord]) -> Check:
    """Whether window ``p · repeats + r + 1`` is that of pair ``p`` and repeat ``r``, and none is missing.

    ``records``: the baseline and all windows. An audit that has not ended may lack its last windows. Raises KeyError
    where the manifest does not say how many pairs and repeats there are.
    """
    audit, end, windows = store.manifest["audit"], store.end, records[1:]
    pairs, repeats = int(audit["pairs"]), int(audit["repeats"])
    places = [window.step - store.baseline.step - 1 for window in windows]
    done = end is not None and end.status == "finished"
    wanted = range(pairs * repeats if done else min(max(places, default=-1) + 1, pairs * repeats))
    faults = [f"pair {each // repeats}, repeat {each % repeats} is missing" for each in sorted({*wanted} - {*places})]
    faults += [f"place {each} is beyond the audit's {pairs} x {repeats}" for each in places if each >= pairs * repeats]
    faults += _book_faults(windows, [place // repeats for place in places])
    failed = [f"{window.step} ({window.status})" for window in windows if window.status != "ok"]
    detail = f"an audit: {len(windows)} of {pairs} pairs x {repeats} repeats, each there once, from the baseline"
    return counted("contiguity", faults, detail + (f"; not booked: {', '.join(failed)}" if failed else ""))


def _book_faults(windows: list[WindowRecord], owners: list[int]) -> list[str]:
    """Windows that are not of one pair alone, or of another pair than the others of their owner."""
    faults: list[str] = []
    pair_of: dict[int, int] = {}
    for window, owner in zip(windows, owners, strict=True):
        if window.first_step != window.step or window.skipped:
            faults.append(f"the window of step {window.step} is of more than one step of the audit, or of none")
        if window.pairs is None:
            continue
        ids = window.pairs.ids.tolist()
        if len(ids) != 1 or len(window.pairs.later_ids):
            faults.append(
                f"the book of step {window.step} is of {len(ids)} pairs and {len(window.pairs.later_ids)} later"
            )
        elif pair_of.setdefault(owner, ids[0]) != ids[0]:
            faults.append(f"step {window.step} is of pair {ids[0]}, the repeat before it of pair {pair_of[owner]}")
    twice = {each for each in pair_of.values() if list(pair_of.values()).count(each) > 1}
    return faults + [f"pair {each} was audited at several places" for each in sorted(twice)]
