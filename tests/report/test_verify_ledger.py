"""Books of pairs that were written hold; changed ones fail where they were changed. Audits are checked as audits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smda_callbacks.records import PATHWAYS, Array, Pair, PairBook, WindowRecord
from smda_callbacks.report.check import Check
from smda_callbacks.report.verify import format_checks, verify
from smda_callbacks.sinks import files
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.pair_runs import make_audit
from tests.helpers.runs import make_run, write_run

NUDGE = 1e-6


def failed(path: Path) -> set[str]:
    return {check.name for check in verify(RunStore.open(path)) if not check.ok}


def of(path: Path, name: str) -> Check:
    return next(check for check in verify(RunStore.open(path)) if check.name == name)


def change(path: Path, step: int, edit: Callable[[WindowRecord], WindowRecord]) -> None:
    files.write_record(files.step_file(path, step), edit(RunStore.open(path).window(step)))


def change_book(path: Path, step: int, edit: Callable[[PairBook], PairBook]) -> None:
    def edited(window: WindowRecord) -> WindowRecord:
        assert window.pairs is not None
        return replace(window, pairs=edit(window.pairs))

    change(path, step, edited)


def nudged(array: Array, place: tuple[int, ...]) -> Array:
    other = array.copy()
    other[place] += NUDGE
    return other


def line_nudged(book: PairBook, *names: str) -> PairBook:
    """The lines changed by the nudge and, in turn, by minus the nudge: two together leave the sum."""
    signs = (1, -1)
    lines = dict(book.lines)
    for name, sign in zip(names, signs, strict=False):
        moved = np.zeros_like(lines[name])
        moved[1] = sign * NUDGE
        lines[name] = lines[name] + moved
    return replace(book, lines=lines)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", make_run(windows=5, pairs=7, unattributed=[1]))


# ----------------------------------------------------------------------------------------------------------- runs


def test_the_detail_says_how_many_windows_and_the_error_of_each_line(path: Path) -> None:
    check = of(path, "ledger")
    assert check.ok
    assert check.tolerance == 1e-9
    assert check.largest_error < 1e-13
    names = len(RunStore.open(path).manifest["attribution"]["functionals"])
    assert check.detail.startswith(
        f"4 of 5 windows attributed (ghost), {names} functionals; the change of the other 1 is"
    )
    for line in ("measured", "unexplained", "balance", "totals"):
        assert f"{line} " in check.detail


def test_a_run_that_attributes_nothing_says_so(tmp_path: Path) -> None:
    assert of(write_run(tmp_path / "run", make_run(windows=2)), "ledger").detail == "pairs are not attributed"
    none = of(write_run(tmp_path / "none", make_run(windows=2, pairs=3, unattributed=[0, 1])), "ledger")
    assert none.ok
    assert none.detail.startswith("0 of 2 windows attributed")


@pytest.mark.parametrize("name", ["measured", "momentum", "decay", "unexplained"])
def test_a_changed_line_is_found(path: Path, name: str) -> None:
    change_book(path, 6, lambda book: line_nudged(book, name))
    assert failed(path) == {"ledger"}
    assert of(path, "ledger").detail.endswith("step 6")


def test_what_is_measured_cannot_be_changed_together_with_a_line(path: Path) -> None:
    def edit(book: PairBook) -> PairBook:
        one = line_nudged(book, "measured")
        return replace(one, lines={**one.lines, "unexplained": line_nudged(book, "unexplained").lines["unexplained"]})

    change_book(path, 6, edit)
    assert failed(path) == {"ledger"}
    name = RunStore.open(path).manifest["attribution"]["functionals"][1]
    assert of(path, "ledger").detail in {
        f"largest error at: {line}, {name}, step 6" for line in ("measured", "unexplained")
    }


@pytest.mark.parametrize("field", ["share", "later_share"])
def test_a_changed_share_is_found(path: Path, field: str) -> None:
    change_book(path, 6, lambda book: replace(book, **{field: nudged(getattr(book, field), (0, 2))}))
    assert failed(path) == {"ledger"}


def test_a_number_that_is_none_is_found(path: Path) -> None:
    change_book(path, 6, lambda book: replace(book, share=book.share * np.nan))
    check = of(path, "ledger")
    assert not check.ok
    assert check.largest_error == float("inf")


def test_errors_are_relative_to_the_terms(path: Path) -> None:
    """A book of terms a million times larger may miss by a million times more."""

    def grown(book: PairBook, miss: float) -> PairBook:
        share = book.share.copy()
        share[0] += 1e6
        share[1] -= 1e6
        share[2] += miss
        return replace(book, share=share)

    change_book(path, 6, lambda book: grown(book, 1e-5))
    assert failed(path) == set()
    change_book(path, 6, lambda book: grown(book, 0.1))
    assert failed(path) == {"ledger"}


def test_a_changed_snapshot_is_found_in_the_ledger_too(path: Path) -> None:
    def edit(window: WindowRecord) -> WindowRecord:
        assert window.snapshot is not None
        return replace(window, snapshot=replace(window.snapshot, y=nudged(window.snapshot.y, (0, 0))))

    change(path, 6, edit)
    assert failed(path) == {"shifts", "accounts", "ledger"}


def test_a_book_of_another_shape_is_found(path: Path) -> None:
    change_book(path, 6, lambda book: replace(book, effect=book.effect[:, 1:]))
    assert failed(path) == {"ledger"}
    assert "the book of step 6 is not on the manifest's" in of(path, "ledger").detail


def test_a_pair_that_is_described_nowhere_is_found(path: Path) -> None:
    change(path, 2, lambda window: replace(window, pairs_seen=window.pairs_seen[1:]))
    assert failed(path) == {"ledger"}
    assert "pair 0 is in a book but described by no window (1 such pairs)" in of(path, "ledger").detail


def test_a_book_of_a_window_that_was_not_booked_is_found(tmp_path: Path) -> None:
    run = make_run(windows=3, pairs=4, failed=[1])
    odd = replace(run.windows[1], pairs=run.windows[0].pairs)
    path = write_run(tmp_path / "run", replace(run, windows=(run.windows[0], odd, run.windows[2])))
    assert failed(path) == {"ledger"}
    assert "step 4 is failed but has a book" in of(path, "ledger").detail


def test_a_book_in_a_run_that_attributes_nothing_is_found(tmp_path: Path) -> None:
    run = make_run(windows=2, pairs=4)
    manifest = {key: value for key, value in run.start.manifest.items() if key != "attribution"}
    path = write_run(tmp_path / "run", replace(run, start=replace(run.start, manifest=manifest)))
    assert failed(path) == {"ledger"}
    assert "attributes nothing, but the window of step 2 has a book" in of(path, "ledger").detail


def test_functionals_of_another_policy_cannot_be_checked(tmp_path: Path) -> None:
    run = make_run(windows=2, pairs=4)
    attribution = {**run.start.manifest["attribution"], "functionals": ["refusal:bogus"]}
    start = replace(run.start, manifest={**run.start.manifest, "attribution": attribution})
    bare = [replace(window, pairs=None, pairs_seen=()) for window in run.windows]
    path = write_run(tmp_path / "run", replace(run, start=start, windows=tuple(bare)), close=False)
    assert failed(path) == {"ledger"}
    assert "cannot be checked: the manifest's functional 'refusal:bogus' does not follow" in of(path, "ledger").detail


# --------------------------------------------------------------------------------------------------------- audits


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    return write_run(tmp_path / "audit", make_audit(pairs=5, repeats=2))


def test_an_audit_holds_and_says_what_was_checked_instead(audit: Path) -> None:
    checks = verify(RunStore.open(audit))
    assert all(check.ok for check in checks), format_checks(checks)
    assert max(check.largest_error for check in checks) < 1e-11
    assert of(audit, "telescoping").detail == "an audit: 10 shifts, each from the baseline to its own end"
    assert of(audit, "contiguity").detail == ("an audit: 10 of 5 pairs x 2 repeats, each there once, from the baseline")
    assert of(audit, "ledger").detail.startswith("10 of 10 windows attributed (exact)")


def test_an_audit_that_is_called_a_run_does_not_hold(tmp_path: Path) -> None:
    audit = make_audit(pairs=5)
    start = replace(audit.start, manifest={**audit.start.manifest, "kind": "run"})
    assert {"shifts", "telescoping", "accounts", "ledger"} <= failed(
        write_run(tmp_path / "run", replace(audit, start=start))
    )


def test_a_killed_audit_holds_as_far_as_it_got(tmp_path: Path) -> None:
    audit = make_audit(pairs=5, repeats=2, failed=[4])
    path = write_run(tmp_path / "audit", replace(audit, windows=audit.windows[:7]), close=False)
    assert failed(path) == set()
    assert of(path, "contiguity").detail == (
        "an audit: 7 of 5 pairs x 2 repeats, each there once, from the baseline; not booked: 4 (failed)"
    )


def test_a_changed_shift_of_an_audit_is_found(audit: Path) -> None:
    part = PATHWAYS[2]
    change(audit, 4, lambda each: replace(each, shift={**each.shift, part: nudged(each.shift[part], (0, 0))}))
    assert failed(audit) == {"shifts", "telescoping"}
    assert of(audit, "telescoping").detail == "largest error at: sum of parts, step 4"


@pytest.mark.parametrize("step", [4, 10])
def test_a_missing_pair_is_found(audit: Path, step: int) -> None:
    files.step_file(audit, step).unlink()
    assert failed(audit) == {"contiguity"}
    assert of(audit, "contiguity").detail == f"pair {(step - 1) // 2}, repeat 1 is missing"


def test_a_pair_at_the_place_of_another_is_found(audit: Path) -> None:
    change_book(audit, 4, lambda book: replace(book, ids=book.ids * 0 + 3))
    assert failed(audit) == {"contiguity"}
    assert of(audit, "contiguity").detail == "step 4 is of pair 3, the repeat before it of pair 1"
    change_book(audit, 3, lambda book: replace(book, ids=book.ids * 0 + 3))
    assert of(audit, "contiguity").detail == "pair 3 was audited at several places"


def test_more_pairs_than_the_audit_has_are_found(tmp_path: Path) -> None:
    audit = make_audit(pairs=4)
    manifest = {**audit.start.manifest, "audit": {**audit.start.manifest["audit"], "pairs": 3}}
    path = write_run(tmp_path / "audit", replace(audit, start=replace(audit.start, manifest=manifest)))
    assert failed(path) == {"contiguity"}
    assert of(path, "contiguity").detail == "place 3 is beyond the audit's 3 x 1"


@pytest.mark.parametrize("field", ["share", "effect"])
def test_a_pair_alone_must_have_all_that_was_measured(audit: Path, field: str) -> None:
    def edit(book: PairBook) -> PairBook:
        values = nudged(getattr(book, field), (0, 1))
        lines = dict(book.lines)
        if field == "share":  # the book still closes
            lines["unexplained"] = lines["unexplained"] - (values - book.share)[0]
        return replace(book, **{field: values}, lines=lines)

    change_book(audit, 3, edit)
    assert failed(audit) == {"ledger"}
    assert of(audit, "ledger").detail.startswith("largest error at:")


def test_a_book_of_several_pairs_is_no_audit(audit: Path) -> None:
    def edit(book: PairBook) -> PairBook:
        half = book.share / 2
        return replace(
            book, ids=np.array([0, 1]), share=np.vstack([half, half]), effect=np.vstack([half, half]),
            size=np.repeat(book.size, 2), intended=np.repeat(book.intended, 2, axis=0),
        )  # fmt: skip

    change_book(audit, 1, edit)
    assert failed(audit) == {"contiguity"}
    assert of(audit, "contiguity").detail == "the book of step 1 is of 2 pairs and 0 later"


def test_the_first_window_of_a_pair_describes_it(audit: Path) -> None:
    seen = [window.pairs_seen for window in RunStore.open(audit).windows()]
    assert [len(each) for each in seen] == 5 * [1, 0]
    assert all(isinstance(pair, Pair) for each in seen for pair in each)
