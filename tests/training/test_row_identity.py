"""Every example of a real run leads to its rows in the user's data set, however the trainer changes the data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from smda_callbacks.observe.sequences import token_key
from smda_callbacks.training.row_identity import build_index, find_trainer
from smda_callbacks.training.row_table import read_keys
from smda_callbacks.training.row_text import row_text
from smda_callbacks.training.row_ways import RowError
from tests.helpers.pair_training import Noting, make_trainer, user_data, words
from tests.helpers.tiny import tiny_model, tiny_tokenizer

ROWS, EPOCHS = 18, 2
TOKENIZER = tiny_tokenizer()


def run(data: Any, folder: Path, noting: Noting | None = None, **options: Any) -> Noting:
    noting = noting or Noting()
    make_trainer(data, folder, noting, **options).train()
    return noting


def shown(row: dict[str, Any]) -> str:
    """The text that a row of :func:`user_data` is to have."""
    prompt, answer = words(row["serial"] - 100)
    return prompt + answer if "text" in row or "input_ids" in row else f"{prompt}\n→ {answer.strip()}"


def check(noting: Noting, data: Any, *, times: int = EPOCHS, rows: Any = None) -> None:
    """Each of ``rows`` (all if None) of ``data`` was seen so often, and its pair tells what the row holds."""
    rows = range(len(data)) if rows is None else rows
    assert noting.rows == {(row,): times for row in rows}
    for number in noting.seen:
        pair = noting.index.describe(number)
        row = data[pair.rows[0]]
        assert (pair.id, pair.level) == (number, "row")
        assert pair.text == shown(row)
        assert pair.columns == {"kind": row["kind"], "serial": str(row["serial"])}
        # The tokens that the model got are those of this row: its number is in them.
        tokens = TOKENIZER.decode(noting.examples[number].tokens, skip_special_tokens=True)
        assert "".join(words(row["serial"] - 100)).startswith(tokens)
        assert f"Row {row['serial'] - 100}:" in tokens
    assert noting.index.unknown == 0


PLAIN: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded to a multiple": {"pad_to_multiple_of": 8},
    "padding free": {"padding_free": True, "max_length": None},
    "padding free to a multiple": {"padding_free": True, "pad_to_multiple_of": 16, "max_length": None},
    "group by length": {"train_sampling_strategy": "group_by_length"},
    "workers": {"dataloader_num_workers": 1},
    "evaluation in between": {"eval_strategy": "steps", "eval_steps": 2},
    "truncated": {"max_length": 12},
    "shuffled by the trainer": {"shuffle_dataset": True},
    "shuffled, not truncated": {"shuffle_dataset": True, "max_length": None},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "prepared by two processes": {"dataset_num_proc": 2, "shuffle_dataset": True},
}


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", PLAIN)
def test_every_row_is_seen_once_an_epoch(case: str, tmp_path: Path) -> None:
    data = user_data("text")
    noting = run(data, tmp_path, **PLAIN[case])
    check(noting, data)
    assert (noting.index.level, noting.index.note) == ("row", None)
    assert sorted(noting.seen) == list(range(ROWS))
    assert all(noting.index.describe(number).rows == (number,) for number in noting.seen)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "options", "opening"),
    [
        ("prompt", {}, "{}"),
        ("prompt", {"completion_only_loss": False}, None),
        ("chat prompt", {}, "<bos><|user|>{}<|assistant|>"),
        ("chat prompt", {"padding_free": True, "max_length": None}, "<bos><|user|>{}<|assistant|>"),
        ("chat", {"assistant_only_loss": True}, "<bos><|user|>{}<|assistant|>"),
        ("chat", {}, None),
        ("chat prompt", {"label_smoothing_factor": 0.1}, None),
    ],
)
def test_kinds_of_data_and_where_their_prompts_end(
    kind: str, options: dict[str, Any], opening: str | None, tmp_path: Path
) -> None:
    data = user_data(kind)
    noting = run(data, tmp_path, num_train_epochs=1, **options)
    check(noting, data, times=1)
    for number, example in noting.examples.items():
        if opening is None:
            assert example.prompt_end is None
        else:
            assert example.prompt_end is not None
            prompt = TOKENIZER.decode(example.tokens[: example.prompt_end + 1 - example.start])
            assert prompt == opening.format(words(number)[0])


def test_steps_hold_their_own_rows(tmp_path: Path) -> None:
    """Accumulation with an uneven tail; the order is that of the trainer's sampler, replayed."""
    noting = run(user_data("text"), tmp_path, gradient_accumulation_steps=2, data_seed=7)
    assert [len(step) for step in noting.steps] == [8, 8, 2] * EPOCHS
    order = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(7 + epoch)) for epoch in range(EPOCHS)]
    assert [row for step in noting.row_steps() for row in step] == torch.cat(order).tolist()


def test_resuming_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 1}
    whole = run(user_data("text"), tmp_path, **options)
    resumed = Noting()
    trainer = make_trainer(user_data("text"), tmp_path, resumed, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.row_steps() == whole.row_steps()[3:]
    assert resumed.steps == whole.steps[3:]  # numbers do not depend on where a run began


VIEWS: dict[str, Any] = {
    "shuffled": lambda data: data.shuffle(seed=3),
    "filtered": lambda data: data.filter(lambda row: row["serial"] % 3 != 1),
    "slice": lambda data: data.select(range(5, 14)),
    "all of it": lambda data: data.shuffle(seed=3).filter(lambda row: row["serial"] % 3 != 1).select(range(1, 11)),
    "joined": lambda data: concatenate_datasets([data.select(range(9, 18)), data.select([4, 2, 0])]),
}


@pytest.mark.parametrize(("view", "shuffle"), [*((view, False) for view in VIEWS), ("all of it", True)])
def test_rows_are_those_of_the_view_that_the_trainer_is_given(view: str, shuffle: bool, tmp_path: Path) -> None:
    data = VIEWS[view](user_data("text"))
    check(run(data, tmp_path, num_train_epochs=1, shuffle_dataset=shuffle), data, times=1)


@pytest.mark.parametrize(("max_length", "named"), [(64, False), (None, False), (None, True)])
def test_views_of_data_that_is_already_tokenized(max_length: int | None, named: bool, tmp_path: Path) -> None:
    """Without truncation the trainer writes no new table, so that mappings go below the user's view."""
    data = VIEWS["all of it"](user_data("tokens"))
    noting = Noting(user_dataset=data if named else None)
    run(data, tmp_path, noting, num_train_epochs=1, shuffle_dataset=True, max_length=max_length)
    check(noting, data, times=1)


@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_that_truncation_drops(shuffle: bool, tmp_path: Path) -> None:
    data = VIEWS["shuffled"](user_data("prompt"))
    length = 9
    kept = [row for row in range(ROWS) if len(TOKENIZER(data[row]["prompt"])["input_ids"]) < length]
    assert 0 < len(kept) < ROWS
    check(run(data, tmp_path, shuffle_dataset=shuffle, max_length=length), data, rows=kept)


def test_a_trainer_that_prepares_nothing(tmp_path: Path) -> None:
    data = VIEWS["all of it"](user_data("tokens"))
    noting = Noting()
    trainer = Trainer(
        model=tiny_model(num_hidden_layers=1),
        args=TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=3, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=data.remove_columns("labels"),
        data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
        processing_class=TOKENIZER,
        callbacks=[noting],
    )  # fmt: skip
    trainer.train()
    check(noting, data, times=1)


def documents(data: Dataset, length: int, *, split: bool) -> Counter[tuple[int, ...]]:
    """How often packing trains on rows: a slow twin. One token alone has nothing to be predicted."""
    owners: dict[tuple[int, ...], list[int]] = {}
    for row, text in enumerate(data["text"]):
        tokens = TOKENIZER(text + TOKENIZER.eos_token)["input_ids"]
        for start in range(0, len(tokens) if split else 1, length):
            owners.setdefault(tuple(tokens[start : start + length]), []).append(row)
    found: Counter[tuple[int, ...]] = Counter()
    for tokens, rows in owners.items():
        if len(tokens) > 1:
            found[tuple(sorted(set(rows)))] += len(rows)
    return found


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ({"max_length": 64, "shuffle_dataset": True}, False),
        ({"max_length": 24}, False),
        ({"max_length": 12, "packing_strategy": "bfd_split"}, True),
    ],
)
def test_documents_of_packed_rows_lead_to_the_rows_of_the_named_data(
    options: dict[str, Any], split: bool, tmp_path: Path
) -> None:
    data = VIEWS["shuffled"](user_data("text"))
    noting = Noting(user_dataset=data)
    run(data, tmp_path, noting, packing=True, num_train_epochs=1, per_device_train_batch_size=1, **options)
    assert noting.rows == documents(data, options["max_length"], split=split)
    assert noting.index.level == "row"
    assert noting.index.unknown == 0
    assert max(len(step) for step in noting.steps) > 1  # rows do hold several
    for number in noting.seen:
        pair = noting.index.describe(number)
        assert pair.text == shown(data[pair.rows[0]])
        first = data[pair.rows[0]]
        assert pair.columns.keys() == {"kind", "serial"}
        assert str(first["serial"]) in pair.columns["serial"].split(" | ")


def test_a_column_may_name_the_pairs_of_packed_rows(tmp_path: Path) -> None:
    data = user_data("text")
    noting = Noting(user_dataset=data, id_column="kind")
    run(data, tmp_path, noting, packing=True, num_train_epochs=1)
    assert noting.rows == {tuple(range(first, ROWS, 3)): 6 for first in range(3)}
    assert {noting.index.describe(number).columns["kind"] for number in noting.seen} == {"k0", "k1", "k2"}


def test_documents_without_the_users_data(tmp_path: Path) -> None:
    data = user_data("text")
    noting = run(data, tmp_path, packing=True, max_length=64, per_device_train_batch_size=1)
    assert noting.index.level == "document"
    assert "dataset=" in str(noting.index.note)
    assert "packing keeps no row numbers" in str(noting.index.note)
    assert sorted(noting.seen.values()) == [EPOCHS] * ROWS
    found = [noting.index.describe(number) for number in noting.seen]
    assert {(each.rows, each.level, len(each.columns)) for each in found} == {((), "document", 0)}
    assert sorted(str(each.text) for each in found) == sorted(f"{row['text']}<eos>" for row in data)
    assert all(each.tokens == len(noting.examples[each.id].tokens) for each in found)


def test_wrapped_packing_is_known_by_its_blocks(tmp_path: Path) -> None:
    noting = Noting(id_column="kind")
    trainer = make_trainer(user_data("text"), tmp_path, noting, packing=True, packing_strategy="wrapped", max_length=48)
    trainer.train()
    blocks = trainer.train_dataset["input_ids"]
    assert noting.index.level == "block"
    assert "wrapped packing joins and cuts rows" in str(noting.index.note)
    assert "'kind' does not reach training" in str(noting.index.note)
    assert noting.seen == dict.fromkeys(range(len(blocks)), EPOCHS)
    for number, block in enumerate(blocks):
        pair = noting.index.describe(number)
        assert (pair.rows, pair.level, pair.columns) == ((), "block", {"block": str(number)})
        assert (pair.text, pair.tokens) == (TOKENIZER.decode(block), len(block))


@pytest.mark.parametrize("named", [False, True])
def test_streams(named: bool, tmp_path: Path) -> None:
    data = user_data("text")
    noting = Noting(user_dataset=data if named else None, id_column=None if named else "serial")
    run(data.to_iterable_dataset(), tmp_path, noting, max_steps=3, per_device_train_batch_size=6)
    if named:
        check(noting, data, times=1)
        return
    assert noting.index.level == "tokens"
    assert "the data set is a stream" in str(noting.index.note)
    assert "'serial' does not reach training" in str(noting.index.note)
    assert noting.index.unknown == ROWS
    assert [number for step in noting.steps for number in step] == list(range(ROWS))  # in the order of first sight
    for number in range(ROWS):
        pair = noting.index.describe(number)
        assert (pair.rows, pair.level, pair.columns) == ((), "tokens", {})
        assert (pair.text, pair.tokens) == (f"{data[number]['text']}<eos>", len(noting.examples[number].tokens))


def test_equal_rows_are_one_pair_with_all_their_numbers(tmp_path: Path) -> None:
    """Row 18 is row 2 again, rows 19 and 20 are row 5, with other columns."""
    extra = user_data("text").select([2, 5, 5]).map(lambda row, k: {"kind": f"again {k}"}, with_indices=True)
    data = concatenate_datasets([user_data("text"), extra])
    noting = run(data, tmp_path, shuffle_dataset=True)
    expected = {(row,): EPOCHS for row in range(ROWS) if row not in (2, 5)}
    assert noting.rows == {**expected, (2, 18): 2 * EPOCHS, (5, 19, 20): 3 * EPOCHS}
    assert noting.index.note == "5 rows have the same tokens as another row: together they are 2 pairs"
    pair = noting.index.describe(5)
    assert (pair.rows, pair.text) == ((5, 19, 20), data[5]["text"])
    assert pair.columns == {"kind": "k2 | again 1 | again 2", "serial": "105"}


def test_rows_cut_to_the_same_tokens_are_one_pair(tmp_path: Path) -> None:
    data = Dataset.from_list([{"text": f"Name three rivers. {word}"} for word in ("tea", "soup", "rain")])
    noting = run(data, tmp_path, max_length=4, num_train_epochs=1)
    assert noting.rows == {(0, 1, 2): 3}


def test_a_column_may_name_the_pairs(tmp_path: Path) -> None:
    data = VIEWS["shuffled"](user_data("text"))
    noting = run(data, tmp_path, Noting(id_column="kind"), num_train_epochs=1)
    names = data["kind"]
    assert noting.index.level == "id"
    expected = {tuple(row for row in range(ROWS) if names[row] == name) for name in ("k0", "k1", "k2")}
    assert noting.rows == dict.fromkeys(expected, 6)
    for number in noting.seen:
        pair = noting.index.describe(number)
        assert (pair.level, pair.columns["kind"]) == ("id", names[pair.rows[0]])
        assert pair.text == shown(data[pair.rows[0]])
        lengths = [len(TOKENIZER(data[row]["text"] + TOKENIZER.eos_token)["input_ids"]) for row in pair.rows]
        assert pair.tokens == sum(lengths)


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"id_column is 'name'.*Allowed: one of text, kind, serial"):
        run(user_data("text"), tmp_path, Noting(id_column="name"))


def test_rows_without_a_name_stand_alone() -> None:
    data = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6], [7, 8]], "name": ["a", None, "a", None]})
    index = build_index(data, tokenizer=TOKENIZER, id_column="name")
    pairs = [index.describe(number) for number in range(len(index))]
    assert [(each.rows, each.level) for each in pairs] == [((0, 2), "id"), ((1,), "row"), ((3,), "row")]


def test_the_named_data_may_be_what_the_users_view_was_made_of(tmp_path: Path) -> None:
    data = user_data("text")
    noting = Noting(user_dataset=data)
    run(VIEWS["all of it"](data), tmp_path, noting, num_train_epochs=1)
    check(noting, data, times=1, rows=[row["serial"] - 100 for row in VIEWS["all of it"](data)])
    assert noting.index.note == "rows are found by their tokens in the data set given to the callback"


@pytest.mark.parametrize("packing", [False, True])
def test_other_data_than_what_is_trained_on_is_refused(packing: bool, tmp_path: Path) -> None:
    other = Dataset.from_list([{"text": f"Something else {k}."} for k in range(ROWS)])
    with pytest.raises(RowError, match="none of the 18 examples that are trained on is in the data set given"):
        run(user_data("text"), tmp_path, Noting(user_dataset=other), packing=packing)


def test_texts_may_be_cut_and_kept_out() -> None:
    data = user_data("text", 4)
    tokens = data.map(lambda row: TOKENIZER(row["text"]))
    cut = build_index(tokens, tokenizer=TOKENIZER, text_limit=10)
    assert cut.describe(2).text == data[2]["text"][:9] + "…"
    out = build_index(tokens, tokenizer=TOKENIZER, text=False)
    assert out.describe(2).text is None
    assert out.describe(2).columns == {"kind": "k2", "serial": "102"}
    number = out.pair_of(b"another key", np.array([1, 2, 3]))
    assert (number, out.unknown, out.describe(number).text, out.describe(number).level) == (4, 1, None, "tokens")
    assert out.pair_of(b"another key", np.array([1, 2, 3])) == number
    with pytest.raises(IndexError, match="allowed are 0 to 4"):
        out.describe(5)


def test_new_pairs_are_numbered_after_those_of_an_earlier_part_of_the_run() -> None:
    index = build_index([], tokenizer=TOKENIZER)
    index.continue_from(7)
    assert [index.pair_of(bytes([key]) * 16, [key, 1]) for key in (5, 6, 5)] == [7, 8, 7]
    assert (index.describe(8).id, index.describe(8).tokens) == (8, 2)
    with pytest.raises(IndexError):
        index.describe(6)
    with pytest.raises(ValueError, match="2 pairs have been numbered"):
        index.continue_from(9)


def test_keys_of_slices_chunks_and_every_kind_of_list() -> None:
    rows = [[k, k + 1, 400 - k] for k in range(7)]
    kinds = [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 3)]
    for kind in kinds:
        table = Dataset(pa.table({"input_ids": pa.array(rows, type=kind)}))
        view = concatenate_datasets([table.select(range(2, 6)), table.shuffle(seed=0)])
        expected = [token_key(row["input_ids"]) for row in view]
        assert read_keys(view).keys == expected
        assert read_keys(view.with_format("torch")).keys == expected


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "How?", "completion": " So.<eos>"}, "How?\n→ So."),
        ({"text": "How? So.<eos>"}, "How? So."),
        ({"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]}, "How?\n→ So."),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "How?"}]}]}, "How?"),
        ({"input_ids": [1]}, None),
    ],
)
def test_rows_as_text(row: dict[str, Any], text: str | None) -> None:
    assert row_text(row, "text", "<eos>") == text


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"packing": True, "padding_free": True}])
def test_training_is_the_same_to_the_last_bit(options: dict[str, Any], tmp_path: Path) -> None:
    data = user_data("chat prompt")
    plain = make_trainer(data, tmp_path, **options)
    plain.train()
    watched = make_trainer(data, tmp_path, Noting(user_dataset=data), **options)
    watched.train()
    weights = [dict(each.model.named_parameters()) for each in (plain, watched)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (plain, watched)]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 1


def test_no_trainer_outside_of_training() -> None:
    assert find_trainer() is None


def test_two_processes_share_the_rows(tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.helpers.pair_training"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path), "11"], cwd=root, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [[len(step) for step in steps] for steps in ranks] == [[2, 2, 2], [2, 2, 2]]
    seen = Counter(row for steps in ranks for step in steps for row in step)
    assert set(seen) == set(range(11))
    assert seen.total() == 12  # the last batch is filled up with a row from the start
