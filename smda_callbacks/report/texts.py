"""What the report says about how to read it: a sentence or two beside every view."""

from __future__ import annotations

from smda_callbacks.maths.uncertainty import LEAST_RELIABILITY
from smda_callbacks.report.data import TIMES

NOTHING = "No window has been booked yet: there is nothing to show here."
NO_FLOOR = "The noise floor was not measured."

LINES = (
    "Each line is the mean {behaviour} of a category's probes. The categories that changed most, by more than their "
    "noise, are coloured; hover for values, click a name in the legend to hide it, double-click to see it alone."
)
LINES_CAPTION = (
    "Solid: categories to refuse. Dashed: to comply with. Bold: means over the probes of each group. Grey: less "
    "changed. Dotted uprights: windows not booked."
)
ARROWS = "The same from start to end, sorted by change. {noise}"
ARROWS_CAPTION = "Open circle: start. Filled: end."
BAND = (
    f"The grey band around the start is {TIMES:g} times the noise floor of the change: an end inside it may be chance "
    "and is greyed."
)

PATHWAYS = (
    "How far the policy's coefficients have moved since the start, in three parts that sum to the change: ΔX "
    "magnitude (features respond more or less strongly), ΔX gating (features switch on or off) and ΔY (the "
    "behaviour changes at given features). {noise}"
)
PATHWAYS_CAPTION = "L2 norm over features of the shifts summed since the start. Dotted uprights: windows not booked."
DOTTED = (
    "Dotted: the noise floor, what random updates of the same sizes would add up to, of the model as it was when they "
    "were last tried; a line near its floor says nothing."
)
TRUST = (
    "Per window. Reliability is the correlation of a part over features between two halves of the probes: near 1 "
    "it would come out the same on other probes, near 0 it is noise. The first-order error is the distance of the"
    " analytic approximation from the exact shift: small means that the window's step is small enough for it."
)
TRUST_CAPTION = "Left: reliability. Right: first-order error."

FEATURES = (
    "Coefficients are in {unit} per standard deviation of the feature: what the policy adds to the behaviour when"
    " the feature is one standard deviation stronger. {noise} Promoted tokens are a hint, not a measurement."
)
FEATURES_ABOVE = (
    f"{{above}} of {{features}} shifted by more than {TIMES:g} times the noise floor in some part that is reliable; the"
    " others, and parts below it, are greyed.{unreliable}"
)
FEATURES_UNKNOWN = f"{NO_FLOOR} Nothing is greyed, and nothing is known to be above chance."
FEATURES_UNRELIABLE = (
    " Greyed whatever the size, because another half of the probes says otherwise: {parts} (correlation between the "
    f"halves; {LEAST_RELIABILITY:.2f} is needed)."
)
FEATURES_CAPTION = "Parts stacked; the upright stroke is their sum. Pale: below the noise floor, or not reliable."

WATERFALL = (
    "Read from top to bottom: from the category's mean at the start to its mean at the end. A feature's bar is "
    "all that went through it: its activations moved and its coefficient shifted. The hatched residual is what "
    "the policy cannot express; the intercept is what moved on harmless prompts too. The bars close exactly."
)
WATERFALL_CAPTION = (
    "Diamonds: means at start and end. Blue: toward more of the behaviour. Orange: toward less. Grey: not more than "
    f"{TIMES:g} times the noise floor of the category's change. Hatched: residual."
)

GAPS = (
    "A gap is a category that does not do what is expected. Low: fewer than half of the answers are refusals, or "
    "far fewer than in its peers. Over-refusal: the same for categories to comply with. Fragile: refusal hangs on"
    " features that no other category shares. Pulling features move the category away from what is expected, in "
    "the policy's units. The mean is a probability of refusal."
)

HEALTH = (
    "The SAE was trained on another state of the model. FVU is the share of variance over probes that it misses; "
    "compare with its own start (dashed). Delta-FVU is the share of the window's change that it misses: above 1 "
    "(dashed) the features of that window must not be read. L0: active features per probe. Jaccard: overlap of "
    "the active features with those at the start."
)
HEALTH_CAPTION = "SAE health, read at the last prompt token over all probes."

FORMULA = "The policy as distilled. Its features, scales and λ stay fixed; every window refits the coefficients."
QUALITY = (
    "How well it predicts each category. RMSE is in the units of the behaviour; leave-one-out figures are on "
    "probes that the fit did not see. A dash: the category does not vary enough. Below 0, the category's own mean"
    " would predict better."
)
LAM_CAPTION = "Leave-one-out error of the policy over λ. Dashed: the λ that is used."

COST_CAPTION = "Wall time of each window's measurement."
CHECK = (
    "Every number here comes from the run store. This command recomputes shifts, accounts and policy from the "
    "stored snapshots and compares them, without the model:"
)
