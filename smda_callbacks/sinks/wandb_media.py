"""The tables and plots that a run is sent beside its metrics: their keys, what they show, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from smda_callbacks.records import RunStart
from smda_callbacks.sinks import wandb_pair_tables as pair_tables
from smda_callbacks.sinks import wandb_tables as tables
from smda_callbacks.sinks.metric_values import Progress
from smda_callbacks.sinks.pair_values import has_ledger
from smda_callbacks.sinks.wandb_private import LogText
from smda_callbacks.sinks.wandb_tables import Table


@dataclass(frozen=True)
class Medium:
    """One table or plot. ``known``: whether a run has it."""

    key: str
    meaning: str
    build: Callable[[RunStart, Progress, LogText], Table]
    is_plot: bool = False
    known: Callable[[RunStart], bool] = lambda start: True

    @property
    def history_key(self) -> str:
        """Its name in W&B's history: a plot is kept as the table behind it."""
        return f"{self.key}_table" if self.is_plot else self.key


def _textless(build: Callable[[RunStart, Progress], Table]) -> Callable[[RunStart, Progress, LogText], Table]:
    return lambda start, progress, log_text: build(start, progress)


#: Sent at the start and the end only, from the gap table that is known then.
GAPS = "smda/tables/gaps"

#: Sent at the start, every so many windows, and at the end.
MEDIA: tuple[Medium, ...] = (
    Medium(
        "smda/tables/categories",
        "behaviour of every category at the start and now, and the account of the last window",
        _textless(tables.categories_table),
    ),
    Medium(
        "smda/tables/features",
        "coefficients and shifts of every feature, those that moved most first",
        _textless(tables.features_table),
    ),
    Medium(
        "smda/tables/probes",
        "behaviour of every probe at the start and now; its text only as `log_text` says",
        tables.probes_table,
    ),
    Medium(
        "smda/tables/pair_effects",
        "training pairs with the largest effects on harmful refusal; their text only as `log_text` says",
        pair_tables.effects_table,
        known=has_ledger,
    ),
    Medium(
        "smda/tables/pair_shares",
        "training pairs with the largest shares of the change of harmful refusal, likewise",
        pair_tables.shares_table,
        known=has_ledger,
    ),
    Medium(
        "smda/plots/feature_shift",
        "the features whose magnitude shift since the start is largest and above noise, first behaviour",
        _textless(tables.feature_bars),
        is_plot=True,
    ),
    Medium(
        "smda/plots/category_change",
        "change of every category since the start, where it is above noise, first behaviour",
        _textless(tables.category_bars),
        is_plot=True,
    ),
    Medium(
        "smda/plots/pair_effect",
        "the largest effects of training pairs on harmful refusal, those above noise",
        _textless(pair_tables.effect_bars),
        is_plot=True,
        known=has_ledger,
    ),
)

BY_KEY: Mapping[str, Medium] = {medium.key: medium for medium in MEDIA}
CATEGORIES, FEATURES, PROBES, PAIR_EFFECTS, PAIR_SHARES, FEATURE_PLOT, CATEGORY_PLOT, PAIR_PLOT = BY_KEY


def media_of(start: RunStart) -> list[Medium]:
    """Those that a run has."""
    return [medium for medium in MEDIA if medium.known(start)]


def history_keys(start: RunStart) -> list[str]:
    """Their names in W&B's history, the gap table's among them."""
    return [*(medium.history_key for medium in media_of(start)), GAPS]
