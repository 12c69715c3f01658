"""Comparisons whose answer is known: the same run twice, one cut short, one without a pair, one with another policy."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smda_callbacks.records import PATHWAYS
from smda_callbacks.report.compare import Comparison, as_json, compare
from smda_callbacks.report.compare_pairs import PairApart, PairComparison, PairIn, _in_run
from smda_callbacks.report.compare_runs import CompareError, differing_settings, named_runs
from smda_callbacks.report.compare_text import sentences
from smda_callbacks.report.data import RunData, behaviour_floors
from smda_callbacks.report.shifts import shift_floors
from smda_callbacks.sinks.codec import dumps
from smda_callbacks.sinks.pair_table import pair_table
from smda_callbacks.sinks.run_source import RunSource
from smda_callbacks.sinks.wandb_log import WandbRun
from tests.helpers.compared import stored, with_effects, with_manifest, without_pairs
from tests.helpers.pair_runs import make_audit
from tests.helpers.runs import Run, make_run

REFUSE, FRAUD = "smda/refusal_group/refuse", "smda/refusal/fraud"


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(windows=4, pairs=8)


def compared(folder: Path, *runs: Run, **options: Any) -> Comparison:
    return compare(stored(folder, *runs), **options)


def series(found: Comparison, metric: str) -> Any:
    return next(each for each in found.trajectories if each.metric == metric)


# ------------------------------------------------------------------------------------------------ nothing, or the end


def test_a_run_and_its_copy_differ_in_nothing(tmp_path: Path, run: Run) -> None:
    found = compared(tmp_path, run, with_manifest(run, run_id="copy", created="2026-02-02T00:00:00+00:00"))
    assert found.mismatches == ()
    assert found.settings == {}
    assert found.alignment.common == (0, 2, 4, 6, 8)
    assert found.alignment.same_end
    assert found.features_common is None
    for each in found.trajectories:
        assert (each.at_end["B"].difference, each.at_end["B"].above_noise) == (0.0, False)
    for feature in found.features or ():
        assert {one.difference for one in feature.apart["B"].values()} == {0.0}
        assert not feature.any_above
    assert found.pairs is not None
    assert found.pairs.differing == ()
    assert found.pairs.correlation == {"B": pytest.approx(1.0)}
    assert found.notes == ()
    assert "A and B are the same run." in compared(tmp_path / "same", run, run).notes


def test_a_run_cut_short_is_the_same_on_common_steps_and_apart_at_the_end(tmp_path: Path, run: Run) -> None:
    short = replace(run, windows=run.windows[:3], end=replace(run.end, step=6))
    found = compared(tmp_path, run, short)
    assert (found.alignment.common, found.alignment.last) == ((0, 2, 4, 6), {"A": 8, "B": 6})
    assert not found.alignment.same_end
    assert re.search(r"end apart \(A at step 8, B at step 6\); 4 steps are shared, the last is 6", found.alignment.text)
    for each in found.trajectories:
        values = each.values["A"]
        assert each.at_common["B"].difference == 0.0
        assert each.at_end["B"].difference == values[6] - values[8]
    at_end, at_common = (
        {each.feature: each.apart["B"]["total"].difference for each in some or ()}
        for some in (found.features, found.features_common)
    )
    last, before = run.windows[3].coef, run.windows[2].coef
    assert last is not None
    assert before is not None
    features = run.start.policy.features.tolist()
    assert at_end == {feature: pytest.approx(before[j, 0] - last[j, 0]) for j, feature in enumerate(features)}
    assert set(at_common.values()) == {0.0}


def test_runs_that_were_read_at_other_steps_are_compared_where_both_were(tmp_path: Path) -> None:
    often, rarely = make_run(windows=6, steps_per_window=1), make_run(windows=2, steps_per_window=3)
    found = compared(tmp_path, often, rarely, allow_mismatch=True)
    assert found.alignment.common == (0, 3, 6)
    assert found.alignment.same_end
    assert found.alignment.text == (
        "The runs were read at different steps; 3 steps are shared, the last is 6, and all end there."
    )


# ---------------------------------------------------------------------------------------------------- noise, parts


def test_the_noise_is_that_of_both_runs_together(tmp_path: Path, run: Run) -> None:
    short = replace(run, windows=run.windows[:3])
    sources = stored(tmp_path, run, short)
    found = compare(sources)
    datas = [RunData.read(source.store) for source in sources if source.store is not None]
    behaviour = [floors[-1, 0, 0] for data in datas if (floors := behaviour_floors(data)) is not None]
    assert series(found, FRAUD).at_end["B"].floor == pytest.approx(np.hypot(*behaviour))
    parts = [floors for data in datas if (floors := shift_floors(data)) is not None]
    features = datas[0].policy.features.tolist()
    for each in found.features or ():
        place, apart = features.index(each.feature), each.apart["B"]
        for part in PATHWAYS:
            floor = np.hypot(*(floors[part][-1, place, 0] for floors in parts))
            assert apart[part].floor == pytest.approx(floor)
            assert apart[part].above_noise == (abs(apart[part].difference) > 2 * floor)
        assert apart["total"].floor == pytest.approx(np.linalg.norm([apart[part].floor for part in PATHWAYS]))


def test_parts_sum_to_the_whole_and_pathways_are_norms_over_features(tmp_path: Path, run: Run) -> None:
    found = compared(tmp_path, run, replace(run, windows=run.windows[:2]))
    assert found.features is not None
    assert found.pathways is not None
    for each in found.features:
        parts = [each.apart["B"][part].difference for part in PATHWAYS]
        assert sum(parts) == pytest.approx(each.apart["B"]["total"].difference)
    for way in found.pathways:
        values = [each.apart["B"][way.part].difference for each in found.features]
        assert way.apart["B"].difference == pytest.approx(np.linalg.norm(values))
        shifts = [each.shift["A"][way.part] for each in found.features]
        assert way.norm["A"] == pytest.approx(np.linalg.norm(shifts))


def test_a_group_is_within_the_noise_of_its_categories(tmp_path: Path, run: Run) -> None:
    found = compared(tmp_path, run, run)
    floors = [series(found, f"smda/refusal/{name}").at_end["B"].floor for name in ("fraud", "weapons")]
    floor = series(found, REFUSE).at_end["B"].floor
    assert min(floors) <= floor <= max(floors)


def test_without_a_noise_floor_nothing_is_said_to_be_noise(tmp_path: Path) -> None:
    found = compared(tmp_path, make_run(noise=False), replace(make_run(noise=False), windows=make_run().windows[:2]))
    assert {each.at_end["B"].above_noise for each in found.trajectories} == {None}
    assert all(each.any_above for each in found.features or ())
    assert "its noise is not known" in " ".join(sentences(found))


# ------------------------------------------------------------------------------------------------- what must be shared


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("probes", {"probe_hash": "0ther"}),
        ("SAE", {"sae__hash": "0ther"}),
        ("policy", {"policy_hash": "0ther"}),
        ("behaviours", {"behaviours": ["refusal", "0ther"]}),
        ("scoring", {"scored_by": "0ther"}),
    ],
)
def test_what_is_not_shared_is_refused_by_name_with_both_values(
    tmp_path: Path, run: Run, what: str, change: dict[str, Any]
) -> None:
    sources = stored(tmp_path, run, run)
    manifest = with_manifest(run, **change).start.manifest
    sources[1] = replace(sources[1], manifest=manifest)  # as a store of another run would have it
    with pytest.raises(CompareError) as refused:
        compare(sources)
    expected = rf"do not share their {what}, .*\n  {what}: A .+, B .*0ther.*\nNext step: .*--allow-mismatch"
    assert re.search(expected, str(refused.value), re.S)
    assert [each.what for each in compare(sources, allow_mismatch=True).mismatches] == [what]


def test_another_target_is_another_unit_whatever_is_allowed(tmp_path: Path, run: Run) -> None:
    sources = stored(tmp_path, run, run)
    sources[1] = replace(sources[1], manifest={**run.start.manifest, "target": "logit"})
    with pytest.raises(CompareError, match=r"different units.*\n.*target: A probability, B logit"):
        compare(sources, allow_mismatch=True)


def test_features_of_another_sae_are_not_compared(tmp_path: Path, run: Run) -> None:
    found = compared(tmp_path, run, with_manifest(run, sae__hash="0ther"), allow_mismatch=True)
    assert (found.features, found.pathways) == (None, None)
    assert any("Features of different SAEs" in note for note in found.notes)
    assert found.pairs is not None


def test_supports_that_differ_are_united_and_what_is_missing_is_none(tmp_path: Path) -> None:
    small, large = make_run(features=4), make_run(features=6)
    with pytest.raises(CompareError, match=r"policy: A .*, B .* \(4 of 4 and 6 features shared\)"):
        compared(tmp_path / "refused", small, large)
    found = compared(tmp_path / "allowed", small, large, allow_mismatch=True)
    by_feature = {each.feature: each for each in found.features or ()}
    assert sorted(by_feature) == large.start.policy.features.tolist()
    for place, feature in enumerate(large.start.policy.features.tolist()):
        each = by_feature[feature]
        assert (each.end["A"] is None, each.apart["B"] is None) == (place >= 4, place >= 4)
        assert each.end["B"] is not None


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_runs_are_refused(tmp_path: Path, run: Run, number: int) -> None:
    with pytest.raises(CompareError, match=rf"{number} runs? given; a comparison takes 2"):
        compared(tmp_path, *[run] * number)


def test_an_audit_is_refused(tmp_path: Path, run: Run) -> None:
    with pytest.raises(CompareError, match=r"run-1 is an audit.*smda pairs"):
        compared(tmp_path, run, make_audit())


def test_settings_that_differ_are_listed_and_names_times_and_folders_are_not(tmp_path: Path, run: Run) -> None:
    config = {**run.start.manifest["config"], "store": {"dir": "elsewhere"}, "policy": {"lam": 3.0}}
    other = with_manifest(run, trainer__learning_rate=1e-3, seeds__trainer=43, config=config, run_id="x", created="y")
    assert differing_settings(named_runs(stored(tmp_path, run, other))) == {
        "trainer.learning_rate": {"A": 2e-4, "B": 1e-3},
        "seeds.trainer": {"A": 42, "B": 43},
        "config.policy.lam": {"A": None, "B": 3.0},
    }


# -------------------------------------------------------------------------------------------------------------- pairs


def effects_of(run: Run) -> dict[str, float]:
    """Text -> effect on refusal over the probes to refuse."""
    table = pair_table(run.start, run.windows)
    assert table is not None
    return {pair.text or "": float(table.effect[row, 0]) for row, pair in enumerate(table.pairs)}


def of_pair(found: PairComparison, number: int) -> PairApart:
    (one,) = (each for each in found.differing if f"pair {number}<" in (each.text or ""))
    return one


def pairs_of(found: Comparison) -> PairComparison:
    assert found.pairs is not None
    return found.pairs


def test_pairs_are_found_again_by_their_text_whatever_row_they_are_in(tmp_path: Path, run: Run) -> None:
    loud = with_effects(run, dict.fromkeys(range(8), 100.0))  # all act
    found = pairs_of(compared(tmp_path, loud, without_pairs(loud, {2, 4})))
    assert found.matched_by == "text"
    assert found.trained == {"A": 8, "B": 6}
    assert found.only == {"A": 2, "B": 0}
    assert len(found.differing) == 2
    effects = effects_of(loud)
    for number in (2, 4):
        one = of_pair(found, number)
        assert one.acts_in == ("A",)
        assert (one.runs["B"].state, one.runs["B"].effect) == ("absent", None)
        assert one.runs["A"].effect == effects[one.text or ""]
        assert one.rows == {"A": (number,), "B": ()}
    assert abs(found.differing[0].runs["A"].effect or 0) >= abs(found.differing[1].runs["A"].effect or 0)
    assert found.shared == 6
    assert found.correlation == {"B": pytest.approx(1.0)}


def test_a_pair_below_its_noise_in_one_run_acts_in_the_other_only(tmp_path: Path, run: Run) -> None:
    loud = with_effects(run, dict.fromkeys(range(8), 100.0))
    found = pairs_of(compared(tmp_path, with_effects(loud, {3: 1e-9}), loud))
    (one,) = found.differing
    assert one is of_pair(found, 3)
    assert (one.runs["A"].state, one.acts_in) == ("below noise", ("B",))
    assert one.runs["A"].floor is not None
    assert abs(one.runs["A"].effect or 0.0) < 2 * one.runs["A"].floor


def test_a_pair_whose_windows_were_not_attributed_is_not_said_to_be_silent(tmp_path: Path) -> None:
    loud = with_effects(make_run(windows=4, pairs=12), dict.fromkeys(range(12), 100.0))
    first, *rest = loud.windows
    partly = replace(loud, windows=(replace(first, pairs=None), *rest))  # its pairs come back in the last window
    gone = [each.id for each in first.pairs_seen if all(each.id not in w.pairs.ids for w in rest if w.pairs)]
    found = pairs_of(compared(tmp_path, loud, partly))
    assert gone == []
    assert found.differing == ()
    never = replace(loud, windows=(replace(first, pairs=None), *rest[:2]))
    found = pairs_of(compared(tmp_path / "never", loud, never))
    assert found.differing == ()
    assert found.shared == 8


def test_equal_pairs_of_a_run_are_judged_by_the_floors_that_are_known() -> None:
    def table(floor: list[float]) -> Any:
        arrays = {"effect": [[0.5], [0.01]], "windows": [1, 0], "known": [True, True]}
        return SimpleNamespace(**{name: np.array(each) for name, each in arrays.items()}, floor=np.array([floor]).T)

    assert _in_run(table([0.1, np.nan]), [0, 1], 0) == PairIn("acts", 0.51, 0.1, 1)
    assert _in_run(table([0.3, 0.4]), [0, 1], 0) == PairIn("below noise", 0.51, pytest.approx(0.5), 1)
    assert _in_run(table([np.nan, np.nan]), [0, 1], 0) == PairIn("not attributed")


@pytest.mark.parametrize("rows_moved", [False, True])
def test_without_texts_rows_are_matched_and_data_that_differ_are_told(
    tmp_path: Path, run: Run, rows_moved: bool
) -> None:
    silent = make_run(windows=4, pairs=8, pair_text=False)
    found = compared(tmp_path, silent, without_pairs(silent, {2}) if rows_moved else silent)
    pairs = pairs_of(found)
    assert pairs.matched_by == "row"
    assert pairs.unmatched == {"A": 1, "B": 1}  # a document whose row is not known
    assert pairs.warning is not None
    expected = r"The data sets differ \(.* rows .* differ in length or columns and .* different numbers of pairs\)"
    assert re.search(expected if rows_moved else "Nothing that is known", pairs.warning)
    assert pairs.warning in sentences(found)


def test_an_id_column_goes_before_texts(tmp_path: Path, run: Run) -> None:
    def named(run: Run, text: str) -> Run:
        windows = [
            replace(w, pairs_seen=tuple(
                replace(p, columns={**p.columns, "name": f"n{p.id % 100}"}, text=f"{text} {p.id}") for p in w.pairs_seen
            ))
            for w in run.windows
        ]  # fmt: skip
        config = {**run.start.manifest["config"], "attribution": {"id_column": "name"}}
        return with_manifest(replace(run, windows=tuple(windows)), config=config)

    loud = with_effects(run, dict.fromkeys(range(8), 100.0))
    found = pairs_of(compared(tmp_path, named(loud, "old"), named(without_pairs(loud, {5}), "new")))
    assert found.matched_by == "id"
    assert [each.columns["name"] for each in found.differing] == ["n5"]


def test_a_copy_with_hashed_texts_is_matched_with_the_store_itself(tmp_path: Path, run: Run) -> None:
    def hashed(text: str | None) -> str:
        return hashlib.sha256((text or "").encode()).hexdigest()[:16]

    loud = with_effects(run, dict.fromkeys(range(8), 100.0))
    windows = [
        replace(w, pairs_seen=tuple(replace(p, text=hashed(p.text)) for p in w.pairs_seen))
        for w in without_pairs(loud, {6}).windows
    ]
    config = {**loud.start.manifest["config"], "wandb": {"log_text": "hash"}}
    sources = stored(tmp_path, loud, with_manifest(replace(loud, windows=tuple(windows)), config=config))
    found = pairs_of(compare([sources[0], replace(sources[1], shown=True)]))
    assert found.matched_by == "text"
    (one,) = found.differing
    assert one is of_pair(found, 6)


def test_pairs_can_be_compared_by_another_quantity_and_an_unknown_one_is_refused(tmp_path: Path, run: Run) -> None:
    sources = stored(tmp_path, run, run)
    assert pairs_of(compare(sources, by="refusal:fraud")).functional == "refusal:fraud"
    with pytest.raises(ValueError, match=r"no 'refusal:frauds'.*nearest: .*refusal:fraud"):
        compare(sources, by="refusal:frauds")


def test_a_run_without_pairs_is_compared_in_the_rest(tmp_path: Path, run: Run) -> None:
    found = compared(tmp_path, run, make_run(windows=4))
    assert found.pairs is None
    assert "No window of run B was attributed to pairs, so pairs are not compared." in found.notes
    assert found.features


# ------------------------------------------------------------------------------------------------ cost, JSON, metrics


def test_cost_is_as_stored(tmp_path: Path, run: Run) -> None:
    found = compared(tmp_path, run, replace(run, end=replace(run.end, seconds=5.0, train_seconds=10.0)))
    assert (found.cost["A"].share, found.cost["B"].share) == (1.5 / 20, 0.5)
    cost = found.cost["A"]
    assert (cost.windows, cost.measuring, cost.median, cost.training) == (4, 1.5, 0.25, 20.0)
    assert cost.attribution == pytest.approx(4 * 0.05)


def test_three_runs_are_held_against_the_first(tmp_path: Path, run: Run) -> None:
    found = compared(tmp_path, run, replace(run, windows=run.windows[:3]), replace(run, windows=run.windows[:2]))
    ends = [series(found, REFUSE).values[name] for name in "ABC"]
    assert series(found, REFUSE).at_end["C"].difference == ends[2][4] - ends[0][8]
    assert set((found.features or ())[0].apart) == {"B", "C"}
    assert found.alignment.common == (0, 2, 4)


def test_json_has_its_keys_and_is_strict(tmp_path: Path, run: Run) -> None:
    loud = with_effects(run, dict.fromkeys(range(8), 100.0))
    found = as_json(compared(tmp_path, loud, without_pairs(loud, {2})))
    assert list(found) == [
        *("reference", "runs", "mismatches", "settings", "alignment", "unit", "trajectories", "pathways", "features"),
        *("features_common", "pairs", "cost", "summary", "notes"),
    ]
    again = json.loads(dumps(found))
    assert again["trajectories"][REFUSE]["values"]["A"][0][0] == 0
    assert set(again["trajectories"][REFUSE]["at_end"]["B"]) == {"difference", "floor", "above_noise"}
    assert set(again["features"][0]) == {"feature", "behaviour", "title", "start", "end", "shift", "apart"}
    assert set(again["pairs"]["differing"][0]) == {"text", "columns", "rows", "runs", "acts_in"}
    assert again["runs"]["B"]["run_id"] == "made-up"


def test_metrics_alone_give_trajectories_and_summary_and_say_what_is_missing(tmp_path: Path, run: Run) -> None:
    from smda_callbacks.sinks.metrics import rows_of_window, summary_of_run

    (source,) = stored(tmp_path, run)
    rows = tuple((w.step, rows_of_window(w, run.start)) for w in (run.start.baseline, *run.windows))
    rows += ((run.windows[-1].step + 5, {"smda/alerts/count": 1.0}),)  # an alert is no reading
    summary = summary_of_run(run.start, run.windows)
    logged = WandbRun("abc", run.start.manifest, rows, summary, True, {})
    other = RunSource("abc", "W&B folder", run.start.manifest, logged=logged, notes=("no policy here",))
    found = compare([source, other])
    assert max(abs(each.at_end["B"].difference) for each in found.trajectories) < 1e-15
    assert {each.metric for each in found.trajectories} >= {REFUSE, FRAUD}
    assert {each.at_end["B"].floor for each in found.trajectories} == {None}
    assert (found.features, found.pairs) == (None, None)
    assert "B: no policy here." in found.notes
    end = "smda/summary/refusal_refuse_end"
    assert found.summary[end] == {"A": pytest.approx(summary[end]), "B": summary[end]}
    assert found.cost["B"].windows == 4
