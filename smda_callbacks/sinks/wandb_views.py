"""What a saved view of runs shows in W&B: sections in reading order, panels, and the metrics and tables in them.

Plain data, made without W&B. Names come from :mod:`smda_callbacks.sinks.metrics` and
:mod:`smda_callbacks.sinks.wandb_media`. :mod:`smda_callbacks.sinks.wandb_views_build` turns it into W&B's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from smda_callbacks.records import RunStart
from smda_callbacks.sinks import metric_values as values
from smda_callbacks.sinks import metrics, pair_values, wandb_media
from smda_callbacks.sinks.metric_axes import names_of
from smda_callbacks.sinks.metrics import METRICS, SUMMARY, Metric
from smda_callbacks.sinks.wandb_runs import POLICY_FACTS

Kind = Literal["lines", "stack", "bars", "table bars", "table", "parallel"]


@dataclass(frozen=True)
class Panel:
    """One panel. ``names``: metrics of the history (lines, stack), of the summary (bars, parallel), or one table's key;
    ``columns``: of a table, label and value; ``settings``: paths in the configuration and what they are called."""

    kind: Kind
    title: str
    names: tuple[str, ...]
    columns: tuple[str, str] | None = None
    settings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Section:
    """A heading, what to look for, and panels."""

    title: str
    text: str
    panels: tuple[Panel, ...]


#: What runs are compared over: where it is in the configuration, and what it is called.
SETTINGS = (
    (f"{POLICY_FACTS}.lam", "λ"),
    ("smda.trainer.learning_rate", "learning rate"),
    ("smda.adapter.default.r", "rank"),
)


def sections_of(starts: Sequence[RunStart]) -> tuple[Section, ...]:
    """The view of runs that began with ``starts``, in reading order; what none of them has is left out."""
    look = _Names(starts)
    found = (
        _verdict(look),
        _refusal(look),
        _policy(look),
        _pairs(look),
        _health(look),
        _cost(look),
    )
    full = (Section(each.title, each.text, tuple(panel for panel in each.panels if panel.names)) for each in found)
    return tuple(each for each in full if each.panels)


def compared(starts: Sequence[RunStart]) -> Panel:
    """Settings against what came of them, one line a run."""
    look = _Names(starts)
    names = look.of(values.worst_drop, SUMMARY) + look.of(pair_values.unexplained, SUMMARY)
    return Panel("parallel", "Settings and what came of them", names, settings=SETTINGS)


def _verdict(look: _Names) -> Section:
    worst = look.of(values.worst_drop, SUMMARY) + look.of(values.worst_rise, SUMMARY)
    return Section(
        "Verdict",
        "How far behaviour came apart: the largest fall of a category to refuse, the largest rise of one to comply "
        "with, and the groups' means over training.",
        (
            Panel("bars", "Worst category, start to end", worst),
            Panel("lines", "Mean of the groups", look.of(values.group_means)),
            Panel("lines", "Alerts", (metrics.ALERTS,)),
        ),
    )


def _refusal(look: _Names) -> Section:
    return Section(
        "Refusal by category",
        "Which categories moved, and where the policy of a run refuses too little at its end.",
        (
            Panel("lines", "Mean of every category", look.of(values.category_means)),
            Panel("lines", "Change since the start", look.of(values.category_changes)),
            look.bars("Change of every category", wandb_media.CATEGORY_PLOT, ("category", "change")),
            Panel(
                "table bars", "Gaps: how far behind what is expected", (wandb_media.GAPS,), ("category", "shortfall")
            ),
            look.table("Categories", wandb_media.CATEGORIES),
        ),
    )


def _policy(look: _Names) -> Section:
    return Section(
        "Policy and pathways",
        "Through what the policy shifted, ΔX magnitude, ΔX gating and ΔY, and how well it describes behaviour.",
        (
            Panel("stack", "Pathways of every window", look.of(values.shift_norms)),
            Panel("lines", "Pathways since the start", look.of(values.total_norms) + look.of(values.coef_norm)),
            Panel("lines", "Fit: R² in sample and leave-one-out", look.of(values.r2) + look.of(values.r2_loo)),
            Panel("lines", "Account of the groups", look.of(values.group_account)),
            look.bars("Features that shifted most", wandb_media.FEATURE_PLOT, ("feature", "shift")),
            look.table("Features", wandb_media.FEATURES),
        ),
    )


def _pairs(look: _Names) -> Section:
    flagged = look.of(pair_values.flagged)
    return Section(
        "Pairs",
        "Which training pairs did it. Effects are what would be missing without a pair; shares sum to the change.",
        (
            look.bars("Largest effects on harmful refusal", wandb_media.PAIR_PLOT, ("pair", "effect")),
            look.table("Effects of pairs", wandb_media.PAIR_EFFECTS),
            look.table("Shares of pairs", wandb_media.PAIR_SHARES),
            Panel("lines", "Ledger of harmful refusal", look.of(pair_values.ledger)),
            Panel("lines", "Flagged pairs", flagged),
        ),
    )


def _health(look: _Names) -> Section:
    return Section(
        "SAE health",
        "How far the features may be believed: above 1, delta-FVU says that the SAE misses the change.",
        (
            Panel("lines", "What the SAE misses", look.in_section(metrics.HEALTH)),
            Panel("lines", "Reliability and noise", look.in_section(metrics.NOISE)),
        ),
    )


def _cost(look: _Names) -> Section:
    return Section("Cost", "Seconds of every window, and windows that could not be read.",
                   (Panel("lines", "Cost", look.in_section(metrics.COST)),))  # fmt: skip


class _Names:
    """Names of what several runs have, each once, in reading order."""

    def __init__(self, starts: Sequence[RunStart]) -> None:
        self.starts = starts
        self.media = {medium.key for start in starts for medium in wandb_media.media_of(start)}

    def of(self, compute: Callable[..., Any], among: Sequence[Metric] = METRICS) -> tuple[str, ...]:
        """Of the metric that ``compute`` computes."""
        return self._names([metric for metric in among if metric.compute is compute])

    def in_section(self, section: str) -> tuple[str, ...]:
        return self._names([metric for metric in METRICS if metric.section == section])

    def table(self, title: str, key: str) -> Panel:
        return Panel("table", title, (key,) if key in self.media else ())

    def bars(self, title: str, key: str, columns: tuple[str, str]) -> Panel:
        """A plot that a run is sent anyway, from the table behind it."""
        names = (wandb_media.BY_KEY[key].history_key,) if key in self.media else ()
        return Panel("table bars", title, names, columns)

    def _names(self, chosen: Sequence[Metric]) -> tuple[str, ...]:
        found = (
            name
            for metric in chosen
            for start in self.starts
            if metric.known(start)
            for name in names_of(metric.pattern, start)
        )
        return tuple(dict.fromkeys(found))
