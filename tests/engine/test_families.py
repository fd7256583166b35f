"""Every family beside `transformers`: the same logits and greedy tokens from GGUF files and from folders.

The references were computed once (families/make.py says how); one process computes all of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import open_checkpoint, vocabulary_of
from engine.text.chat import render
from tests.engine.conftest import CACHE
from tests.engine.devices import environment, found_by
from tests.engine.family_checks import CASES, FIXTURES

# Largest difference of any logit, in standard deviations of the logits; measured: 8e-5 and 0.06
TOLERANCE = {"float32": 2e-4, "float16": 0.15}
NASTY: list[str] = json.loads((FIXTURES / "nasty.json").read_text())


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("families") / "measured.json"
    return found_by("family_checks", [str(out)], out, environment(CACHE / "families.db"))


@pytest.mark.process
@pytest.mark.parametrize("fixture", CASES)
def test_same_logits_and_tokens_as_the_reference(fixture: str, measured: dict[str, Any]) -> None:
    ours = {name: result for name, result in measured.items() if name.split("/")[0] == fixture}
    assert {name.split("/")[1] for name in ours} >= {"folder"}
    for name, result in ours.items():
        assert "error" not in result, (name, result)
        allowed = TOLERANCE[name.split("/")[2]]
        wrong = {way: error for way, error in result["worst"].items() if not error < allowed}
        assert not wrong, (name, wrong)
        assert all(result["greedy"].values()), (name, result["greedy"])
        ways = {"prefill", "decode", "inner", "chunks of 7", "one by one", "batched", "churn"}
        assert ways | {"reused", "copied", "guessed"} <= result["worst"].keys()


@pytest.mark.process
def test_a_file_with_a_tensor_for_each_expert_is_the_same_model(measured: dict[str, Any]) -> None:
    apart, stacked = (measured[f"mixtral/{kind}/float16"] for kind in ("gguf, experts apart", "gguf"))
    assert apart["worst"] == pytest.approx(stacked["worst"], rel=1e-6)


@pytest.mark.process
def test_the_comparison_would_notice(measured: dict[str, Any]) -> None:
    """Each peculiarity left out, one at a time, is far outside the tolerance."""
    broken = measured["broken"]
    assert len(broken) >= 10
    unnoticed = {what: error for what, error in broken.items() if not error > 20 * TOLERANCE["float32"]}
    assert not unnoticed


def expected(fixture: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / fixture / "expected.json").read_text())
    return found


@pytest.mark.parametrize("fixture", CASES)
def test_folder_tokenizers_equal_the_reference(fixture: str) -> None:
    vocabulary = vocabulary_of(open_checkpoint(FIXTURES / fixture))
    right = expected(fixture)
    for text, ids in zip(NASTY, right["ids"], strict=True):
        assert vocabulary.encode(text) == ids, text
        detokenizer = vocabulary.detokenizer()
        back = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
        if not text.startswith(" ") and "\u2581" not in text and "<|im" not in text:
            assert back == text
    assert render(vocabulary, {"prompt": "Hi there"}) == right["chat"]


@pytest.mark.parametrize("fixture", CASES)
def test_gguf_tokenizers_equal_the_reference(fixture: str) -> None:
    """Equal to SentencePiece where the family has it; it knows no special tokens in texts."""
    vocabulary = vocabulary_of(open_checkpoint(FIXTURES / fixture / "model.gguf"))
    right = expected(fixture)
    for text, ids in zip(NASTY, right["gguf_ids"], strict=True):
        if "<|im_start|>" not in text:
            assert vocabulary.encode(text) == ids, text
    assert render(vocabulary, {"prompt": "Hi there"}) == right["chat"]


@pytest.mark.parametrize("fixture", CASES)
def test_both_formats_end_alike(fixture: str) -> None:
    both = [vocabulary_of(open_checkpoint(FIXTURES / fixture / file)) for file in (Path("."), "model.gguf")]
    assert both[0].ends == both[1].ends
    assert both[0].ends
