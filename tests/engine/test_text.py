"""Tokenizer, chat template, detokenising, sampling and stop strings: no device needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batching.sampling import Sampler, StopStrings
from engine.counting import Counter
from engine.errors import LoadError, RunError
from engine.files import gguf
from engine.protocol import CountTokens
from engine.text import tokenizer
from engine.text.chat import prompt_tokens, render
from engine.text.tokenizer import Vocabulary
from tests.engine.small_gguf import write


@pytest.fixture(scope="module")
def vocabulary(model_path: Path) -> Vocabulary:
    return tokenizer.from_gguf(gguf.read(model_path))


def decode(vocabulary: Vocabulary, tokens: list[int]) -> str:
    detokenizer = vocabulary.detokenizer()
    return "".join(map(detokenizer.push, tokens)) + detokenizer.finish()


def test_known_tokens(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode("<|im_start|>user\nThe capital of France is") == [
        1,
        4093,
        198,
        504,
        3575,
        282,
        4649,
        314,
    ]
    assert vocabulary.encode("12") == [*vocabulary.encode("1"), *vocabulary.encode("2")]
    assert vocabulary.ends == {0, 2}
    assert vocabulary.context_max == 8192


def test_round_trip_of_any_text(vocabulary: Vocabulary) -> None:
    known = {byte for piece in vocabulary.pieces if len(piece) == 1 for byte in piece}

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=80))
    def check(text: str) -> None:
        if "<" not in text and known.issuperset(text.encode()):  # SmolLM2 has no token for some rare bytes
            assert decode(vocabulary, vocabulary.encode(text)) == text

    check()


def test_a_split_character_comes_when_it_is_whole(vocabulary: Vocabulary) -> None:
    tokens = vocabulary.encode("\U0001f9ec")
    assert len(tokens) > 1
    detokenizer = vocabulary.detokenizer()
    assert [detokenizer.push(token) for token in tokens] == [""] * (len(tokens) - 1) + ["\U0001f9ec"]
    detokenizer = vocabulary.detokenizer()
    detokenizer.push(tokens[0])
    assert detokenizer.finish() == "\ufffd"


def test_chat_template(vocabulary: Vocabulary) -> None:
    text = render(vocabulary, {"prompt": "Hi"})
    assert text == render(vocabulary, {"messages": [{"role": "user", "content": "Hi"}]})
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    tokens = prompt_tokens(vocabulary, {"prompt": "Hi"})
    assert tokens[0] == 1
    with pytest.raises(RunError):
        render(vocabulary, {"prompt": "a", "messages": []})
    with pytest.raises(RunError):
        render(vocabulary, {})
    with pytest.raises(RunError, match="template"):
        render(vocabulary, {"messages": [{"role": "user"}]})


def test_counting_needs_the_file_only(model_path: Path, tmp_path: Path) -> None:
    counter = Counter()
    ask = CountTokens(request_id="r", path=str(model_path), family="llama", parameters={"prompt": "Hi"})
    counted = counter.count(ask)
    assert (counted.tokens, counted.context, counted.error) == (31, 8192, "")
    missing = CountTokens(
        request_id="r", path=str(tmp_path / "x"), family="llama", parameters={"prompt": "Hi"}
    )
    assert counter.count(missing).tokens == -1
    assert counter.count(missing).error


def sentencepiece_file(folder: Path, **changes: object) -> Path:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    words = ["\u2581", "a", "b", "c", "ab", "bc", "\u2581a", "\u2581ab", "\u2581abc"]
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": names + words,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(9, 0, -1)],
        "tokenizer.ggml.token_type": kinds + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return write(folder / "sp.gguf", metadata | changes, {})


def test_sentencepiece(tmp_path: Path) -> None:
    vocabulary = tokenizer.from_gguf(gguf.read(sentencepiece_file(tmp_path)))
    tokens = vocabulary.encode("abc é")
    assert [vocabulary.names[token] for token in tokens] == ["<s>", "\u2581abc", "\u2581", "<0xC3>", "<0xA9>"]
    assert decode(vocabulary, tokens) == "abc é"
    assert vocabulary.ends == {2}


def test_unknown_tokenizers_are_refused(tmp_path: Path) -> None:
    for changes in (
        {"tokenizer.ggml.model": "t5"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"},
    ):
        with pytest.raises(LoadError) as caught:
            tokenizer.from_gguf(gguf.read(sentencepiece_file(tmp_path, **changes)))
        assert caught.value.code == "unsupported_tokenizer"


LOGITS = np.array([0.0, 3.0, 2.0, 1.0, -5.0], dtype=np.float32)


def draws(count: int = 300, prompt: tuple[int, ...] = (), **parameters: object) -> set[int]:
    sampler = Sampler({"seed": 7, **parameters}, prompt)
    return {sampler.choose(LOGITS) for _ in range(count)}


def test_sampling() -> None:
    assert draws(temperature=0) == {1}
    assert draws(temperature=100.0) == {0, 1, 2, 3, 4}
    assert draws(temperature=100.0, top_k=2) == {1, 2}
    assert draws(temperature=1.0, top_p=0.5) == {1}
    assert draws(temperature=1.0, top_p=0.85) == {1, 2}
    assert draws(temperature=1.0, top_k=3, top_p=0.7) == {1, 2}
    assert draws(count=1, temperature=0, repetition_penalty=2.0, prompt=(1,)) == {2}
    assert LOGITS[1] == 3.0


def test_frequencies_follow_the_softmax() -> None:
    sampler = Sampler({"seed": 1, "temperature": 1.0})
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(20_000)], minlength=5) / 20_000
    softmax = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert np.abs(counts - softmax).max() < 0.02


def test_a_seed_repeats() -> None:
    first, second = (Sampler({"seed": 3, "temperature": 5.0}) for _ in range(2))
    assert [first.choose(LOGITS) for _ in range(50)] == [second.choose(LOGITS) for _ in range(50)]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 2}, {"top_k": "x"}, {"repetition_penalty": 0}]
)
def test_senseless_parameters(bad: dict[str, object]) -> None:
    with pytest.raises(RunError):
        Sampler(bad)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_in_any_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    wanted = min([text.find(stop) for stop in stops if stop in text], default=len(text))
    filter_, given_, left = StopStrings(stops), "", text
    stopped = False
    while left and not stopped:
        cut = data.draw(st.integers(1, len(left)))
        part, stopped = filter_.push(left[:cut])
        given_, left = given_ + part, left[cut:]
    if not stopped:
        given_ += filter_.finish()
    if len(stops) <= 1:
        assert given_ == text[:wanted]
    assert not any(stop in given_ for stop in stops)
