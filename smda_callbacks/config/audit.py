"""An audit from a configuration: its options, its folder, and going on with one that was stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smda_callbacks.config.build import build_plan, builtin_path, free_folder
from smda_callbacks.config.schema import SMDAConfig
from smda_callbacks.records import RunEnd
from smda_callbacks.sinks import files
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.resume import clear_unfinished
from smda_callbacks.sinks.store import StoreSink, check_writable
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.audit import Stored, run_audit
from smda_callbacks.training.audit_pairs import read_pairs, tokenize_pairs
from smda_callbacks.training.audit_start import config_differences, refuse_if_other
from smda_callbacks.training.audit_step import AuditOptions

#: Folder of an audit that names none; a number is added where it is taken.
FOLDER = "smda-audit"


@dataclass(frozen=True)
class AuditJob:
    """An audit that can start: the checked folder and the rows. ``store`` is that of the audit to go on with."""

    config: SMDAConfig
    rows: Sequence[Mapping[str, Any]]
    folder: Path
    store: RunStore | None
    done: int  # steps that the store has already


def prepare_audit(config: SMDAConfig, pairs: str | Path, out: str | Path | None = None) -> AuditJob:
    """Everything that can be refused before a model is loaded.

    Args:
        pairs: a JSONL file, or ``builtin:quickstart/sft_pairs.jsonl``.
        out: the folder of the store; one with an audit of the same configuration in it is gone on with. None: a new
            one, ``smda-audit``.

    Raises:
        PairsError: the file cannot be read. StoreError: the folder cannot be used. AuditError: it is another audit's.
    """
    rows = read_pairs(builtin_path(str(pairs)))
    folder = free_folder(Path(FOLDER)) if out is None else Path(out)
    store = _stored(folder, config)
    return AuditJob(config, rows, folder, store, files.list_steps(folder)[-1] if store else 0)


def _stored(folder: Path, config: SMDAConfig) -> RunStore | None:
    if not (folder / files.MANIFEST).exists():
        clear_unfinished(folder)
        check_writable(folder)
        return None
    check_writable(folder, resume=True)
    store = RunStore.open(folder)
    if store.manifest.get("kind") != "audit":
        raise StoreError(
            f"{folder} is the store of a training run, not of an audit. Next step: choose another folder with --out."
        )
    refuse_if_other(config_differences(store.manifest, {"config": config.model_dump(mode="json")}))
    return store


def carry_out(job: AuditJob, model: Any, tokenizer: Any) -> RunEnd:
    """Audit the pairs of ``job``, and leave ``model`` as it was.

    Raises:
        PairsError: a row that is no pair. AuditError, and what :func:`smda_callbacks.training.audit.run_audit` raises.
    """
    options, behaviour = audit_options(job.config), job.config.behaviour
    pairs = tokenize_pairs(
        job.rows,
        tokenizer,
        max_length=options.max_length,
        loss_on=options.loss_on,
        template=behaviour.chat_template_kwargs,
        text=job.config.attribution.text,
    )
    stored = None
    if job.store is not None:
        end = job.store.end
        stored = Stored(job.store.start, job.done, finished=end is not None and end.status == "finished")
    sink = StoreSink(job.folder, resume=stored is not None)
    return run_audit(build_plan(job.config), options, model, tokenizer, pairs, [sink], stored=stored)


def audit_options(config: SMDAConfig) -> AuditOptions:
    """The options of a configuration's ``audit`` section, with its seed."""
    return AuditOptions(**config.audit.model_dump(), seed=config.seed)
