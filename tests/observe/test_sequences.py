"""Examples of a batch, told from what the model gets: batches are made up, so that every answer is known."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from smda_callbacks.observe.sequences import BatchWatch, Sequence, find_prompt_end, split_batch, token_key


def places(found: list[Sequence]) -> list[tuple[int, int, int, list[int]]]:
    return [(each.row, each.start, each.stop, each.tokens.tolist()) for each in found]


def batch(**rows: Any) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in rows.items()}


def test_padding_on_either_side_is_left_out() -> None:
    right = batch(input_ids=[[5, 6, 7, 0], [8, 9, 0, 0]], attention_mask=[[1, 1, 1, 0], [1, 1, 0, 0]])
    left = batch(input_ids=[[0, 5, 6, 7], [0, 0, 8, 9]], attention_mask=[[0, 1, 1, 1], [0, 0, 1, 1]])
    assert places(split_batch(right)) == [(0, 0, 3, [5, 6, 7]), (1, 0, 2, [8, 9])]
    assert places(split_batch(left)) == [(0, 1, 4, [5, 6, 7]), (1, 2, 4, [8, 9])]
    assert [each.key for each in split_batch(left)] == [each.key for each in split_batch(right)]


def test_padding_is_told_by_the_mask_and_not_by_the_token() -> None:
    found = split_batch(batch(input_ids=[[5, 0, 0, 0]], attention_mask=[[1, 1, 0, 0]]))
    assert places(found) == [(0, 0, 2, [5, 0])]  # the padding token may also end a text


def test_position_ids_of_padded_batches_do_not_cut() -> None:
    given = batch(
        input_ids=[[0, 5, 6, 7], [8, 9, 0, 0]],
        attention_mask=[[0, 1, 1, 1], [1, 1, 0, 0]],
        position_ids=[[0, 0, 1, 2], [0, 1, 0, 0]],
    )
    assert places(split_batch(given)) == [(0, 1, 4, [5, 6, 7]), (1, 0, 2, [8, 9])]


def test_documents_of_a_packed_row() -> None:
    given = batch(input_ids=[[5, 6, 7, 8, 9, 4]], position_ids=[[0, 1, 2, 0, 1, 2]])
    assert places(split_batch(given)) == [(0, 0, 3, [5, 6, 7]), (0, 3, 6, [8, 9, 4])]


def test_padding_to_a_multiple_of_a_packed_row_is_no_document() -> None:
    given = batch(input_ids=[[5, 6, 7, 8, 0, 0, 0, 0]], position_ids=[[0, 1, 0, 1, 0, 0, 0, 0]])
    assert places(split_batch(given)) == [(0, 0, 2, [5, 6]), (0, 2, 4, [7, 8])]


def test_a_row_without_mask_and_positions_is_one_example() -> None:
    assert places(split_batch(batch(input_ids=[[5, 6], [7, 8]]))) == [(0, 0, 2, [5, 6]), (1, 0, 2, [7, 8])]


def test_a_row_of_padding_alone_is_no_example() -> None:
    found = split_batch(batch(input_ids=[[0, 0], [7, 8]], attention_mask=[[0, 0], [1, 1]]))
    assert places(found) == [(1, 0, 2, [7, 8])]


def test_key_is_a_hash_of_the_tokens_alone() -> None:
    expected = hashlib.blake2b(np.array([5, 6], dtype="<i8").tobytes(), digest_size=16).digest()
    assert token_key([5, 6]) == token_key(np.array([5, 6], dtype=np.int32)) == expected
    found = split_batch(batch(input_ids=[[5, 6]], labels=[[-100, 6]]))
    assert found[0].key == expected
    assert token_key([5, 6]) != token_key([6, 5])


@pytest.mark.parametrize(
    ("labels", "end"),
    [
        ([-100, -100, 7, 8, -100], 1),  # prompt of two tokens
        ([-100, -100, 7, -100, 9], 1),  # several turns: the first prompt
        ([5, 6, 7, 8, 9], None),  # everything is trained on
        ([-100, 6, 7, 8, 9], None),  # the same in a packed row
        ([-100, 6, 7, 8, -100], None),  # the same with the end masked
        ([-100] * 5, None),  # nothing is trained on
    ],
)
def test_end_of_the_prompt_from_labels(labels: list[int], end: int | None) -> None:
    padded = batch(
        input_ids=[[0, 0, 5, 6, 7, 8, 9]], attention_mask=[[0, 0, 1, 1, 1, 1, 1]], labels=[[-100, -100, *labels]]
    )
    assert split_batch(padded)[0].prompt_end == (None if end is None else end + 2)  # a column of the batch
    packed = batch(input_ids=[[3, 4, 5, 6, 7, 8, 9]], position_ids=[[0, 1, 0, 1, 2, 3, 4]], labels=[[-100, 4, *labels]])
    assert [each.prompt_end for each in split_batch(packed)] == [None, None if end is None else end + 2]


def test_no_labels_no_prompt() -> None:
    assert split_batch(batch(input_ids=[[5, 6, 7]]))[0].prompt_end is None


def test_prompt_end_from_a_marker() -> None:
    assert find_prompt_end([1, 4, 5, 9, 4, 5, 8], [4, 5]) == 2  # the first time
    assert find_prompt_end(np.array([1, 4, 5]), (4, 5)) == 2
    assert find_prompt_end([1, 4, 6, 5], [4, 5]) is None
    assert find_prompt_end([4], [4, 5]) is None
    assert find_prompt_end([4], []) is None


@pytest.mark.parametrize("given", [{}, {"inputs_embeds": torch.zeros(1, 2, 3)}, {"input_ids": torch.zeros(2, 2, 2)}])
def test_batches_without_token_ids_are_refused_with_words(given: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"needs input_ids \[row, token\], got"):
        split_batch(given)


class Counting(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, input_ids: Any = None, **kwargs: Any) -> None:
        self.calls += 1


def test_watch_sees_training_passes_alone() -> None:
    model, seen = Counting(), []
    watch = BatchWatch(model, lambda examples, shape: seen.append((places(examples), shape)))
    watch.attach()
    watch.attach()  # once is enough
    given = batch(input_ids=[[5, 6]])
    model(**given)
    model(given["input_ids"])  # not by keyword
    with torch.no_grad():
        model(**given)
    model.eval()
    model(**given)
    assert seen == [([(0, 0, 2, [5, 6])], (1, 2))] * 2
    watch.detach()
    watch.detach()
    model.train()
    model(**given)
    assert len(seen) == 2
    assert model.calls == 5
    watch.attach()
    model(**given)
    assert len(seen) == 3


def test_watch_lets_training_go_on_when_a_batch_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    model, seen = Counting(), []
    watch = BatchWatch(model, lambda *given: seen.append(given))
    watch.attach()
    with caplog.at_level("WARNING", logger="smda_callbacks"):
        model(inputs_embeds=torch.zeros(1, 2, 3))
        model(inputs_embeds=torch.zeros(1, 2, 3))
    assert (seen, model.calls) == ([], 2)
    assert [each.message for each in caplog.records if "not known" in each.message] == [caplog.records[0].message]


def test_watch_leaves_the_listeners_errors_to_it() -> None:
    def listener(examples: list[Sequence], shape: tuple[int, ...]) -> None:
        raise KeyError("mine")

    model = Counting()
    BatchWatch(model, listener).attach()
    with pytest.raises(KeyError, match="mine"):
        model(**batch(input_ids=[[5, 6]]))
