"""Recompute a run from its store and say whether the stored numbers hold.

Everything is computed again from the stored snapshots with the functions of :mod:`smda_callbacks.maths`. A record
that was computed from the snapshots beside it differs by rounding alone, which the tolerances leave room for, also on
another machine; a number that was changed afterwards does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from smda_callbacks.maths.account import account, mean_by_group
from smda_callbacks.maths.pathways import State, split_shift
from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.records import FEATURE_ROWS, PATHWAYS, ROWS, Array, Snapshot, WindowRecord, policy_hash, probe_hash
from smda_callbacks.report.check import TOLERANCE, Check, Errors, counted, format_checks
from smda_callbacks.report.logged import logged_faults
from smda_callbacks.report.verify_audit import check_audited
from smda_callbacks.report.verify_ledger import check_ledger
from smda_callbacks.sinks.attribution import chained, is_audit
from smda_callbacks.sinks.store_reader import RunStore

__all__ = ["Check", "format_checks", "verify"]


@dataclass(frozen=True)
class _Step:
    """An ok window, with the record that its shift leads from: the last ok one before it, in an audit the baseline."""

    before: WindowRecord
    window: WindowRecord


def verify(store: RunStore) -> list[Check]:
    """All checks on ``store``, in the order of their names below; a check that cannot be made is not ok.

    * ``shifts``: parts, coefficients and intercept of every window as recomputed; the parts sum to the change of the
      coefficients.
    * ``telescoping``: the sum of all shifts is last coefficients minus first.
    * ``accounts``: rows of every category as recomputed, over features too; they sum to the measured change.
    * ``ledger``: where pairs are attributed, their books; see :mod:`~smda_callbacks.report.verify_ledger`.
    * ``policy``: the coefficients at the start as refitted on the baseline snapshot.
    * ``hashes``: of probes and policy, as in the manifest.
    * ``contiguity``: every optimizer step in one window; skipped ones are named.
    * ``logged``: metrics, tables and summary sent to a tracker, as made again from the windows.

    In an audit every window is a pair's change from the baseline: ``telescoping`` compares each shift with the change
    of the coefficients from there, ``contiguity`` finds every pair and repeat once.

    Raises StoreError where a file of the store is damaged.
    """
    records = [store.baseline, *store.windows()]
    checks: dict[str, Callable[[RunStore, list[WindowRecord]], Check]] = {
        "shifts": _check_shifts,
        "telescoping": _check_telescoping,
        "accounts": _check_accounts,
        "ledger": check_ledger,
        "policy": _check_policy,
        "hashes": _check_hashes,
        "contiguity": _check_contiguity,
        "logged": _check_logged,
    }
    found = []
    for name, check in checks.items():
        try:
            found.append(check(store, records))
        except (ValueError, TypeError, KeyError) as error:
            found.append(Check(name, float("inf"), TOLERANCE, False, f"cannot be checked: {error}"))
    return found


def _check_shifts(store: RunStore, records: list[WindowRecord]) -> Check:
    errors = Errors()
    size = _largest(record.coef for record in records)
    for step in _steps(store, records):
        window, where = step.window, f"step {step.window.step}"
        before, after = _state(step.before.snapshot), _state(window.snapshot)
        split = split_shift(before, after, scale=store.policy.scale, lam=store.policy.lam)
        for part, values in split.as_dict().items():
            errors.note(f"{part}, {where}", window.shift[part], values, size)
        fit = fit_ridge(after.x, after.y, store.policy.lam, scale=store.policy.scale)
        errors.note(f"coef, {where}", window.coef, fit.coef, size)
        errors.note(f"intercept, {where}", window.intercept, fit.intercept, _largest([fit.intercept]))
        errors.note(f"sum of parts, {where}", _total(window), _known(window.coef) - _known(step.before.coef), size)
    return errors.check("shifts", f"{_ok(store, records)} windows recomputed from their snapshots")


def _check_telescoping(store: RunStore, records: list[WindowRecord]) -> Check:
    errors, steps = Errors(), list(_steps(store, records))
    size = _largest(record.coef for record in records)
    if is_audit(store.manifest):
        for step in steps:
            moved = _known(step.window.coef) - _known(store.baseline.coef)
            errors.note(f"sum of parts, step {step.window.step}", _total(step.window), moved, size)
        return errors.check("telescoping", f"an audit: {len(steps)} shifts, each from the baseline to its own end")
    if steps:
        last = steps[-1].window
        total = np.sum([_total(step.window) for step in steps], axis=0)
        moved = _known(last.coef) - _known(store.baseline.coef)
        place = f"sum of shifts, steps {store.baseline.step} to {last.step}"
        errors.note(place, total, moved, size)
    return errors.check("telescoping", f"{len(steps)} shifts sum to last minus first coefficients")


def _check_accounts(store: RunStore, records: list[WindowRecord]) -> Check:
    errors, groups = Errors(), store.groups
    size = _largest(record.snapshot.y for record in records if record.snapshot)
    for step in _steps(store, records):
        window, where = step.window, f"step {step.window.step}"
        before, after = _state(step.before.snapshot), _state(window.snapshot)
        policy = store.policy
        books = account(before, after, scale=policy.scale, lam=policy.lam, groups=groups, origin=policy.origin)
        for row in ROWS:
            errors.note(f"{row}, {where}", window.account[row], books.rows[row], size)
        for row in FEATURE_ROWS:
            errors.note(f"{row} over features, {where}", window.feature_account[row], books.features[row], size)
        measured = mean_by_group(after.y - before.y, groups)
        errors.note(f"sum of rows, {where}", np.sum([window.account[row] for row in ROWS], axis=0), measured, size)
    return errors.check("accounts", f"{_ok(store, records)} windows close on the measured change of every category")


def _check_policy(store: RunStore, records: list[WindowRecord]) -> Check:
    policy, errors = store.policy, Errors()
    state = _state(store.baseline.snapshot)
    fit = fit_ridge(state.x, state.y, policy.lam, scale=policy.scale)
    # A policy that was brought along was fitted elsewhere: only the refit on this run's baseline can be repeated.
    brought = store.manifest.get("policy_from", "distilled") != "distilled"
    holders: dict[str, Any] = (
        {"baseline": store.baseline} if brought else {"policy": policy, "baseline": store.baseline}
    )
    for name, holder in holders.items():
        errors.note(f"coef of the {name}", holder.coef, fit.coef, _largest([fit.coef]))
        errors.note(f"intercept of the {name}", holder.intercept, fit.intercept, _largest([fit.intercept]))
    note = "; the policy itself was brought along" if brought else ""
    return errors.check("policy", f"{fit.d} features refitted on {fit.n} probes{note}")


def _check_hashes(store: RunStore, records: list[WindowRecord]) -> Check:
    found = {"probe_hash": probe_hash(store.probes), "policy_hash": policy_hash(store.policy)}
    faults = [
        f"{name} is {value[:12]} but the manifest says {str(store.manifest.get(name))[:12]}"
        for name, value in found.items()
        if value != store.manifest.get(name)
    ]
    return counted("hashes", faults, "probes and policy are those of the manifest")


def _check_contiguity(store: RunStore, records: list[WindowRecord]) -> Check:
    if is_audit(store.manifest):
        return check_audited(store, records)
    faults: list[str] = []
    skipped: list[int] = []
    for previous, window in pairwise(records):
        begins = {previous.step + 1, _last_ok(records, window.step).step + 1}
        if window.first_step not in begins:
            word = "missing" if window.first_step > previous.step + 1 else "counted twice"
            low, high = sorted((previous.step + 1, window.first_step))
            faults.append(f"steps {low} to {high - 1} are {word}, before the window that ends at {window.step}")
        outside = [step for step in window.skipped if not window.first_step <= step <= window.step]
        if outside or len(set(window.skipped)) < len(window.skipped):
            faults.append(f"the window that ends at {window.step} lists skipped steps {list(window.skipped)}")
        skipped.extend(step for step in window.skipped if step not in skipped)
    faults += _tail_faults(store, records)
    unbooked = [f"{window.step} ({window.status})" for window in records if window.status != "ok"]
    detail = f"steps {records[0].step + 1} to {records[-1].step} covered" if len(records) > 1 else "no window yet"
    detail += f"; skipped by the optimizer: {', '.join(map(str, skipped))}" if skipped else ""
    detail += f"; not booked, spanned by the next: {', '.join(unbooked)}" if unbooked else ""
    return counted("contiguity", faults, detail)


def _tail_faults(store: RunStore, records: list[WindowRecord]) -> list[str]:
    end, last = store.end, records[-1].step
    if end is None or end.status != "finished" or end.step == last:
        return []
    return [f"the run finished at step {end.step} but the last window ends at {last}"]


def _check_logged(store: RunStore, records: list[WindowRecord]) -> Check:
    count, faults = logged_faults(store, records)
    return counted("logged", faults, f"{count} entries made again" if count else "nothing was sent to a tracker")


def _steps(store: RunStore, records: list[WindowRecord]) -> Iterator[_Step]:
    return (_Step(before, window) for before, window in chained(store.start, records[1:]))


def _ok(store: RunStore, records: list[WindowRecord]) -> int:
    """Number of ok windows, the baseline left out."""
    return sum(1 for _ in _steps(store, records))


def _last_ok(records: list[WindowRecord], before: int) -> WindowRecord:
    """The last ok record that ends before step ``before``; the first record counts as ok."""
    return [record for record in records if record.step < before and (record.status == "ok" or record is records[0])][
        -1
    ]


def _state(snapshot: Snapshot | None) -> State:
    if snapshot is None:
        raise ValueError(
            "an ok record has no snapshot; every ok record carries one. The store was not written by this library."
        )
    return State(snapshot.pre, snapshot.gate, snapshot.y)


def _total(window: WindowRecord) -> Array:
    total: Array = np.sum([window.shift[part] for part in PATHWAYS], axis=0)
    return total


def _known(array: Array | None) -> Array:
    if array is None:
        raise ValueError("an ok record has no coefficients; every ok record carries them.")
    return array


def _largest(arrays: Iterable[Array | None]) -> float:
    """Largest absolute value over all arrays; 0 where there is none."""
    return max((float(np.max(np.abs(array), initial=0.0)) for array in arrays if array is not None), default=0.0)
