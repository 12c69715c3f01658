"""Frozen records that travel between the floors of the library, and the glossary of axes.

Every array is CPU numpy. Axes, spelt the same everywhere (docstrings write ``[probe, feature]``):

==============  =======  =========================================================================
axis            symbol   meaning
==============  =======  =========================================================================
``probe``      i        a fixed prompt whose behaviour is watched
``feature``    j        an SAE feature in the policy's support, named by its index in the SAE
``behaviour``  m        a scored behaviour; refusal is the first
``category``   C        a group of probes with one label, in the order of first appearance
``step``       t        an optimizer step (not a micro-batch)
``pair``       p        a training example, named by its row in the user's data set
``functional`` k        a number that is attributed to pairs: see maths.functionals
``part``                where a shift comes from: see :data:`PATHWAYS` and :data:`ROWS`
==============  =======  =========================================================================

Units: behaviours are probabilities in [0, 1] (or their logit, when the policy's target says so);
coefficients are behaviour units per standard deviation of the feature at distillation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1

Array = NDArray[np.float64]
Expected = Literal["refuse", "comply"]
Level = Literal["row", "document", "block", "id", "tokens"]

#: The parts of a policy shift; they sum to the change of the coefficients.
PATHWAYS = ("shift_x_magnitude", "shift_x_gating", "shift_y")

#: The rows of a category's account in behaviour units; they sum to its measured change (see maths.account).
ROWS = ("magnitude", "gating", "shift_x_magnitude", "shift_x_gating", "shift_y", "intercept", "residual")

#: The rows that are further split over features (all but ``intercept`` and ``residual``).
FEATURE_ROWS = ROWS[:5]


@dataclass(frozen=True)
class Probe:
    """One prompt whose behaviour is watched."""

    id: str
    text: str
    category: str
    expected: Expected


def probe_hash(probes: Iterable[Probe]) -> str:
    """SHA-256 over the probes as JSON lines with sorted keys, in order."""
    lines = (json.dumps(vars(probe), sort_keys=True, ensure_ascii=True) for probe in probes)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """X and Y of the probe set at one model state.

    ``x = gate * pre``: ``gate`` is 0/1 (with mean read-out: the share of prompt tokens on which the
    feature is active) and ``pre`` the continuous pre-activation behind it.
    """

    step: int
    pre: Array  # [probe, feature]
    gate: Array  # [probe, feature]
    y: Array  # [probe, behaviour]

    @property
    def x(self) -> Array:
        """Feature activations, ``[probe, feature]``."""
        return self.gate * self.pre


@dataclass(frozen=True)
class SAEHealth:
    """How well the SAE still describes the residual stream at the read-out position.

    ``fvu``: share of the variance over probes that the reconstruction misses. ``delta_fvu``: share of the
    *change* since the last snapshot that it misses, plainly and at fixed gates; None where nothing moved.
    ``jaccard``: mean overlap of the active sets with those at the start. ``l0``: mean active features.
    """

    fvu: float
    l0: float
    jaccard: float
    delta_fvu: float | None = None
    delta_fvu_magnitude: float | None = None


@dataclass(frozen=True)
class FeatureLabel:
    """What is known of a feature: the probes that activate it most and the tokens that it promotes."""

    feature: int
    top_probes: tuple[tuple[str, float], ...]  # (probe id, activation), strongest first
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    url: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class PolicyQuality:
    """How far a policy may be believed, for one behaviour.

    ``r2`` is in sample, ``r2_loo`` leave-one-out with the support and λ held fixed, ``r2_cv`` ten-fold with the
    support and λ chosen again in every fold. ``by_category`` maps a category to its own error figures:
    ``mean``, ``predicted``, ``rmse``, ``rmse_loo``, ``r2``, ``r2_loo`` (None where the category does not vary).
    """

    r2: float
    r2_loo: float
    r2_cv: float | None
    by_category: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class PolicyRecord:
    """A distilled policy: behaviour = intercept + (x / scale) @ coef."""

    features: NDArray[np.int64]  # [feature], SAE indices
    scale: Array  # [feature], standard deviation at distillation, never re-estimated
    lam: float  # ridge penalty on a sum of squares
    coef: Array  # [feature, behaviour]
    intercept: Array  # [behaviour]
    behaviours: tuple[str, ...]
    target: Literal["probability", "logit"]
    quality: tuple[PolicyQuality, ...]  # one per behaviour
    edf: float  # effective degrees of freedom, intercept included
    condition: float  # condition number of ZᵀHZ + λI
    route: Literal["primal", "dual"]
    origin: Array  # [feature], mean z over the probes to comply with: accounts count coefficient changes from here
    lam_grid: tuple[tuple[float, float], ...] = ()  # (λ, leave-one-out mean squared error)
    labels: tuple[FeatureLabel, ...] = ()
    sae_id: str = ""
    probe_hash: str = ""
    model_id: str = ""


def policy_hash(policy: PolicyRecord) -> str:
    """SHA-256 over a policy: features, scale, λ, coefficients, intercept, origin, behaviours, target."""
    digest = hashlib.sha256(json.dumps([policy.lam, policy.behaviours, policy.target]).encode())
    for array in (policy.features, policy.scale, policy.coef, policy.intercept, policy.origin):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class NoiseFloor:
    """Root mean square shift under random LoRA updates of the size of one optimizer step at peak learning rate.

    Around the model at which it was measured: that of the start (RunStart), and those that windows bring, each of which
    holds for its own window and for the later ones until the next.

    ``rounding`` is the same for updates a thousand times smaller: what rounding alone does. A step of relative size s
    has the floor sqrt(rounding² + (s·random)²).
    """

    draws: int
    update_rms: float  # root mean square change per trained weight that the draws used
    random: Mapping[str, Array]  # part of PATHWAYS -> [feature, behaviour]
    rounding: Mapping[str, Array]
    behaviour_random: Array  # [category, behaviour], floor of a category's mean behaviour change
    behaviour_rounding: Array
    functional_random: Array | None = None  # [functional], where pairs are attributed
    functional_rounding: Array | None = None


@dataclass(frozen=True)
class Pair:
    """A training example, described once, when it is first seen. Examples of equal tokens are one pair.

    ``level`` says what is known: a ``row`` of the data set; a ``document`` inside a packed row whose own row is not
    known; a ``block`` of wrapped packing; an ``id`` of a column that the user named; or only the ``tokens``.
    """

    id: int  # number of the pair in this run
    rows: tuple[int, ...]  # row numbers in the user's data set; more than one for duplicates, none where unknown
    level: Level
    columns: Mapping[str, str]  # short text columns of the data set, such as kind and category
    text: str | None  # None where the configuration keeps text out
    tokens: int  # length in tokens


#: Lines of a ledger beside the pairs; with the pairs' shares they sum to ``measured``.
LINES = ("momentum", "decay", "unexplained")


@dataclass(frozen=True)
class PairBook:
    """What the pairs of a window did, on the axis ``functional`` of the manifest's ``attribution.functionals``.

    Two quantities that are never mixed. A *share* is linear in the pair's own part of the weight update; shares and
    the lines sum to what was measured. An *effect* is what would be missing had the pair been left out of its steps
    (with minus without), its part in AdamW's second moment and in clipping included. Both in the functional's units.

    ``later_*``: what gradients of earlier windows went on doing through the optimizer's momentum, booked to the pairs
    that caused it; effects there take the gradients since then as they were.
    """

    engine: Literal["ghost", "exact"]
    ids: NDArray[np.int64]  # [pair] numbers of records.Pair, each once, ascending
    share: Array  # [pair, functional]
    effect: Array  # [pair, functional]
    later_ids: NDArray[np.int64]  # [later]
    later_share: Array  # [later, functional]
    later_effect: Array  # [later, functional]
    later_size: Array  # [later] as size
    lines: Mapping[str, Array]  # each of LINES, and measured -> [functional]
    size: Array  # [pair] root mean square of the pair's leave-one-out update per trained weight
    intended: NDArray[np.int64]  # [pair, k] positions in the policy's features, strongest first; -1 where fewer
    seconds: float  # wall time of the attribution, beside the measurement's
    held_bytes: int  # largest size of the captured gradients
    capture_error: float  # relative difference between the captured gradients' sum and the optimizer's gradient
    update_error: float  # share of the real weight update that its parts miss: large on ill-conditioned bf16 steps


@dataclass(frozen=True)
class Alert:
    """Something the user should look at, said once per cause."""

    step: int
    kind: str
    message: str
    category: str | None = None
    value: float | None = None
    threshold: float | None = None
    feature: int | None = None  # SAE index of the feature that moved the category most so far
    pairs: tuple[int, ...] = ()  # numbers of the pairs with the largest effect on the category so far


@dataclass(frozen=True)
class WindowRecord:
    """Everything measured over one window of optimizer steps, ``first_step`` to ``step`` inclusive.

    ``status`` is ``ok``, ``not_finite`` (NaN or inf in the reading: recorded, booked nowhere; the next window spans it)
    or ``failed`` (the measurement raised; ``error`` says why). Only ``ok`` windows carry arrays.
    """

    step: int
    first_step: int
    skipped: tuple[int, ...]  # optimizer steps of the window that the optimizer skipped
    status: Literal["ok", "not_finite", "failed"]
    seconds: float  # wall time of the measurement
    update_rms: float = 0.0  # root mean square change per trained weight over the window
    snapshot: Snapshot | None = None
    coef: Array | None = None  # [feature, behaviour] after the window
    intercept: Array | None = None  # [behaviour]
    shift: Mapping[str, Array] = field(default_factory=dict)  # part of PATHWAYS -> [feature, behaviour]
    account: Mapping[str, Array] = field(default_factory=dict)  # row of ROWS -> [category, behaviour]
    feature_account: Mapping[str, Array] = field(default_factory=dict)  # FEATURE_ROWS -> [category, feature, behaviour]
    first_order_error: float | None = None  # relative to the exact shift's norm
    reliability: Mapping[str, float | None] = field(default_factory=dict)  # part -> split-half correlation
    r2: tuple[float, ...] = ()  # per behaviour, in sample, of this window's refit
    r2_loo: tuple[float, ...] = ()
    health: SAEHealth | None = None
    trainer: Mapping[str, float] = field(default_factory=dict)  # loss, learning_rate, epoch as known
    alerts: tuple[Alert, ...] = ()
    error: str | None = None
    pairs: PairBook | None = None  # None where the window was not attributed
    pairs_seen: tuple[Pair, ...] = ()  # pairs that this window saw first
    unattributed: str | None = None  # why it has no pairs; None too where attribution.every leaves it out
    noise: NoiseFloor | None = None  # the floor where it was measured again, at the window's end; holds from here on


@dataclass(frozen=True)
class RunStart:
    """What is known before the first optimizer step."""

    manifest: Mapping[str, Any]  # resolved config, versions, seeds, hashes; JSON-serialisable
    probes: tuple[Probe, ...]
    policy: PolicyRecord
    baseline: WindowRecord  # status ok, no shift; step is the step training starts from
    gaps: tuple[Mapping[str, Any], ...]  # rows of the gap table, see maths.gaps.Gap for the keys
    noise: NoiseFloor | None  # around the baseline; see WindowRecord.noise


@dataclass(frozen=True)
class RunEnd:
    """How the run ended."""

    step: int
    status: Literal["finished", "interrupted"]
    seconds: float  # wall time of all measurements
    train_seconds: float
    gaps: tuple[Mapping[str, Any], ...]
