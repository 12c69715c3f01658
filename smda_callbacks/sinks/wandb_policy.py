"""A policy as a W&B artifact with lineage: distilled once, used by many runs, which know what they are compared to.

Policies of one model and SAE are versions of one artifact; W&B gives equal content one version. Besides ``latest`` a
version has the alias ``policy-`` and the first 12 digits of its hash, which runs carry as ``smda.policy_hash`` in their
configuration.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smda_callbacks.records import PolicyRecord, RunStart, policy_hash
from smda_callbacks.sinks import files
from smda_callbacks.sinks.store import write_policy
from smda_callbacks.sinks.store_reader import read_policy
from smda_callbacks.sinks.wandb_fetch import TIMEOUT, WandbFetchError

#: Type of the artifacts.
TYPE = "smda-policy"

#: What ``policy.path`` starts with where a policy is an artifact: ``wandb:entity/project/name:alias``.
SCHEME = "wandb:"


def artifact_source(path: str | None) -> str | None:
    """The artifact's name where ``path`` names one."""
    return path.removeprefix(SCHEME) if path is not None and path.startswith(SCHEME) else None


def fetch_policy(path: str) -> PolicyRecord:
    """The policy of the artifact that ``path`` names.

    Raises:
        WandbFetchError: W&B does not give it.
        StoreError: the artifact is no policy, or damaged.
    """
    import wandb

    try:
        artifact = wandb.Api(timeout=TIMEOUT).artifact(str(artifact_source(path)), type=TYPE)
        with tempfile.TemporaryDirectory() as folder:
            artifact.download(root=folder)
            return read_policy(folder)
    except files.StoreError:
        raise
    except Exception as error:  # W&B raises errors of many kinds; the user can do the same about all of them
        raise WandbFetchError(
            f"the policy {path} cannot be read from W&B ({type(error).__name__}: {error}). Next step: check the name "
            f"({SCHEME}entity/project/name:alias) and wandb login, or give a folder that smda distill --out wrote."
        ) from error


def log_policy(run: Any, store: Path, start: RunStart) -> None:
    """Note in ``run`` which policy it starts from: the artifact that the configuration names, else one of its own.

    Waits for the server. An offline run cannot use an artifact; its configuration names it all the same.
    """
    policy = start.manifest.get("config", {}).get("policy", {})
    source = artifact_source(policy.get("path"))
    if source is None:
        send_artifact(run, store, start.policy, {"run_id": start.manifest.get("run_id")})
    elif not getattr(run, "offline", False):
        run.use_artifact(source, type=TYPE)


def send_artifact(run: Any, folder: Path, policy: PolicyRecord, facts: Mapping[str, Any]) -> Any:
    """Log the policy in ``folder`` as a version of its model's and SAE's artifact; returns W&B's handle."""
    import wandb

    metadata = {
        **facts,
        "policy_hash": policy_hash(policy),
        "lam": policy.lam,
        "features": len(policy.features),
        "r2_loo": policy.quality[0].r2_loo if policy.quality else None,
    }
    artifact = wandb.Artifact(name_of(policy), type=TYPE, metadata=metadata)
    for suffix in ("json", "safetensors"):
        path = folder / f"{files.POLICY}.{suffix}"
        artifact.add_file(str(path), name=path.name, skip_cache=True)
    return run.log_artifact(artifact, aliases=["latest", alias_of(policy)])


def publish_policy(policy: PolicyRecord, project: str, entity: str | None = None) -> str:
    """Send a policy in a W&B run of its own, of the job type ``distill``; returns what ``policy.path`` may be.

    Raises whatever W&B raises. In an offline run the artifact waits for ``wandb sync``.
    """
    import wandb

    facts = {"policy_hash": policy_hash(policy), "model": {"id": policy.model_id}, "sae": {"id": policy.sae_id}}
    with tempfile.TemporaryDirectory() as folder:
        write_policy(Path(folder), policy)
        with wandb.init(project=project, entity=entity, job_type="distill", config={"smda": facts}) as run:
            handle = send_artifact(run, Path(folder), policy, {})
            if not run.offline:
                handle.wait()
            place = "/".join(filter(None, (run.entity, run.project)))
    return f"{SCHEME}{place}/{name_of(policy)}:{alias_of(policy)}"


def name_of(policy: PolicyRecord) -> str:
    """The artifact that all policies of one model and SAE are versions of."""
    parts = [Path(name).name for name in (policy.model_id, policy.sae_id) if name]
    return re.sub(r"[^\w.-]+", "-", "-".join([TYPE, *parts]))[:128]


def alias_of(policy: PolicyRecord) -> str:
    """The alias of this very policy."""
    return f"policy-{policy_hash(policy)[:12]}"
