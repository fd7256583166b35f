"""Both tokenizers beside llama.cpp's own, and texts back from tokens: on the nasty texts of tests.engine.corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.files import gguf
from engine.text import tokenizer
from engine.text.tokenizer import Vocabulary
from tests.engine import corpus

TEXTS = corpus.texts()


@pytest.fixture(scope="module")
def smollm2(model_path: Path) -> Vocabulary:
    return tokenizer.from_gguf(gguf.read(model_path))


@pytest.fixture(scope="module")
def gemma3(gemma_path: Path) -> Vocabulary:
    return tokenizer.from_gguf(gguf.read(gemma_path))


def tokens(vocabulary: Vocabulary, text: str) -> list[int]:
    """Without a begin token."""
    ids: list[int] = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def back(vocabulary: Vocabulary, ids: list[int]) -> str:
    detokenizer = vocabulary.detokenizer()
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


def wrong(vocabulary: Vocabulary, name: str) -> list[str]:
    """Texts that llama.cpp has other tokens for."""
    return [
        ascii(text)[:80]
        for text, ids in zip(TEXTS, corpus.known(name), strict=True)
        if tokens(vocabulary, text) != ids
    ]


def test_the_corpus_has_all_planes_and_long_runs() -> None:
    assert {ord(character) >> 16 for text in TEXTS for character in text} == set(range(17))
    assert sum(len(text) >= 150 for text in TEXTS) >= 17
    assert len(set(TEXTS)) == len(TEXTS)


def test_smollm2_has_llama_cpp_s_tokens(smollm2: Vocabulary) -> None:
    assert wrong(smollm2, "SmolLM2-135M") == []


def test_gemma_3_has_llama_cpp_s_tokens(gemma3: Vocabulary) -> None:
    assert wrong(gemma3, "Gemma 3 270M") == []


def test_smollm2_gives_texts_back(smollm2: Vocabulary) -> None:
    """All but control tokens' names and characters with bytes that it has no token for."""
    bytes_known = {piece[0] for piece in smollm2.pieces if len(piece) == 1}
    given = [text for text in TEXTS if bytes_known.issuperset(text.encode()) and "<|" not in text]
    assert len(given) > 100
    assert [text for text in given if back(smollm2, tokens(smollm2, text)) != text] == []


def test_gemma_3_gives_texts_back(gemma3: Vocabulary) -> None:
    """All but control tokens' names and the character that SentencePiece has for a space."""
    given = [text for text in TEXTS if "<eos>" not in text and "\u2581" not in text]
    assert [text for text in given if back(gemma3, tokens(gemma3, text)) != text] == []
