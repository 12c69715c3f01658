"""Rescoring a run from its store: probes, policy and configuration are those that it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from smda_callbacks.config.build import build_plan
from smda_callbacks.config.load import ConfigError, check_config
from smda_callbacks.config.schema import PolicyConfig, ProbesConfig
from smda_callbacks.observe.probes import ProbeSet
from smda_callbacks.sinks.rescored import Rescored
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.rescore import RescoreOptions, Tick, rescore


def rescore_run(
    store: RunStore,
    options: RescoreOptions | None = None,
    *,
    model: str | Path | None = None,
    device: str | None = None,
    tick: Tick = lambda *_: None,
) -> Rescored:
    """Rescore a run; see :func:`smda_callbacks.training.rescore.rescore`.

    Raises:
        ConfigError: the run was watched by a plan made in a script, which its store cannot make again.
        SAEError, TrajectoryError, TargetError: what of the run is not there, or is not the same any more.
    """
    return rescore(store.path, plan_of(store), store.start, options, model=model, device=device, tick=tick)


def plan_of(store: RunStore) -> Plan:
    """The plan that a run was watched by, with the probes of its store.

    Raises:
        ConfigError: the store has no configuration.
    """
    if not store.manifest.get("config"):
        raise ConfigError(
            f"{store.path} holds no configuration: the run was watched by a plan made in a script. Next step: call "
            "smda_callbacks.training.rescore.rescore with that plan."
        )
    config = check_config(store.manifest["config"], f"the configuration in {store.path}")
    # Neither the files of the probes nor that of the policy have to be there any more.
    policy = PolicyConfig(**{**config.policy.model_dump(), "path": None})
    plan = build_plan(config.model_copy(update={"probes": ProbesConfig(), "policy": policy}))
    return replace(plan, probes=ProbeSet(store.probes))
