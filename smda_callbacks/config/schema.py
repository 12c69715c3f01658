"""The keys of a configuration file, their types, defaults and limits. Data only: nothing is loaded or built here."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from smda_callbacks.observe.features import Readout
from smda_callbacks.observe.instrument import Target
from smda_callbacks.observe.prefixes import COMPLIANCES, REFUSALS
from smda_callbacks.observe.probes import FORMATS
from smda_callbacks.records import Expected
from smda_callbacks.sinks.trackers import TrackerName
from smda_callbacks.training.audit_pairs import LossOn
from smda_callbacks.training.audit_step import Optimizer
from smda_callbacks.training.engine import EngineName


class Section(BaseModel):
    """A section: frozen, and no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("true and false (YAML: also yes, no, on and off) are no value of this key; quote a word")
        return value


class ColumnsConfig(Section):
    """Column names of a prompt file; what is left out comes from the source's format."""

    text: str | None = None
    category: str | None = None
    label: str | None = None
    refuse_labels: tuple[str, ...] | None = None
    id: str | None = None


class SourceConfig(Section):
    """One file or data set of prompts."""

    source: str = Field(min_length=1)
    format: str = "smda"
    columns: ColumnsConfig = ColumnsConfig()
    category: str | None = None
    expected: Expected | None = None

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        if value not in FORMATS:
            near = get_close_matches(value, FORMATS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown probe format; {hint}Allowed: {', '.join(FORMATS)}")
        return value


class ProbesConfig(Section):
    """What is asked. No sources: the probe set that ships with the library."""

    sources: tuple[SourceConfig, ...] = ()
    max_per_category: int | None = Field(None, ge=1)


class ModelConfig(Section):
    """Used by the command line and the recipes; the callback takes the trainer's own model."""

    id: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class SAEConfig(Section):
    """Which sparse autoencoder: a folder, a release of the sae-lens registry, or a repository id."""

    source: str = Field(min_length=1)
    sae_id: str | None = None
    hook_name: str | None = None
    norm_scaling_factor: float | None = Field(None, gt=0)
    center: bool = False
    allow_model_mismatch: bool = False


class BehaviourConfig(Section):
    """How refusal is scored, and where features are read."""

    refusals: tuple[str, ...] = REFUSALS
    compliances: tuple[str, ...] = COMPLIANCES
    target: Target = "probability"
    readout: Readout = "last"
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @field_validator("refusals", "compliances")
    @classmethod
    def _list_is_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("is empty; name at least one opening, or leave the key out for the default list")
        return value


class PolicyConfig(Section):
    """How the policy is distilled, or where a saved one lies."""

    path: str | None = None
    support: int = Field(16, ge=1)
    min_active: int = Field(8, ge=1)
    lam: Literal["auto"] | float = "auto"
    lam_tolerance: float = Field(0.2, ge=0, lt=1)
    cv_folds: int = Field(10, ge=0)

    @field_validator("lam")
    @classmethod
    def _lam_is_positive(cls, value: str | float) -> str | float:
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise ValueError("must be a finite number above 0, or auto")
        return value


class MeasureConfig(Section):
    """When and how the model is read."""

    every: int = Field(1, ge=1)
    health_every: int = Field(1, ge=1)
    batch_size: int = Field(64, ge=1)
    overhead_budget: float | None = Field(None, gt=0, lt=1)
    noise_draws: int = Field(8, ge=0)
    renew_noise: bool = True
    keep_gib: float = Field(1.0, ge=0)
    share_prefix: bool = True
    trim: bool = True
    on_error: Literal["warn", "raise"] = "warn"


class AttributionConfig(Section):
    """How shifts are attributed to training pairs."""

    engine: EngineName = "auto"
    every: int = Field(1, ge=1)
    features: Annotated[int, Field(ge=1)] | tuple[int, ...] | None = 8
    renew: int | None = Field(1, ge=1)
    momentum: Literal["carry", "line"] = "carry"
    memory_gib: float = Field(4.0, gt=0)
    intended: int = Field(4, ge=1)
    text: bool = True
    id_column: str | None = None


class TrajectoryConfig(Section):
    """Whether the run's steps are kept in the store, so that ``smda rescore`` can go through the run again."""

    keep: bool = False
    every: int = Field(1, ge=1)
    max_gib: float = Field(20.0, gt=0)


class AlertsConfig(Section):
    """Beyond these, an alert is raised."""

    refusal_drop: float = Field(0.15, gt=0)
    refusal_rise: float = Field(0.15, gt=0)
    delta_fvu: float = Field(1.0, gt=0)
    fvu_ratio: float = Field(1.5, gt=0)


class AuditConfig(Section):
    """The update that every pair of ``smda audit`` makes alone, from the same start."""

    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False)
    steps: int = Field(1, ge=1)
    optimizer: Optimizer = "adamw_torch"
    repeats: int = Field(1, ge=1)
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False)
    target_modules: str | tuple[str, ...] = "all-linear"
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False)
    max_length: int = Field(1024, ge=2)
    loss_on: LossOn = "completion"


class StoreConfig(Section):
    """Where the run is stored. No ``dir``: ``smda`` in the trainer's output folder, or ``smda-2`` if that is taken."""

    dir: str | None = None


class WandbConfig(Section):
    """Weights & Biases. ``auto``: wherever the trainer reports to it, or a run is open."""

    enabled: Literal["auto"] | bool = "auto"
    project: str | None = None
    mode: Literal["online", "offline"] | None = None
    tables_every: int = Field(10, ge=1)
    log_text: Literal["none", "hash", "full"] = "none"
    artifacts: bool = True


class SMDAConfig(Section):
    """A whole configuration."""

    model: ModelConfig = ModelConfig()
    probes: ProbesConfig = ProbesConfig()
    sae: SAEConfig
    behaviour: BehaviourConfig = BehaviourConfig()
    policy: PolicyConfig = PolicyConfig()
    measure: MeasureConfig = MeasureConfig()
    attribution: AttributionConfig = AttributionConfig()
    trajectory: TrajectoryConfig = TrajectoryConfig()
    alerts: AlertsConfig = AlertsConfig()
    audit: AuditConfig = AuditConfig()
    store: StoreConfig = StoreConfig()
    wandb: WandbConfig = WandbConfig()
    trackers: Literal["auto"] | tuple[TrackerName, ...] = "auto"
    seed: int = 0
