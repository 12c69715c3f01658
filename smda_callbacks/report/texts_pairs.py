"""What the report says about how to read its views of training pairs."""

from __future__ import annotations

from smda_callbacks.report.data import TIMES

EFFECT = (
    "A pair's effect is what would be missing had it been left out of its steps; + raises the number, − lowers it. "
    "Click a heading to sort. {noise}"
)
EFFECT_AUDIT = (
    "A pair's effect is what its own update, alone and from the fixed model, did to the number{repeats}; + raises it, "
    "− lowers it. Click a heading to sort. {noise}"
)
REPEATS = ", the mean over {repeats} repeats (± repeats: their standard deviation)"
FLOORED = (
    f"× floor: size of the effect over its noise floor, that of random updates of the pair's size. Greyed: not more "
    f"than {TIMES:g} times the floor, or not known."
)
UNFLOORED = "The noise floor of effects was not measured: which of them are chance is not known."
FLAGS = (
    "Interference: share of a pair's effect on coefficients that is not on the features its own prompt calls for. "
    "⚑: its largest effect is on another feature{limit}."
)
TEXT_KEPT_OUT = "The configuration keeps texts out of the store."

MAP = (
    "Effects of the {pairs} pairs with the largest effects on coefficients. Blue raises a coefficient, orange lowers "
    "it; the deeper, the more, on one scale for all parts, which ends at {limit}: larger ones look the same. {blank}"
)
MAP_BLANK = f"Blank: not above {TIMES:g} times the noise floor."
MAP_NONE = f"No effect of a pair on a coefficient is above {TIMES:g} times its noise floor: there is nothing to show."
MAP_CAPTION = "A row per pair, largest on top; a column per feature, by its number in the SAE. Hover for names."

CURVES = (
    "Shares of the {pairs} pairs with the largest shares, summed over the steps: a pair moves when it is "
    "trained on, and goes on through momentum for a while. Shares and the other "
    "lines of the ledger add up to the run's change; effects do not."
)
CURVES_CAPTION = "Summed share, own and later, per pair. Windows that were not attributed add nothing."

LEDGER = (
    "The books of every attributed window: what the window's own pairs did (pairs), what gradients of earlier windows "
    "went on doing through momentum, booked to their pairs (later) or to none (momentum), weight decay, and what none "
    "of these explains: curvature, gates that flipped, rounding. Their sum is what was measured."
)
LEDGER_CAPTION = "Terms stacked; diamond: measured. Below: unexplained alone. {bars}"
TOTALS = "Run totals; the five terms sum to measured. Not attributed: measured in windows that have no books."
SHARES = (
    "A pair's share is its linear part in the change that was measured. Shares sum; they are no ranking of what "
    "would change without a pair, which is its effect, in the section Pairs. No noise floor is known for shares."
)

INFLUENCE = (
    "A pair's influence on the end of the run counts what it changed in all later steps, which its live effect cannot "
    "know: smda rescore has gone through the run backwards from step {last}{left}, {steps}, {how}. + raised the "
    "number, − lowered it, to first order in leaving the pair out. Influences do not add up. No noise floor is known "
    "for them."
)
INFLUENCE_CAPTION = (
    "A point per pair: its effect as booked live (across) and its influence on the end of the run (up); dashed: equal."
)

INTERFERENCE = (
    "A pair intends the features that are strongest on its own prompt. Its interference is the share of its absolute "
    "effect on coefficients, gates that switch left out, that falls on others. The flag ⚑ is set where its largest "
    "effect is unintended and {limit}."
)
INTERFERENCE_LIMIT = (
    f"above noise: more than {TIMES:g} times its noise floor for one feature, and more for several, since the largest "
    "was picked; greyed: that largest effect is not above noise"
)
INTERFERENCE_UNKNOWN = "not zero: without a noise floor it may be chance"
MATRIX = (
    "Where the effect of pairs goes: per feature that pairs intend (row), the mean share of their effect on each "
    "feature (column). Rows sum to 100 % over all attributed features. Outlined: the intended feature itself. Made of "
    "the {pairs} with some effect above noise and known intention."
)
MATRIX_UNFLOORED = (
    "Where the effect of pairs goes: per feature that pairs intend (row), the mean share of their effect on each "
    "feature (column). Rows sum to 100 % over all attributed features. Outlined: the intended feature itself. Made of "
    "the {pairs} with known intention; the noise floor was not measured, and noise spreads a row over all columns."
)
MATRIX_CAPTION = "Mean share of the absolute effect. Rows: features that pairs intend. Columns: features moved."

GROUPS = (
    "Pairs by the column {column} of the data set, and what each group did on average to every coefficient, by "
    "pathway. {left} {noise}"
)
GROUPS_CAPTION = "Mean effect per pair, {unit}; strokes: ± one standard error."
GROUPS_PALE = f"Pale: not above {TIMES:g} times the noise floor of the mean."
GROUPS_TEST = (
    "Whether groups differ: permutation test of the spread between their means, {resamples:,} relabellings of "
    "{pairs:,} pairs, one test per feature and pathway. Number of tests: {tests}. p is corrected for it (Holm); below "
    "{level:g} groups differ in more than chance gives among so many tests: {different} of {tests}. The test takes "
    "pairs as exchangeable{caveat}."
)
GROUPS_CAVEAT = "; that those of a run were trained on at different steps it does not know"
NO_GROUPS = (
    "No groups to compare: no column of the pairs has 2 to 6 values, two of which at least two pairs have. Add a "
    "column such as kind to the data set."
)
NO_FEATURES = "No feature is attributed to pairs; the configuration's attribution.features says how many are."

GAP_PAIRS = (
    "Pairs that move a category toward what is expected of it {close} its gap, those that move it away {widen} it. In "
    "a category to refuse, raising refusal closes; in one to comply with, lowering it does. Shown are the largest "
    "effects on the category's mean, in {unit}{noise}."
)
GAP_NOISE = f", none that is not above {TIMES:g} times its noise floor"
GAP_UNFLOORED = "; their noise floor was not measured, so that some may be chance"
AUDIT_GAPS = "The model is the fixed one that every pair of the audit started from: its gaps do not change."
AUDIT_HEALTH = (
    "One point per pair and repeat, in the order of the audit. FVU is the share of variance over probes that the SAE "
    "misses (dashed: at the fixed model). Delta-FVU is the share of the pair's change that it misses: above 1 (dashed) "
    "the features of that pair must not be read. L0: active features per probe. Jaccard: overlap of the active "
    "features with those of the fixed model."
)
