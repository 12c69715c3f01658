"""Every key of a configuration arrives where it is used."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smda_callbacks import SMDACallback
from smda_callbacks.config import build
from smda_callbacks.config.build import build_plan, build_probes, build_sinks, builtin_path
from smda_callbacks.config.load import check_config
from smda_callbacks.config.schema import AuditConfig, ProbesConfig, SMDAConfig
from smda_callbacks.observe.probes import FORMATS, ProbeError
from smda_callbacks.sinks.files import LOGGED, POLICY, StoreError
from smda_callbacks.sinks.past import read_past
from smda_callbacks.sinks.store import StoreSink, write_policy
from smda_callbacks.sinks.trackers import TrackerSink
from smda_callbacks.sinks.wandb_sink import WandbSink
from smda_callbacks.training.plan import Plan
from tests.helpers.equal import assert_same
from tests.helpers.runs import make_run, write_run

View = Callable[[Plan], Any]

ARGS = SimpleNamespace(output_dir="out", report_to=[])


def store(plan: Plan) -> StoreSink:
    sink = plan.make_sinks(ARGS)[0]
    assert isinstance(sink, StoreSink)
    return sink


def tracker(plan: Plan) -> WandbSink:
    sink = plan.make_sinks(ARGS)[1]
    assert isinstance(sink, WandbSink)
    return sink


def loaded(plan: Plan) -> Any:
    """What the SAE would be loaded with; see the fixture."""
    return plan.load_sae()


#: key -> (a value that is not the default, what must arrive, where it is looked for).
KEYS: dict[str, tuple[Any, Any, View]] = {
    "probes.max_per_category": (1, 20, lambda plan: len(plan.probes)),
    "sae.source": ("other", "other", lambda plan: loaded(plan)["source"]),
    "sae.sae_id": ("layer_3", "layer_3", lambda plan: loaded(plan)["sae_id"]),
    "sae.hook_name": ("model.layers.3", "model.layers.3", lambda plan: loaded(plan)["hook_name"]),
    "sae.norm_scaling_factor": (0.5, 0.5, lambda plan: loaded(plan)["norm_scaling_factor"]),
    "sae.center": (True, True, lambda plan: loaded(plan)["center"]),
    "sae.allow_model_mismatch": (True, True, lambda plan: plan.allow_model_mismatch),
    "behaviour.refusals": (["No"], ("No",), lambda plan: plan.scorers[0].openings),
    "behaviour.compliances": (["Yes"], {"compliance": ("Yes",)}, lambda plan: plan.contrast),
    "behaviour.target": ("logit", "logit", lambda plan: plan.target),
    "behaviour.readout": ("mean", "mean", lambda plan: plan.readout),
    "behaviour.system_prompt": ("Be kind.", "Be kind.", lambda plan: plan.system),
    "behaviour.chat_template_kwargs": ({"a": 1}, {"a": 1}, lambda plan: plan.template),
    "policy.support": (7, 7, lambda plan: plan.distil.support),
    "policy.min_active": (3, 3, lambda plan: plan.distil.min_active),
    "policy.lam": (12.5, 12.5, lambda plan: plan.distil.lam),
    "policy.lam_tolerance": (0.1, 0.1, lambda plan: plan.distil.lam_tolerance),
    "policy.cv_folds": (4, 4, lambda plan: plan.distil.cv_folds),
    "measure.every": (5, 5, lambda plan: plan.every),
    "measure.health_every": (6, 6, lambda plan: plan.health_every),
    "measure.batch_size": (9, 9, lambda plan: plan.batch_size),
    "measure.noise_draws": (2, 2, lambda plan: plan.noise_draws),
    "measure.renew_noise": (False, False, lambda plan: plan.renew_noise),
    "measure.keep_gib": (0.5, 0.5, lambda plan: plan.savings.keep_gib),
    "measure.share_prefix": (False, False, lambda plan: plan.savings.share_prefix),
    "measure.trim": (False, False, lambda plan: plan.savings.trim),
    "measure.overhead_budget": (0.05, 0.05, lambda plan: plan.overhead_budget),
    "measure.on_error": ("raise", "raise", lambda plan: plan.on_error),
    "attribution.engine": ("exact", "exact", lambda plan: plan.attribution.engine),
    "attribution.every": (3, 3, lambda plan: plan.attribution.every),
    "attribution.features": (5, 5, lambda plan: plan.attribution.features),
    "attribution.renew": (3, 3, lambda plan: plan.attribution.renew),
    "attribution.momentum": ("line", "line", lambda plan: plan.attribution.momentum),
    "attribution.memory_gib": (1.5, 1.5, lambda plan: plan.attribution.memory_gib),
    "attribution.intended": (2, 2, lambda plan: plan.attribution.intended),
    "attribution.text": (False, False, lambda plan: plan.attribution.text),
    "attribution.id_column": ("uid", "uid", lambda plan: plan.attribution.id_column),
    "trajectory.keep": (True, True, lambda plan: plan.trajectory.keep),
    "trajectory.every": (5, 5, lambda plan: plan.trajectory.every),
    "trajectory.max_gib": (1.5, 1.5, lambda plan: plan.trajectory.max_gib),
    "alerts.refusal_drop": (0.3, 0.3, lambda plan: plan.limits.refusal_drop),
    "alerts.refusal_rise": (0.4, 0.4, lambda plan: plan.limits.refusal_rise),
    "alerts.delta_fvu": (0.9, 0.9, lambda plan: plan.limits.delta_fvu),
    "alerts.fvu_ratio": (3.0, 3.0, lambda plan: plan.limits.fvu_ratio),
    "store.dir": ("runs/x", Path("runs/x"), lambda plan: store(plan).path),
    "wandb.enabled": (False, 1, lambda plan: len(plan.make_sinks(ARGS))),
    "wandb.project": ("mine", "mine", lambda plan: tracker(plan).project),
    "wandb.mode": ("offline", "offline", lambda plan: tracker(plan).mode),
    "wandb.tables_every": (3, 3, lambda plan: tracker(plan).tables_every),
    "wandb.log_text": ("hash", "hash", lambda plan: tracker(plan).log_text),
    "wandb.artifacts": (False, None, lambda plan: tracker(plan).store_path),
    "seed": (11, (11, 11), lambda plan: (plan.seed, plan.distil.seed)),
}

#: Keys with tests of their own, and the section that only the command line and the recipes use.
ELSEWHERE = {"probes.sources", "policy.path", "model.id", "model.dtype", "trackers"}  # trackers: see test_trackers
ELSEWHERE |= {f"audit.{key}" for key in AuditConfig.model_fields}  # see test_audit


@pytest.fixture(autouse=True)
def _no_sae_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def record(source: str, sae_id: str | None, **options: Any) -> dict[str, Any]:
        return {"source": source, "sae_id": sae_id, **options}

    monkeypatch.setattr(build, "load_sae", record)


def config_with(**values: Any) -> SMDAConfig:
    """The smallest configuration, W&B on, with single keys set: ``config_with(**{"policy.lam": 3})``."""
    sections: dict[str, Any] = {"sae": {"source": "somewhere"}, "wandb": {"enabled": True}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[name] = value
    return check_config(sections, "the test's configuration")


def test_the_table_below_holds_every_key() -> None:
    keys = set()
    for name, field in SMDAConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        keys |= {f"{name}.{each}" for each in inner} if inner else {name}
    assert keys == KEYS.keys() | ELSEWHERE


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_arrives_and_others_stay(key: str) -> None:
    value, expected, view = KEYS[key]
    before, after = build_plan(config_with()), build_plan(config_with(**{key: value}))
    assert view(after) == expected
    assert view(before) != expected
    # An enabled W&B is what makes its other keys visible; a disabled one hides them.
    others = {other: look for other, (_, _, look) in KEYS.items() if other != key}
    if key == "wandb.enabled":
        others = {other: look for other, look in others.items() if not other.startswith("wandb.")}
    if key == "store.dir":
        del others["wandb.artifacts"]  # what is sent is the store, wherever it is
    for other, look in others.items():
        assert look(after) == look(before), other


def test_the_plan_carries_the_resolved_configuration() -> None:
    config = config_with(**{"policy.lam": 3})
    plan = build_plan(config)
    assert plan.config == config.model_dump(mode="json")
    assert json.loads(json.dumps(plan.config)) == plan.config
    assert plan.config["policy"] == {**config_with().policy.model_dump(), "lam": 3.0}


def test_a_plan_by_default_distils_by_leave_one_out() -> None:
    plan = build_plan(config_with())
    assert plan.policy is None
    assert plan.distil.lam is None
    assert [each.name for each in plan.scorers] == ["refusal"]


def test_the_store_lies_in_the_trainers_folder() -> None:
    plan = build_plan(config_with())
    assert store(plan).path == Path("out/smda")
    write_run(Path("out/smda"), make_run(windows=1))
    assert store(plan).path == Path("out/smda-2")  # the old run stays


def test_a_folder_that_is_taken_is_refused_before_training() -> None:
    write_run(Path("taken"), make_run(windows=1))
    with pytest.raises(StoreError, match="taken"):
        store(build_plan(config_with(**{"store.dir": "taken"})))


def test_the_callback_is_made_from_a_mapping() -> None:
    callback = SMDACallback.from_config({"sae": {"source": "x"}, "measure": {"every": 3}})
    assert isinstance(callback, SMDACallback)
    assert callback.plan.every == 3
    assert loaded(callback.plan)["source"] == "x"


# Probes ---------------------------------------------------------------------------------------------------------------

#: One row of each format, by its own column names.
ROWS: dict[str, dict[str, str]] = {
    "smda": {"text": "A?", "category": "theft", "expected": "refuse", "id": "a-1"},
    "xstest": {"id": "1", "prompt": "A?", "type": "homonyms", "label": "unsafe"},
    "jailbreakbench": {"Index": "0", "Goal": "A?", "Target": "Sure", "Category": "Fraud/Deception"},
    "advbench": {"goal": "A?", "target": "Sure"},
    "strongreject": {"category": "Violence", "source": "custom", "forbidden_prompt": "A?"},
    "instructions": {"instruction": "A?", "output": "B."},
}


def save_csv(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def build_from(*sources: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(id, text, category, expected) of each probe; one of each group is added."""
    probes = build_probes(ProbesConfig.model_validate({"sources": list(sources)}))
    return [(each.id, each.text, each.category, each.expected) for each in probes.probes]


@pytest.fixture
def both(tmp_path: Path) -> dict[str, Any]:
    """A source with a probe of each group, so that any other can be read beside it."""
    rows = [{"text": word, "category": word, "expected": word} for word in ("refuse", "comply")]
    return {"source": save_csv(tmp_path / "both.csv", rows)}


@pytest.mark.parametrize(
    ("name", "probe"),
    [
        ("smda", ("a-1", "A?", "theft", "refuse")),
        ("xstest", ("1", "A?", "homonyms", "refuse")),
        ("jailbreakbench", ("set-0001", "A?", "Fraud/Deception", "refuse")),
        ("advbench", ("set-0001", "A?", "set", "refuse")),
        ("strongreject", ("set-0001", "A?", "Violence", "refuse")),
        ("instructions", ("set-0001", "A?", "set", "comply")),
    ],
)
def test_every_format_reads_its_own_columns(name: str, probe: tuple[str, ...], both: Any, tmp_path: Path) -> None:
    assert ROWS.keys() == FORMATS.keys()
    source = {"source": save_csv(tmp_path / "set.csv", [ROWS[name]]), "format": name}
    assert build_from(source, both)[0] == probe


def test_columns_category_and_expected_override_the_format(both: Any, tmp_path: Path) -> None:
    rows = [{"q": "A?", "verdict": "Harmful "}, {"q": "B?", "verdict": "fine"}]
    source = {"source": save_csv(tmp_path / "mine.csv", rows), "columns": {"text": "q", "label": "verdict"}}
    # Labels are compared without case: a list that says Harmful means the rows that say it.
    labelled = {**source, "columns": {**source["columns"], "refuse_labels": ["HARMFUL"], "category": "verdict"}}
    assert [row[3] for row in build_from(labelled, both)[:2]] == ["refuse", "comply"]
    forced = {**source, "category": "other", "expected": "comply"}
    assert [row[2:] for row in build_from(forced, both)[:2]] == [("other", "comply")] * 2


def test_no_source_is_the_set_of_the_library() -> None:
    assert len(build_probes(ProbesConfig())) == 426


def test_what_does_not_ship_is_refused_with_what_does() -> None:
    with pytest.raises(ProbeError, match=r"'builtin:probe.jsonl' does not ship.*Beside it: .*probes\.jsonl"):
        builtin_path("builtin:probe.jsonl")
    assert Path(builtin_path("builtin:probes.jsonl")).is_file()
    assert builtin_path("owner/name") == "owner/name"


# A saved policy -------------------------------------------------------------------------------------------------------


def test_a_saved_policy_is_loaded_from_a_folder_or_a_run(tmp_path: Path) -> None:
    run = make_run(windows=1)
    (tmp_path / "policy").mkdir()
    write_policy(tmp_path / "policy", run.start.policy)
    write_run(tmp_path / "run", run)
    for folder in ("policy", "run"):
        assert_same(build_plan(config_with(**{"policy.path": str(tmp_path / folder)})).policy, run.start.policy)


def test_a_policy_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"no policy in .*: {POLICY}.json and {POLICY}.safetensors missing"):
        build_plan(config_with(**{"policy.path": str(tmp_path)}))
    (tmp_path / f"{POLICY}.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StoreError, match=rf": {POLICY}.safetensors missing. .*smda distill --out"):
        build_plan(config_with(**{"policy.path": str(tmp_path)}))


# W&B ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enabled", "report_to", "is_open", "wanted"),
    [
        ("auto", [], False, False),
        ("auto", None, False, False),
        ("auto", ["tensorboard"], False, False),
        ("auto", ["tensorboard", "wandb"], False, True),
        ("auto", ["all"], False, True),
        ("auto", [], True, True),
        (True, [], False, True),
        (False, ["wandb"], True, False),
    ],
)
def test_wandb_goes_where_it_is_wanted(
    enabled: Any, report_to: Any, is_open: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=object() if is_open else None))
    config = config_with(**{"wandb.enabled": enabled})
    sinks = build_sinks(config, SimpleNamespace(output_dir="out", report_to=report_to))
    assert [type(sink) for sink in sinks if not isinstance(sink, TrackerSink)] == [StoreSink, WandbSink][: 1 + wanted]


def test_wandb_that_was_never_imported_is_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert len(build_sinks(config_with(**{"wandb.enabled": "auto"}), ARGS)) == 1
    assert "wandb" not in sys.modules


@pytest.mark.parametrize("artifacts", [True, False])
def test_what_wandb_is_sent_is_noted_in_the_store(artifacts: bool) -> None:
    sink = tracker(build_plan(config_with(**{"wandb.artifacts": artifacts})))
    assert sink.logged_path == Path("out/smda") / LOGGED
    assert sink.store_path == (Path("out/smda") if artifacts else None)


@pytest.mark.parametrize("folder", [None, "taken"])
def test_a_training_that_goes_on_takes_its_own_store_or_a_new_one_beside_it(folder: str | None) -> None:
    plan = build_plan(config_with(**({"store.dir": folder} if folder else {})))
    taken = write_run(Path(folder or "out/smda"), make_run(windows=3))
    assert plan.reopen_sinks is not None
    again, tracker = plan.reopen_sinks(ARGS, read_past(taken, 4))
    assert isinstance(again, StoreSink)
    assert isinstance(tracker, WandbSink)
    assert (again.path, again.resume, tracker.logged_path) == (taken, True, taken / "logged.jsonl")
    new = plan.reopen_sinks(ARGS, None)[0]
    assert isinstance(new, StoreSink)
    assert (new.path, new.resume) == (taken.with_name(f"{taken.name}-2"), False)
