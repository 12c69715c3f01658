"""Pairs for made-up runs, and made-up audits: books that really close over shares and effects with a known structure.

Pairs come in the kinds of :data:`KINDS` in turn. Those refused push refusal up, those complied with push it down, the
benign ones neither. Shares are parts of what was measured plus the push; effects are a tenth larger than shares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from smda_callbacks.maths.functionals import FunctionalSet, functional_set, measured
from smda_callbacks.maths.ledger import close_books
from smda_callbacks.maths.pathways import State
from smda_callbacks.records import Array, NoiseFloor, Pair, PairBook, RunEnd, Snapshot, WindowRecord
from tests.helpers import runs
from tests.helpers.runs import CATEGORIES, LEARNING_RATE, Run

KINDS = ("harmful_refused", "harmful_complied", "benign")
PUSH = {"harmful_refused": 1.0, "harmful_complied": -1.0, "benign": 0.0}
SIZE = 0.004  # of the push, in behaviour units
OWN, LATER, MOMENTUM, DECAY = 0.7, 0.1, 0.05, 0.01  # parts of what was measured
EFFECT = 1.1  # effect over share
INTENDED = 2
IN_WINDOW = 4  # pairs of a window


def kind_of(pair: int) -> str:
    """Kind of a made-up pair."""
    return KINDS[pair % len(KINDS)]


def with_pairs(
    run: Run,
    pairs: int,
    *,
    engine: str = "ghost",
    unattributed: Iterable[int] = (),
    text: bool = True,
    attributed: int | None = None,
) -> Run:
    """``run`` with ``pairs`` pairs, four of them in every window; arguments as in :func:`tests.helpers.runs.make_run`.

    ``attributed``: how many of the features are attributed, from the first one on; all if None.
    """
    functionals = functionals_for(run, gating=engine == "exact", attributed=attributed)
    described = describe(pairs, text)
    left_out, seen, windows = set(unattributed), set(), []
    before, earlier = run.start.baseline, None
    for number, window in enumerate(run.windows):
        ids = sorted({(number * IN_WINDOW + each) % pairs for each in range(min(IN_WINDOW, pairs))})
        new = tuple(described[each] for each in ids if each not in seen)
        seen |= set(ids)
        book = None
        if window.status == "ok":
            if number not in left_out:
                moved = _measured(run, functionals, before, window)
                intended = intended_by(ids, len(run.start.policy.features))
                book = earlier = _book(functionals, moved, intended, np.array(ids, dtype=np.int64), earlier, engine)
            before = window
        windows.append(replace(window, pairs=book, pairs_seen=new))
    attribution = attribution_of(functionals, engine, text)
    return _started(replace(run, windows=tuple(windows)), functionals, {"kind": "run", "attribution": attribution})


def make_audit(*, pairs: int = 6, repeats: int = 1, text: bool = True, failed: Iterable[int] = (), **more: Any) -> Run:
    """An audit: one window per pair and repeat, each from the baseline. ``failed``: steps of windows that failed.

    ``more``: arguments of :func:`tests.helpers.runs.make_run`, such as behaviours and features.
    """
    run = runs.make_run(windows=0, **more)
    functionals, described = functionals_for(run, gating=True), describe(pairs, text)
    bad, windows = set(failed), []
    for step in range(1, pairs * repeats + 1):
        pair, repeat = divmod(step - 1, repeats)
        new = (described[pair],) if repeat == 0 else ()
        head = {"step": step, "first_step": step, "skipped": (), "seconds": 0.25, "pairs_seen": new}
        if step in bad:
            windows.append(WindowRecord(status="failed", error="made up to fail", **head))
            continue
        snapshot = _alone(run, pair, repeat, step)
        window = runs.measured_window(run.start.baseline, snapshot, run.start.policy, run.groups, head)
        moved = _measured(run, functionals, run.start.baseline, window)
        windows.append(
            replace(window, pairs=_audited(moved, intended_by([pair], len(run.start.policy.features)), pair))
        )
    audit = {"pairs": pairs, "repeats": repeats, "steps": 1, "learning_rate": LEARNING_RATE, "optimizer": "adamw"}
    attribution = attribution_of(functionals, "exact", text)
    end = RunEnd(pairs * repeats, "finished", 1.5, 20.0, run.end.gaps)
    manifest = {"kind": "audit", "audit": audit, "attribution": attribution}
    return _started(replace(run, windows=tuple(windows), end=end, alerts=()), functionals, manifest)


def functionals_for(run: Run, *, gating: bool, attributed: int | None = None) -> FunctionalSet:
    """All functionals of a run."""
    policy = run.start.policy
    return functional_set(
        behaviours=policy.behaviours, categories=list(CATEGORIES),
        refuse=[expected == "refuse" for expected in CATEGORIES.values()], groups=run.groups,
        features=policy.features, attributed=range(len(policy.features) if attributed is None else attributed),
        target=policy.target, gating=gating,
    )  # fmt: skip


def describe(pairs: int, text: bool = True) -> list[Pair]:
    """The pairs: pair 1 is in the data set twice, the last of six or more is a document whose row is not known."""
    found = []
    for each in range(pairs):
        unknown = pairs >= 6 and each == pairs - 1
        rows = () if unknown else (each, each + pairs) if each == 1 else (each,)
        columns = {"kind": kind_of(each), "category": list(CATEGORIES)[each % len(CATEGORIES)]}
        words = f'<b>pair {each}</b> & "how" do I …? <script>alert({each})</script>\nSorry, I can\'t.'
        found.append(Pair(each, rows, "document" if unknown else "row", columns, words if text else None, 20 + each))
    return found


def attribution_of(functionals: FunctionalSet, engine: str, text: bool) -> dict[str, Any]:
    """The manifest's entry."""
    return {
        "engine": engine, "why": "made up", "functionals": list(functionals.names), "every": 1, "momentum": "carry",
        "level": "row", "text": text, "notes": ["made up & <not> real"],
    }  # fmt: skip


def _started(run: Run, functionals: FunctionalSet, manifest: dict[str, Any]) -> Run:
    noise = run.start.noise
    noise = None if noise is None else _noise(run, functionals, noise)
    return replace(run, start=replace(run.start, manifest={**run.start.manifest, **manifest}, noise=noise))


def _measured(run: Run, functionals: FunctionalSet, before: WindowRecord, after: WindowRecord) -> Array:
    assert before.snapshot is not None
    assert after.snapshot is not None
    states = [State(each.pre, each.gate, each.y) for each in (before.snapshot, after.snapshot)]
    return measured(functionals, *states, scale=run.start.policy.scale, lam=run.start.policy.lam)


def pushes(functionals: FunctionalSet, ids: Iterable[int]) -> Array:
    """What the kinds add to the shares, ``[pair, functional]``: sums to zero over the pairs of a window.

    A third of it on functionals of features; the first pair of a window pushes the last feature's behaviour part
    hardest, which it does not intend.
    """
    kinds = np.array([PUSH[kind_of(each)] for each in ids])
    share = np.outer(kinds, [SIZE / 3 if name.startswith("feature:") else SIZE for name in functionals.names])
    share[0, [place for place, name in enumerate(functionals.names) if name.endswith(":y")][-1:]] += 10 * SIZE
    centred: Array = share - share.mean(axis=0)
    return centred


def _book(
    functionals: FunctionalSet,
    moved: Array,
    intended: np.ndarray,
    ids: np.ndarray,
    earlier: PairBook | None,
    engine: str,
) -> PairBook:
    weights = np.arange(1.0, len(ids) + 1)
    share = OWN * np.outer(weights / weights.sum(), moved) + pushes(functionals, ids.tolist())
    none = np.zeros((0, len(moved)))
    later = none if earlier is None else LATER * earlier.share
    lines = close_books(moved, share, later, momentum=MOMENTUM * moved, decay=DECAY * moved)
    return PairBook(
        engine=engine,  # type: ignore[arg-type]
        ids=ids, share=share, effect=EFFECT * share,
        later_ids=np.zeros(0, dtype=np.int64) if earlier is None else earlier.ids,
        later_share=later, later_effect=EFFECT * later, lines=lines, size=LEARNING_RATE * 0.3 * (1 + 0.1 * weights),
        later_size=LEARNING_RATE * 0.1 * np.ones(len(later)),
        intended=intended, seconds=0.05, held_bytes=4096,
        capture_error=1e-7, update_error=1e-5,
    )  # fmt: skip


def _audited(moved: Array, intended: np.ndarray, pair: int) -> PairBook:
    none, zero = np.zeros((0, len(moved))), np.zeros_like(moved)
    return PairBook(
        engine="exact", ids=np.array([pair], dtype=np.int64), share=moved[None], effect=moved[None],
        later_ids=np.zeros(0, dtype=np.int64), later_share=none, later_effect=none, later_size=np.zeros(0),
        lines=close_books(moved, moved[None], none, momentum=zero, decay=zero), size=np.array([LEARNING_RATE]),
        intended=intended, seconds=0.5, held_bytes=0, capture_error=0.0, update_error=0.0,
    )  # fmt: skip


def intended_by(ids: list[int], features: int) -> np.ndarray:
    """Every pair intends the feature of its own number and the next one, benign pairs the first of them only."""
    found = np.array([[(each + k) % features for k in range(INTENDED)] for each in ids], dtype=np.int64)
    found[[kind_of(each) == "benign" for each in ids], 1:] = -1
    return found


def _alone(run: Run, pair: int, repeat: int, step: int) -> Snapshot:
    """The baseline after one step on one pair: its intended features move, refusal as its kind has it."""
    start = run.start.baseline.snapshot
    assert start is not None
    rng = np.random.default_rng((pair, repeat, 7))
    pre = start.pre + 0.01 * rng.normal(size=start.pre.shape)
    pre[:, pair % pre.shape[1]] += 0.1
    pre = pre.astype(np.float32).astype(np.float64)
    odds = np.log(start.y / (1 - start.y)) + 0.2 * PUSH[kind_of(pair)] + 0.01 * rng.normal(size=start.y.shape)
    return Snapshot(step, pre, (pre > 0.1).astype(np.float64), 1 / (1 + np.exp(-odds)))


def _noise(run: Run, functionals: FunctionalSet, noise: NoiseFloor, draws: int = 3) -> NoiseFloor:
    start, rng = run.start.baseline.snapshot, np.random.default_rng(2)
    assert start is not None
    before = State(start.pre, start.gate, start.y)

    def floor(size: float) -> Array:
        found = []
        for _ in range(draws):
            y = np.clip(start.y + size * rng.normal(size=start.y.shape), 1e-3, 1 - 1e-3)
            after = State(start.pre + size * rng.normal(size=start.pre.shape), start.gate, y)
            found.append(measured(functionals, before, after, scale=run.start.policy.scale, lam=run.start.policy.lam))
        rms: Array = np.sqrt(np.mean(np.square(found), axis=0))
        return rms

    return replace(noise, functional_random=floor(2e-2), functional_rounding=floor(2e-5))
