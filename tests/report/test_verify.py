"""A store that was written holds; one that was changed fails the check that looks there, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smda_callbacks.records import FEATURE_ROWS, PATHWAYS, PolicyRecord, RunEnd, WindowRecord
from smda_callbacks.report.verify import Check, format_checks, verify
from smda_callbacks.sinks import files
from smda_callbacks.sinks.codec import encode
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.runs import Run, make_run, write_run

NAMES = ["shifts", "telescoping", "accounts", "ledger", "policy", "hashes", "contiguity", "logged"]
NUDGE = 1e-5


def failed(path: Path) -> set[str]:
    return {check.name for check in verify(RunStore.open(path)) if not check.ok}


def of(path: Path, name: str) -> Check:
    return next(check for check in verify(RunStore.open(path)) if check.name == name)


@pytest.fixture
def run() -> Run:
    return make_run(windows=4, behaviours=("refusal", "hedging"))


@pytest.fixture
def path(run: Run, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", run)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"windows": 0},
        {"windows": 6, "not_finite": [0, 3], "failed": [2, 5], "skipped": [3, 11]},
        {"start_step": 40, "steps_per_window": 5, "behaviours": ("refusal", "hedging")},
        {"features": 60, "lam": 0.5},  # more features than probes
        {"mean_readout": True, "noise": False},
        {"pairs": 7, "windows": 6, "not_finite": [1], "unattributed": [0, 4], "behaviours": ("refusal", "hedging")},
        {"pairs": 3, "engine": "exact", "attributed": 2, "start_step": 10},
        {"pairs": 3, "windows": 0},
    ],
)
def test_a_written_run_holds(tmp_path: Path, arguments: dict[str, Any]) -> None:
    checks = verify(RunStore.open(write_run(tmp_path / "run", make_run(**arguments))))
    assert [check.name for check in checks] == NAMES
    assert all(check.ok for check in checks), format_checks(checks)
    assert max(check.largest_error for check in checks) < 1e-11


def test_a_run_that_was_killed_holds(run: Run, tmp_path: Path) -> None:
    assert failed(write_run(tmp_path / "killed", replace(run, windows=run.windows[:2]), close=False)) == set()


# ------------------------------------------------------------------------------------------------------ tampering


def change(path: Path, step: int, edit: Callable[[WindowRecord], WindowRecord]) -> None:
    """Replace the record of ``step`` by an edited one."""
    files.write_record(files.step_file(path, step), edit(RunStore.open(path).window(step)))


def change_policy(path: Path, **fields: Any) -> None:
    from safetensors.numpy import save

    value, arrays = encode(replace(RunStore.open(path).policy, **fields))
    files.write_json(path / "policy.json", value)
    files.write_atomic(path / "policy.safetensors", save(arrays))


def nudged(array: np.ndarray | None) -> np.ndarray:
    assert array is not None
    other = array.copy()
    other.flat[other.size // 2] += NUDGE
    return other


def moved_between_parts(window: WindowRecord) -> WindowRecord:
    one, other = PATHWAYS[0], PATHWAYS[2]
    extra = NUDGE * np.ones_like(window.shift[one])
    return replace(window, shift={**window.shift, one: window.shift[one] + extra, other: window.shift[other] - extra})


@pytest.mark.parametrize("part", PATHWAYS)
def test_a_changed_shift_is_found(path: Path, part: str) -> None:
    change(path, 4, lambda window: replace(window, shift={**window.shift, part: nudged(window.shift[part])}))
    assert failed(path) == {"shifts", "telescoping"}
    assert of(path, "shifts").detail in {f"largest error at: {name}, step 4" for name in (part, "sum of parts")}
    assert 1e-6 < of(path, "shifts").largest_error < 1e-2


def test_shifts_that_are_moved_between_parts_are_found(path: Path) -> None:
    change(path, 4, moved_between_parts)
    assert failed(path) == {"shifts"}


def test_changed_coefficients_are_found(path: Path) -> None:
    change(path, 4, lambda window: replace(window, coef=nudged(window.coef)))
    assert failed(path) == {"shifts"}
    change(path, 8, lambda window: replace(window, coef=nudged(window.coef)))
    assert failed(path) == {"shifts", "telescoping"}


def test_a_changed_intercept_is_found(path: Path) -> None:
    change(path, 4, lambda window: replace(window, intercept=nudged(window.intercept)))
    assert failed(path) == {"shifts"}


def test_a_changed_behaviour_is_found(path: Path) -> None:
    def edit(window: WindowRecord) -> WindowRecord:
        assert window.snapshot is not None
        return replace(window, snapshot=replace(window.snapshot, y=nudged(window.snapshot.y)))

    change(path, 4, edit)
    assert failed(path) == {"shifts", "accounts"}


def test_a_changed_gate_is_found(path: Path) -> None:
    def edit(window: WindowRecord) -> WindowRecord:
        assert window.snapshot is not None
        gate = window.snapshot.gate.copy()
        gate[0] = 1 - gate[0]
        return replace(window, snapshot=replace(window.snapshot, gate=gate))

    change(path, 8, edit)
    assert failed(path) == {"shifts", "accounts"}


def test_a_changed_account_is_found(path: Path) -> None:
    change(path, 6, lambda each: replace(each, account={**each.account, "residual": nudged(each.account["residual"])}))
    assert failed(path) == {"accounts"}
    assert of(path, "accounts").detail.endswith("step 6")


@pytest.mark.parametrize("row", FEATURE_ROWS)
def test_a_changed_account_over_features_is_found(path: Path, row: str) -> None:
    def edit(window: WindowRecord) -> WindowRecord:
        return replace(window, feature_account={**window.feature_account, row: nudged(window.feature_account[row])})

    change(path, 6, edit)
    assert failed(path) == {"accounts"}
    assert of(path, "accounts").detail == f"largest error at: {row} over features, step 6"


def test_a_changed_policy_is_found(path: Path) -> None:
    policy: PolicyRecord = RunStore.open(path).policy
    change_policy(path, coef=nudged(policy.coef))
    assert failed(path) == {"policy", "hashes"}
    assert of(path, "policy").detail == "largest error at: coef of the policy"
    assert "policy_hash" in of(path, "hashes").detail


def test_a_changed_penalty_is_found_everywhere(path: Path) -> None:
    change_policy(path, lam=3.01)
    assert failed(path) == {"policy", "hashes", "shifts", "accounts"}


def test_a_changed_baseline_is_found(path: Path) -> None:
    change(path, 0, lambda window: replace(window, coef=nudged(window.coef)))
    assert failed(path) == {"policy", "shifts", "telescoping"}


def test_a_policy_that_was_brought_along_need_not_be_the_refit(run: Run, tmp_path: Path) -> None:
    policy = replace(run.start.policy, coef=run.start.policy.coef + 0.1)
    manifest = {key: value for key, value in run.start.manifest.items() if key != "policy_hash"}
    for source, expected in (("distilled", {"policy"}), ("saved", set())):
        start = replace(run.start, policy=policy, manifest={**manifest, "policy_from": source})
        assert failed(write_run(tmp_path / source, replace(run, start=start))) == expected
    change(tmp_path / "saved", 0, lambda window: replace(window, intercept=nudged(window.intercept)))
    assert failed(tmp_path / "saved") == {"policy"}


@pytest.mark.parametrize(("old", "new"), [("how?", "why?"), ('"refuse"', '"comply"'), ("fraud-0", "fraud-00")])
def test_a_changed_probe_is_found(path: Path, old: str, new: str) -> None:
    text = (path / "probes.jsonl").read_text()
    (path / "probes.jsonl").write_text(text.replace(old, new, 1))
    assert failed(path) == {"hashes"}
    assert "probe_hash" in of(path, "hashes").detail


@pytest.mark.parametrize("name", ["probe_hash", "policy_hash"])
def test_a_changed_hash_is_found(path: Path, name: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {name: "0" * 64}))
    assert failed(path) == {"hashes"}
    assert of(path, "hashes").largest_error == 1


def test_a_missing_window_is_found(path: Path) -> None:
    files.step_file(path, 4).unlink()
    assert failed(path) == {"shifts", "telescoping", "accounts", "contiguity"}
    assert of(path, "contiguity").detail == "steps 3 to 4 are missing, before the window that ends at 6"


def test_a_missing_end_is_found(path: Path, run: Run, tmp_path: Path) -> None:
    files.step_file(path, 8).unlink()
    assert failed(path) == {"contiguity"}
    assert of(path, "contiguity").detail == "the run finished at step 8 but the last window ends at 6"
    stopped = replace(run, windows=run.windows[:3], end=RunEnd(8, "interrupted", 1.0, 2.0, ()))
    assert failed(write_run(tmp_path / "stopped", stopped)) == set()


def test_a_step_counted_twice_is_found(path: Path) -> None:
    change(path, 6, lambda window: replace(window, first_step=4))
    assert failed(path) == {"contiguity"}
    assert of(path, "contiguity").detail == "steps 4 to 4 are counted twice, before the window that ends at 6"


@pytest.mark.parametrize("skipped", [(4,), (5, 5), (7,)])
def test_a_skipped_step_outside_its_window_is_found(path: Path, skipped: tuple[int, ...]) -> None:
    change(path, 6, lambda window: replace(window, skipped=skipped))
    assert failed(path) == {"contiguity"}


def test_windows_that_were_not_booked_are_spanned_by_the_next(tmp_path: Path) -> None:
    run = make_run(windows=4, not_finite=[1], failed=[2], skipped=[3, 8])
    path = write_run(tmp_path / "run", run)
    assert of(path, "contiguity").detail == (
        "steps 1 to 8 covered; skipped by the optimizer: 3, 8; "
        "not booked, spanned by the next: 4 (not_finite), 6 (failed)"
    )
    change(path, 8, lambda window: replace(window, first_step=3))  # counted from the last good record: also right
    assert failed(path) == set()
    change(path, 8, lambda window: replace(window, first_step=5))
    assert failed(path) == {"contiguity"}


def test_an_ok_window_without_arrays_is_found(path: Path) -> None:
    change(path, 6, lambda window: replace(window, snapshot=None))
    assert {"shifts", "accounts"} <= failed(path)
    assert "cannot be checked" in of(path, "shifts").detail
    change(path, 6, lambda window: replace(window, coef=None))
    assert "telescoping" not in failed(path)


# ----------------------------------------------------------------------------------------------------------- text


def test_checks_as_text() -> None:
    checks = [Check("shifts", 4.4e-16, 1e-8, True, "3 windows"), Check("contiguity", 2, 0, False, "step 4 is missing")]
    assert format_checks(checks).splitlines() == [
        "ok    shifts      error  4.4e-16  allowed  1e-08  3 windows",
        "FAIL  contiguity  error        2  allowed      0  step 4 is missing",
        "1 of 2 checks failed: contiguity",
    ]
    assert format_checks(checks[:1]).endswith("\nall checks passed")
