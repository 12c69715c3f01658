"""The tree of openings scores what the openings alone would score, and refuses what cannot be told apart."""

from __future__ import annotations

import numpy as np
import pytest

from smda_callbacks.observe.batches import answer_lead, chat_prompt, response_encoder
from smda_callbacks.observe.behaviour import OpeningScorer, openings_of, prefix_probability, score, scorer
from smda_callbacks.observe.prefixes import (
    COMPLIANCES,
    REFUSALS,
    PrefixError,
    build_tree,
    check_prefix_free,
    shared_first_tokens,
)
from smda_callbacks.observe.probes import ProbeError
from tests.helpers.tiny import tiny_tokenizer

TOKENS = {"I cannot": [1, 2], "I can't": [1, 3, 4], "Sorry": [5, 6], "Sure": [5, 7], "I": [1], "I can": [1, 3], "": []}


def encode(text: str) -> list[int]:
    return TOKENS[text]


def test_shared_beginnings_are_scored_once() -> None:
    tree = build_tree(["I cannot", "I can't", "Sorry"], encode)
    assert tree.tokens == (-1, 1, 3, 5)  # inner nodes only: the last token of an opening is read, not fed
    assert tree.parents == (-1, 0, 1, 0)
    assert tree.depths == (0, 1, 2, 1)
    assert list(zip(tree.edge_nodes, tree.edge_tokens, strict=True)) == [(0, 1), (1, 2), (1, 3), (2, 4), (0, 5), (3, 6)]
    assert tree.paths == ((0, 1), (0, 2, 3), (4, 5))
    assert tree.ancestors(2) == [1, 2]


def test_probability_of_openings_by_hand() -> None:
    """A made-up language with known conditional probabilities."""
    tree = build_tree(["I cannot", "I can't", "Sorry"], encode)
    conditional = {(0, 1): 0.5, (1, 2): 0.4, (1, 3): 0.2, (2, 4): 0.9, (0, 5): 0.1, (3, 6): 0.25}
    edges = np.log([conditional[pair] for pair in zip(tree.edge_nodes, tree.edge_tokens, strict=True)])
    log_probs = np.array([[edges[list(path)].sum() for path in tree.paths]])
    np.testing.assert_allclose(np.exp(log_probs), [[0.2, 0.09, 0.025]])
    refusal = prefix_probability("refusal", tree.openings)
    np.testing.assert_allclose(score([refusal], tree, log_probs), [[0.315]])
    np.testing.assert_allclose(score([refusal], tree, log_probs, "logit"), [[np.log(0.315 / 0.685)]])


def test_a_behaviour_needs_one_function() -> None:
    tree = build_tree(["I cannot", "Sorry"], encode)

    @scorer("curt", openings=("Sorry",))
    def curt(log_probs: np.ndarray) -> np.ndarray:
        return np.exp(log_probs[:, 0])

    both = [prefix_probability("refusal", ("I cannot", "Sorry")), curt]
    assert openings_of(both) == ["I cannot", "Sorry"]
    y = score(both, tree, np.log([[0.2, 0.1], [0.5, 0.4]]))
    np.testing.assert_allclose(y, [[0.3, 0.1], [0.9, 0.4]])


def test_wrong_scorers_are_refused() -> None:
    tree = build_tree(["Sorry"], encode)
    with pytest.raises(ValueError, match=r"'refusal' needs openings \['I cannot'\] that were not read"):
        score([prefix_probability("refusal", ("I cannot",))], tree, np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"'odd' returned shape \(2, 1\); expected \(2,\)"):
        score([OpeningScorer("odd", ("Sorry",), lambda log_probs: log_probs)], tree, np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"refusal": []}, r"list of refusal openings is empty.*Next step"),
        ({"refusal": ["I cannot", "I"]}, r"'I cannot' \(refusal\) and 'I' \(refusal\) overlap.*keep the shorter"),
        ({"refusal": ["I can", "I can't"]}, r"'I can' .* and \"I can't\" .* overlap"),
        ({"refusal": ["Sorry", "Sorry"]}, r"'Sorry' .* and 'Sorry' .* overlap"),
        ({"refusal": ["Sorry"], "compliance": ["Sorry"]}, r"\(refusal\) and 'Sorry' \(compliance\) overlap"),
    ],
)
def test_overlapping_openings_are_refused(lists: dict[str, list[str]], message: str) -> None:
    with pytest.raises(PrefixError, match=message):
        check_prefix_free(lists, encode)


def test_openings_without_tokens_and_empty_lists_are_refused() -> None:
    with pytest.raises(PrefixError, match="list of openings is empty"):
        build_tree([], encode)
    with pytest.raises(PrefixError, match=r"opening '' has no tokens"):
        build_tree(["Sorry", ""], encode)


def test_shared_first_tokens_are_reported_across_lists_only() -> None:
    found = shared_first_tokens({"refusal": ["Sorry", "I cannot", "I can't"], "compliance": ["Sure"]}, encode)
    assert found == ["refusal 'Sorry' and compliance 'Sure'"]


def test_the_default_lists_are_prefix_free_and_known_to_be_ambiguous_by_first_token() -> None:
    tokenizer = tiny_tokenizer()
    encode_here = response_encoder(tokenizer, chat_prompt(tokenizer, "Hello there."))
    check_prefix_free({"refusal": REFUSALS, "compliance": COMPLIANCES}, encode_here)
    lowered = [text.lower() for text in REFUSALS + COMPLIANCES]
    assert len(set(lowered)) == len(lowered)


def test_an_opening_that_merges_with_the_template_is_refused() -> None:
    class Merging:
        """A tokenizer of whole words: text that does not start with a space becomes part of the last word."""

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [hash(word) for word in text.split(" ")]}

    assert len(response_encoder(Merging(), "say:")(" Sorry")) == 1
    with pytest.raises(ProbeError, match=r"'Sorry' is not representable behind this chat template"):
        response_encoder(Merging(), "say:")("Sorry")


def test_openings_stand_behind_what_the_template_puts_before_an_answer() -> None:
    """Llama-2 style: training answers begin with a space, so that is where openings are scored."""
    tokenizer = tiny_tokenizer()
    assert answer_lead(tokenizer, "Hello.") == ""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} <eos>{% endif %}{% endfor %}"
    )
    assert answer_lead(tokenizer, "Hello.") == " "
    prompt = chat_prompt(tokenizer, "Hello.")
    whole = tokenizer(prompt + " Sorry", add_special_tokens=False)["input_ids"]
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert response_encoder(tokenizer, prompt, " ")("Sorry") == whole[len(head) :]
