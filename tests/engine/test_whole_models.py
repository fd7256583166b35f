"""Real models by the engine's own parts: perplexity beside llama.cpp's, greedy tokens beside a float32 reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from engine.files import gguf
from engine.text import tokenizer
from tests.engine.conftest import CACHE
from tests.engine.gemma_reference import GREEDY, TEXTS
from tests.engine.whole_model import ask

pytestmark = [pytest.mark.model, pytest.mark.process]
PASSAGE = 320  # tokens of texts/alice.txt
LLAMA_CPP_NLL = 1032.5420  # of 319 of them


def test_smollm2_predicts_a_text_as_well_as_llama_cpp(model_path: Path) -> None:
    """Perplexity within 1 %.

    llama.cpp's figure is that of llama-cpp-python 0.3.36 on an x86 processor with AVX-512 (it computes with 8-bit
    activations, a little differently on others), asked for by

        from tests.bench.engine.contenders import llama; from tests.bench.engine.models import smollm2
        ids = smollm2().vocabulary().encode(open("tests/engine/texts/alice.txt").read())[:320]
        with llama(smollm2()) as server: print(server.ask("nll", tokens=ids))
    """
    vocabulary = tokenizer.from_gguf(gguf.read(model_path))
    tokens = vocabulary.encode((TEXTS / "alice.txt").read_text())[:PASSAGE]
    answer = ask(model_path, "llama", CACHE, {"nll": tokens})
    assert answer["count"] == PASSAGE - 1
    ours, theirs = (math.exp(nll / answer["count"]) for nll in (answer["nll"], LLAMA_CPP_NLL))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_gemma_3_has_the_tokens_of_a_float32_reference(gemma_path: Path) -> None:
    """Four short prompts, and one that is longer than the window of most layers."""
    known = json.loads(GREEDY.read_text())
    question = {
        "greedy": [one["prompt"] for one in known],
        "tokens": max(len(one["greedy"]) for one in known),
    }
    answers = ask(gemma_path, "gemma3", CACHE, question)["greedy"]
    for one, tokens in zip(known, answers, strict=True):
        assert tokens[: len(one["greedy"])] == one["greedy"]
