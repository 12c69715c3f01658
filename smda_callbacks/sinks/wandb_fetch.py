"""Fetch a run from a W&B server: the run store that was logged as an artifact, else its history of metrics."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smda_callbacks.sinks import files
from smda_callbacks.sinks.wandb_log import STORE_TYPE, WandbRun, numbers_of, rows_of

TIMEOUT = 30  # seconds that one answer of the server may take


class WandbFetchError(ValueError):
    """A run that W&B does not give."""


def fetch_run(path: str, cache: Path) -> Path | WandbRun:
    """The run ``entity/project/run``: the folder of its store, below ``cache``, or what else W&B has of it.

    The newest store that the run logged is downloaded, once; a copy that is there already is used. Raises
    WandbFetchError, whatever W&B raises.
    """
    import wandb

    try:
        run = wandb.Api(timeout=TIMEOUT).run(path)
        stores = [each for each in run.logged_artifacts() if each.type == STORE_TYPE]
        if stores:
            return _download(max(stores, key=_version), cache.joinpath(*path.split("/")))
        return _history(run)
    except Exception as error:  # W&B raises errors of many kinds; the user can do the same about all of them
        raise WandbFetchError(
            f"there is no folder {path}, and the W&B run of that name cannot be read "
            f"({type(error).__name__}: {error}). Next step: check the name and wandb login, or give the run store or "
            "the W&B folder of the run."
        ) from error


def _version(artifact: Any) -> int:
    found = re.fullmatch(r"v(\d+)", str(artifact.version))
    return int(found[1]) if found else -1


def _download(artifact: Any, folder: Path) -> Path:
    target = folder / re.sub(r"\W", "_", str(artifact.digest))
    if not (target / files.MANIFEST).is_file():
        part = target.with_name(target.name + files.PART)
        shutil.rmtree(part, ignore_errors=True)
        artifact.download(root=str(part))
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    return target


def _history(run: Any) -> WandbRun:
    history = sorted(run.scan_history(), key=lambda row: int(row.get("_step", 0)))
    manifest = dict(run.config).get("smda")
    summary: Mapping[str, Any] = dict(run.summary.items())
    return WandbRun(
        id=str(run.id),
        manifest=manifest if isinstance(manifest, Mapping) else {},
        rows=rows_of(history),
        summary=numbers_of(summary),
        finished=str(run.state) == "finished",
        store_files={},
    )
