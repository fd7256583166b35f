"""Sampling beside a plain implementation that does one thing after the other on whole distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batching.sampling import Sampler, drawn
from engine.errors import RunError
from engine.protocol import Frames, Logprobs, TokenLogprob, Tokens, encode

VOCABULARY = 12


def plain(logits: list[float], given: dict[str, Any], prompt: list[int], text: list[int]) -> list[float]:
    """Probabilities by the definitions, in lists."""
    values = [value + given["logit_bias"].get(token, 0.0) for token, value in enumerate(logits)]
    for token in set(prompt + text):
        factor = given["repetition_penalty"]
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    for token in set(text):
        values[token] -= given["frequency_penalty"] * text.count(token) + given["presence_penalty"]
    if given["temperature"] == 0:
        best = values.index(max(values))
        return [float(token == best) for token in range(len(values))]
    order = sorted(range(len(values)), key=lambda token: -values[token])
    if given["top_k"]:
        order = order[: given["top_k"]]
    weights = {token: math.exp((values[token] - max(values)) / given["temperature"]) for token in order}
    total = sum(weights.values())
    kept, reached = [], 0.0
    for token in order:
        kept.append(token)
        reached += weights[token] / total
        if reached >= given["top_p"]:
            break
    kept = [token for token in kept if weights[token] >= given["min_p"] * weights[order[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(values))]


parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 50]),
        "top_p": st.sampled_from([1.0, 0.9, 0.55]),
        "min_p": st.sampled_from([0.0, 0.03, 0.31]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -1.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, 2.5]), max_size=3
        ),
    }
)
# distinct by more than rounding, so that no tie decides
distinct = st.permutations([round(-4 + 0.713 * index, 3) for index in range(VOCABULARY)])
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)


@settings(max_examples=300, deadline=None)
@given(distinct, parameters, tokens, tokens)
def test_equal_to_the_plain_implementation(
    logits: list[float], given_: dict[str, Any], prompt: list[int], text: list[int]
) -> None:
    sampler = Sampler(given_ | {"logit_bias": {str(t): b for t, b in given_["logit_bias"].items()}}, prompt)
    for token in text:  # each was chosen before: a bias that nothing else comes near
        forced = np.full(VOCABULARY, -1e6, dtype=np.float32)
        forced[token] = 1e6
        assert sampler.choose(forced) == token
    values = np.array(logits, dtype=np.float32)
    before = values.copy()
    np.testing.assert_allclose(
        sampler.probabilities(values), plain(logits, given_, prompt, text), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(values, before)


class Mask:
    """A grammar that allows the same tokens each time, and is complete after so many."""

    def __init__(self, allowed: list[int], length: int = 99) -> None:
        self._allowed, self._left = np.array(sorted(allowed)), length

    def allowed(self) -> np.ndarray:
        return self._allowed

    def push(self, token: int) -> bool:
        assert token in self._allowed
        self._left -= 1
        return self._left <= 0


@settings(max_examples=200, deadline=None)
@given(distinct, parameters, st.sets(st.integers(0, VOCABULARY - 1), min_size=1))
def test_a_grammar_leaves_what_it_allows_as_if_there_were_nothing_else(
    logits: list[float], given_: dict[str, Any], allowed: set[int]
) -> None:
    given_ = given_ | {"logit_bias": {}}
    values = np.array(logits, dtype=np.float32)
    right = plain([v if t in allowed else -1e9 for t, v in enumerate(logits)], given_, [], [])
    sampler = Sampler(given_, grammar=Mask(list(allowed)))
    np.testing.assert_allclose(sampler.probabilities(values), right, rtol=1e-4, atol=1e-6)
    assert all(sampler.choose(values) in allowed for _ in range(20))


def test_a_sampler_is_complete_when_its_grammar_is() -> None:
    sampler = Sampler({"temperature": 0}, grammar=Mask([3, 5], length=2))
    values = np.arange(VOCABULARY, dtype=np.float32)
    assert (sampler.choose(values), sampler.complete) == (5, False)
    assert (sampler.choose(values), sampler.complete) == (5, True)
    free = Sampler({"temperature": 0})
    assert (free.choose(values), free.complete) == (VOCABULARY - 1, False)


def test_who_asks_for_the_likeliest_tokens_wants_logprobs() -> None:
    assert Sampler({"top_logprobs": 3}).top_logprobs == 3
    assert Sampler({"logprobs": True}).top_logprobs == 0
    assert Sampler({"logprobs": False, "top_logprobs": 0}).top_logprobs is None


def test_draws_follow_the_probabilities() -> None:
    values = np.random.default_rng(2).standard_normal(VOCABULARY).astype(np.float32)
    sampler = Sampler({"seed": 5, "temperature": 0.9, "top_k": 9, "top_p": 0.95, "min_p": 0.05})
    counts = np.bincount([sampler.choose(values) for _ in range(20_000)], minlength=VOCABULARY) / 20_000
    right = sampler.probabilities(values)
    assert np.abs(counts - right).max() < 0.02
    assert not counts[right == 0].any()


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.0])
def test_a_whole_vocabulary(top_p: float) -> None:
    """Probabilities and draws are those of the plain way, over as many tokens as models have."""
    random = np.random.default_rng(6)
    logits = (random.standard_normal(49_152) * 3).astype(np.float32)
    logits[-20_000:] = -300.0  # too unlikely for a float32
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-weights, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum())) + 1]
    right = np.zeros(len(logits))
    right[kept] = weights[kept] / weights[kept].sum()
    sampler = Sampler({"temperature": 1.0, "top_p": top_p})
    np.testing.assert_allclose(sampler.probabilities(logits), right, rtol=1e-4, atol=1e-9)
    found = right.astype(np.float32)
    reached = np.cumsum(found, dtype=np.float64)
    for chance in (0.0, *random.random(200), 1 - 2**-53):
        token = drawn(found, chance)
        assert found[token] > 0
        assert reached[token] - found[token] - 1e-9 <= chance * reached[-1] <= reached[token] + 1e-9


@given(distinct, st.integers(0, 20), st.integers(0, VOCABULARY - 1))
def test_logprobs(logits: list[float], count: int, token: int) -> None:
    sampler = Sampler({"logprobs": True, "top_logprobs": count, "temperature": 0.1, "presence_penalty": 1})
    own, best = sampler.logprobs(np.array(logits, dtype=np.float32), token)
    total = math.log(sum(math.exp(value) for value in logits))
    assert own == pytest.approx(logits[token] - total, abs=1e-5)
    order = sorted(range(VOCABULARY), key=lambda token: -logits[token])
    assert [each for each, _ in best] == order[:count]
    assert [value for _, value in best] == pytest.approx([logits[t] - total for t in order[:count]], abs=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"min_p": 1.5},
        {"min_p": True},
        {"presence_penalty": -2.1},
        {"frequency_penalty": "much"},
        {"frequency_penalty": math.nan},
        {"logit_bias": [1]},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"\u0663": 1}},
        {"logit_bias": {"12": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {str(token): 1 for token in range(1025)}},
        {"logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": 1.5},
        {"top_logprobs": 0.5},
    ],
)
def test_senseless_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(RunError) as caught:
        Sampler(bad, tokens=VOCABULARY)
    assert caught.value.code == "bad_parameters"


def test_logprobs_cross_the_socket() -> None:
    one = Logprobs(TokenLogprob("\ufffd", b"\xf0", -0.5), [TokenLogprob("a", b"a", -1.0)])
    sent = Tokens(run_id="r", text="", count=1, logprobs=[one])
    assert Frames("peer").feed(encode(sent)) == [sent]
    old = Tokens(run_id="r", text="", count=1)
    assert Frames("peer").feed(encode(old)) == [old]
