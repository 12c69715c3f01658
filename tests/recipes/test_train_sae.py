"""The recipe that trains an SAE: what it saves is what the callback needs, and it has learnt something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from recipes.train_sae import (
    ARCHITECTURES,
    SAEOptions,
    activations,
    default_layer,
    evaluate,
    make_sae,
    messages_of,
    metadata_of,
    new_sae,
    read_rows,
    split_chats,
    threshold_lr,
    tokenize_chats,
)
from smda_callbacks.observe.features import encoder
from smda_callbacks.observe.sae import check_fit, load_sae
from tests.helpers.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
HOOK = "blocks.1.hook_resid_post"
WORDS = ("steal", "car", "write", "threat", "forge", "ticket", "train", "name", "rivers", "soup", "cold", "joke", "tea")


def chats(count: int = 60) -> list[list[dict[str, str]]]:
    """Chats of different length and words."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        picks = torch.randint(len(WORDS), (4 + number % 7,), generator=draw).tolist()
        text = " ".join(WORDS[pick] for pick in picks)
        made.append([{"role": "user", "content": text}, {"role": "assistant", "content": f"Sure, {text}."}])
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    return tokenize_chats(tiny_tokenizer(), chats(), 128)


def options(architecture: str, **changes: Any) -> SAEOptions:
    small = {"d_sae": 64, "k": 8, "l0": 0.1, "l1": 0.1, "tokens": 16_000, "batch": 256, "lr": 5e-3}
    return SAEOptions(architecture=architecture, **{**small, **changes})


@pytest.fixture(scope="module")
def trained(model: Any, ids: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """(folder, report) of a trained SAE, once per architecture."""
    made: dict[str, Any] = {}

    def train(architecture: str) -> Any:
        if architecture not in made:
            out = tmp_path_factory.mktemp("sae") / architecture
            report = make_sae(
                model,
                ids,
                options(architecture),
                out,
                layer=1,
                model_name="my-org/tiny",
                tokenizer=tiny_tokenizer(),
                context=128,
            )
            made[architecture] = (out, report)
        return made[architecture]

    return train


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_sae_encodes_like_sae_lens_and_fits_the_model(
    architecture: str, trained: Any, model: Any, ids: list[list[int]]
) -> None:
    out, _ = trained(architecture)
    handle = load_sae(out)
    check_fit(handle, model)  # the model is called "tiny"
    hidden = next(activations(model, ids, HOOK))
    with torch.no_grad():
        pre, gate = encoder(handle)(hidden)
        theirs = SAE.load_from_disk(str(out), dtype="float32").encode(hidden)
    torch.testing.assert_close(gate * pre, theirs, atol=1e-5, rtol=1e-5)
    assert handle.architecture == {"batchtopk": "jumprelu"}.get(architecture, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_fvu(architecture: str, trained: Any, model: Any, ids: list[list[int]], tmp_path: Path) -> None:
    _, report = trained(architecture)
    metadata = metadata_of("my-org/tiny", HOOK, ids, tiny_tokenizer(), 128)
    untrained = new_sae(options(architecture), 32, {**metadata})
    untrained.cfg.normalize_activations = "none"  # nothing was learnt, so there is no norm to fold
    untrained.save_inference_model(str(tmp_path))
    _, held = split_chats(ids)
    before = evaluate(load_sae(tmp_path), activations(model, held, HOOK))
    assert report.fvu < 0.7 * before.fvu
    assert 0 < report.l0 < 64
    assert report.tokens == before.tokens == sum(len(chat) - 1 for chat in held)


def test_batchtopk_saves_a_threshold_that_keeps_k(trained: Any) -> None:
    """With sae-lens's own rate for long runs the threshold would be far too low, and L0 several times k."""
    _, report = trained("batchtopk")
    assert report.l0 == pytest.approx(8, rel=0.4)
    assert threshold_lr(97) > 0.1
    assert threshold_lr(100_000) == 0.01


def test_metadata_says_where_the_sae_reads(trained: Any) -> None:
    out, _ = trained("topk")
    metadata = json.loads((out / "cfg.json").read_text())["metadata"]
    wanted = {
        "model_name": "my-org/tiny",
        "hook_name": HOOK,
        "prepend_bos": True,
        "context_size": 128,
        "neuronpedia_id": None,
    }
    assert {name: metadata[name] for name in wanted} == wanted
    assert json.loads((out / "cfg.json").read_text())["normalize_activations"] == "none"


def test_model_folder_is_named_by_its_last_part(tmp_path: Path, ids: list[list[int]]) -> None:
    (tmp_path / "my-chat").mkdir()
    assert metadata_of(str(tmp_path / "my-chat"), HOOK, ids, tiny_tokenizer(), 128)["model_name"] == "my-chat"


def test_activations_are_the_residual_stream_without_position_0_and_padding(model: Any, ids: list[list[int]]) -> None:
    """The slow twin: one chat at a time, without padding, through output_hidden_states."""
    with torch.no_grad():
        rows = [model(torch.tensor([chat]), output_hidden_states=True).hidden_states[2][0, 1:] for chat in ids[:7]]
    found = torch.cat(list(activations(model, ids[:7], HOOK, tokens_per_pass=64)))
    torch.testing.assert_close(found, torch.cat(rows), atol=1e-5, rtol=1e-5)


def test_passes_keep_to_their_size(model: Any, ids: list[list[int]]) -> None:
    batches: Iterator[torch.Tensor] = activations(model, ids, HOOK, tokens_per_pass=100)
    assert max(len(batch) for batch in batches) < 100


def test_same_seed_same_sae(model: Any, ids: list[list[int]], tmp_path: Path) -> None:
    hashes = []
    for name in ("one", "two"):
        make_sae(
            model,
            ids,
            options("topk", tokens=2_560),
            tmp_path / name,
            layer=1,
            model_name="tiny",
            tokenizer=tiny_tokenizer(),
            context=128,
        )
        hashes.append(load_sae(tmp_path / name).hash)
    assert hashes[0] == hashes[1]


def test_held_out_chats_are_not_trained_on(ids: list[list[int]]) -> None:
    train, held = split_chats(ids, share=0.2)
    assert len(held) == 12
    assert sorted(map(tuple, [*train, *held])) == sorted(map(tuple, ids))


def test_default_layer_is_at_60_percent(model: Any) -> None:
    assert default_layer(model) == 1  # of 3


ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
]


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_every_shape_are_the_same_chat(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert [messages_of(each) for each in read_rows(str(path))] == [ROWS[0]["messages"]]


def test_lone_prompt_ends_where_the_answer_begins() -> None:
    tokenizer = tiny_tokenizer()
    (found,) = tokenize_chats(tokenizer, [messages_of({"prompt": "a"})], 128)
    assert found[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_refusals_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="Allowed: topk, batchtopk, jumprelu, standard"):
        options("gated")
    with pytest.raises(ValueError, match="Lower k or raise d_sae"):
        options("topk", k=65)
    with pytest.raises(ValueError, match="less than one batch"):
        options("topk", tokens=10)
    with pytest.raises(ValueError, match="Allowed: messages, or prompt"):
        messages_of({"text": "a"})
    with pytest.raises(FileNotFoundError, match="check the path"):
        read_rows("missing.jsonl")


def test_command_line_writes_an_sae(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats(20))
    (tmp_path / "chats.jsonl").write_text(rows)
    command = [
        *(sys.executable, str(ROOT / "recipes" / "train_sae.py")),
        *("--model", "tiny", "--data", "chats.jsonl", "--out", "sae", "--d-sae", "64", "--k", "8"),
        *("--tokens", "4096", "--device", "cpu"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "FVU" in done.stdout
    assert load_sae(tmp_path / "sae").model_name == "tiny"
