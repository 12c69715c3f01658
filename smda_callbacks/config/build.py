"""A checked configuration -> the plain objects that the library works with."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

from smda_callbacks.config.schema import ProbesConfig, SAEConfig, SMDAConfig, SourceConfig
from smda_callbacks.observe.behaviour import prefix_probability
from smda_callbacks.observe.distil import DistilOptions
from smda_callbacks.observe.probes import (
    FORMATS,
    Columns,
    ProbeError,
    ProbeSet,
    check_probes,
    default_probes,
    load_rows,
    sample_per_category,
    with_expected,
)
from smda_callbacks.observe.sae import SAEHandle, load_sae
from smda_callbacks.observe.savings import SavingOptions
from smda_callbacks.records import PolicyRecord
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.files import LOGGED
from smda_callbacks.sinks.past import Past
from smda_callbacks.sinks.trackers import TRACKERS, TrackerName, TrackerSink
from smda_callbacks.training.alerts import AlertLimits
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.trajectory_options import TrajectoryOptions

#: Sources that start with this name what ships with the library.
BUILTIN = "builtin:"


def build_plan(config: SMDAConfig) -> Plan:
    """The measurement plan of a configuration. Probes and a saved policy are read now, the SAE when training starts."""
    policy, measure, behaviour = config.policy, config.measure, config.behaviour
    return Plan(
        probes=build_probes(config.probes),
        load_sae=lambda: build_sae(config.sae),
        scorers=(prefix_probability("refusal", behaviour.refusals),),
        contrast={"compliance": behaviour.compliances},
        target=behaviour.target,
        readout=behaviour.readout,
        batch_size=measure.batch_size,
        system=behaviour.system_prompt,
        template=behaviour.chat_template_kwargs,
        allow_model_mismatch=config.sae.allow_model_mismatch,
        distil=distil_options(config),
        policy=load_policy(policy.path) if policy.path else None,
        every=measure.every,
        health_every=measure.health_every,
        overhead_budget=measure.overhead_budget,
        noise_draws=measure.noise_draws,
        renew_noise=measure.renew_noise,
        savings=SavingOptions(measure.keep_gib, measure.share_prefix, measure.trim),
        limits=AlertLimits(**config.alerts.model_dump()),
        attribution=AttributionOptions(**config.attribution.model_dump()),
        trajectory=TrajectoryOptions(**config.trajectory.model_dump()),
        on_error=measure.on_error,
        make_sinks=lambda args: build_sinks(config, args),
        reopen_sinks=lambda args, past: build_sinks(config, args, past, resumed=True),
        config=config.model_dump(mode="json"),
        seed=config.seed,
    )


def distil_options(config: SMDAConfig) -> DistilOptions:
    """How the policy is distilled."""
    policy = config.policy
    return DistilOptions(
        support=policy.support,
        min_active=policy.min_active,
        lam=None if policy.lam == "auto" else policy.lam,
        lam_tolerance=policy.lam_tolerance,
        cv_folds=policy.cv_folds,
        seed=config.seed,
    )


def build_probes(config: ProbesConfig) -> ProbeSet:
    """The probe set of a configuration.

    Raises:
        ProbeError: a source cannot be read, or the set cannot be measured.
    """
    if not config.sources:
        probes = list(default_probes().probes)
    else:
        probes = [probe for source in config.sources for probe in _read_source(source)]
    if config.max_per_category is not None:
        probes = sample_per_category(probes, config.max_per_category)
    return check_probes(probes)


def build_sae(config: SAEConfig) -> SAEHandle:
    """Load the SAE of a configuration.

    Raises:
        SAEError: it cannot be loaded or would be read wrongly.
    """
    return load_sae(
        builtin_path(config.source),
        config.sae_id,
        hook_name=config.hook_name,
        norm_scaling_factor=config.norm_scaling_factor,
        center=config.center,
    )


def build_sinks(config: SMDAConfig, args: Any, past: Past | None = None, *, resumed: bool = False) -> Sequence[Sink]:
    """The run store, and W&B and other trackers where they are wanted. ``args`` are the trainer's TrainingArguments.

    With ``past``, those that go on with an earlier run, in its own folder whatever ``store.dir`` says. ``resumed``: the
    training goes on from a checkpoint; without ``past`` it gets a folder beside ``store.dir`` if that is taken.

    Raises:
        StoreError: the folder cannot be written, or holds something already.
    """
    from smda_callbacks.sinks.store import StoreSink, check_writable

    folder = past.store.path if past is not None else _new_folder(config, args, resumed)
    check_writable(folder, resume=past is not None)
    sinks: list[Sink] = [StoreSink(folder, resume=past is not None)]
    if _wants_wandb(config, args):
        from smda_callbacks.sinks.wandb_sink import WandbSink

        options = config.wandb.model_dump(exclude={"enabled", "artifacts"})
        artifacts = folder if config.wandb.artifacts else None
        sinks.append(WandbSink(**options, store_path=artifacts, logged_path=folder / LOGGED, past=past))
    events = Path(os.getenv("TENSORBOARD_LOGGING_DIR") or Path(args.output_dir) / "runs").expanduser() / folder.name
    sinks += [TrackerSink(name, events, past=past) for name in _wanted_trackers(config, args)]
    return sinks


def _new_folder(config: SMDAConfig, args: Any, resumed: bool) -> Path:
    if config.store.dir and not resumed:
        return Path(config.store.dir)
    return free_folder(Path(config.store.dir or Path(args.output_dir) / "smda"))


def free_folder(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that is free: a new run never overwrites an old one."""
    candidates = (path if k == 1 else path.with_name(f"{path.name}-{k}") for k in count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


def load_policy(path: str | Path) -> PolicyRecord:
    """A policy saved by ``smda distill`` or inside a run store, or a W&B artifact: ``wandb:entity/project/name:alias``.

    Raises:
        StoreError: there is none, or it is damaged.
        WandbFetchError: W&B does not give it.
    """
    from smda_callbacks.sinks.store_reader import read_policy
    from smda_callbacks.sinks.wandb_policy import artifact_source, fetch_policy

    return read_policy(path) if artifact_source(str(path)) is None else fetch_policy(str(path))


def builtin_path(source: str) -> str:
    """The path behind ``builtin:...``; any other source as it is."""
    if not source.startswith(BUILTIN):
        return source
    path = Path(str(resources.files("smda_callbacks") / "data")) / source.removeprefix(BUILTIN)
    if not path.exists():
        known = sorted(each.name for each in (path.parent.iterdir() if path.parent.is_dir() else ()))
        raise ProbeError(f"{source!r} does not ship with the library. Beside it: {', '.join(known) or 'nothing'}.")
    return str(path)


def _read_source(config: SourceConfig) -> list[Any]:
    given = {name: value for name, value in config.columns.model_dump().items() if value is not None}
    if config.columns.refuse_labels is not None:  # labels are compared in lower case
        given["refuse_labels"] = tuple(label.strip().lower() for label in config.columns.refuse_labels)
    columns = Columns(**{**vars(FORMATS[config.format]), **given})
    rows = load_rows(builtin_path(config.source), columns=columns, category=config.category)
    return with_expected(rows, config.expected) if config.expected else rows


def _wanted_trackers(config: SMDAConfig, args: Any) -> Sequence[TrackerName]:
    if config.trackers != "auto":
        return config.trackers
    return [name for name in TRACKERS if name in (args.report_to or ())]


def _wants_wandb(config: SMDAConfig, args: Any) -> bool:
    if config.wandb.enabled != "auto":
        return bool(config.wandb.enabled)
    # A run that the user opened counts too. Looked up, not imported: without W&B nothing of it is loaded.
    is_open = getattr(sys.modules.get("wandb"), "run", None) is not None
    return is_open or bool({"wandb", "all"} & set(args.report_to or ()))
