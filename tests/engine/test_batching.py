"""What goes into each step, against a model that is a function: no device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import gguf, tokenizer
from engine.batching import Batcher, DeviceFault, Row
from engine.protocol import Finished, Message, Run, RunFailed, Started, Tokens
from engine.tokenizer import Vocabulary


class Successor:
    """Says that the token after n is n + 1; checks that each slot is filled in order, from 0, without gaps."""

    slots, context, rows_max = 3, 200, 16

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._filled: dict[int, int] = {}
        self.steps: list[list[Row]] = []
        self.broken = False

    def step(self, rows: Sequence[Row], wanted: Sequence[int]) -> np.ndarray:
        assert 0 < len(rows) <= self.rows_max
        self.steps.append(list(rows))
        for row in rows:
            assert row.position in (0, self._filled.get(row.slot, 0))
            self._filled[row.slot] = row.position + 1
        logits = np.zeros((len(wanted), self._vocabulary), dtype=np.float32)
        for index, row in enumerate(wanted):
            logits[index, (rows[row].token + 1) % self._vocabulary] = 1
        return logits * np.float32("nan") if self.broken else logits


@pytest.fixture(scope="module")
def vocabulary(model_path: Path) -> Vocabulary:
    return tokenizer.from_gguf(gguf.read(model_path))


@pytest.fixture
def model(vocabulary: Vocabulary) -> Successor:
    return Successor(len(vocabulary.names))


@pytest.fixture
def batcher(model: Successor, vocabulary: Vocabulary) -> Batcher:
    return Batcher(model, vocabulary)


def run(run_id: str, **parameters: Any) -> Run:
    given = {"prompt": "Hi", "temperature": 0, "max_tokens": 5, **parameters}
    return Run(run_id=run_id, model="m", task_type="text_generation", parameters=given)


def until_done(batcher: Batcher, steps_max: int = 500) -> list[Message]:
    messages: list[Message] = []
    for _ in range(steps_max):
        if not batcher.busy:
            return messages
        messages += batcher.step(room=99)
    raise AssertionError("it does not end")


def test_many_runs_share_few_slots(batcher: Batcher, model: Successor) -> None:
    for number in range(10):
        assert batcher.add(run(f"r{number}", max_tokens=number + 1)) == []
    messages = until_done(batcher)
    ends = {m.run_id: m for m in messages if isinstance(m, Finished)}
    assert [ends[f"r{n}"].tokens_generated for n in range(10)] == list(range(1, 11))
    assert {m.reason for m in ends.values()} == {"length"}
    assert [m.run_id for m in messages if isinstance(m, Started)] == [f"r{n}" for n in range(10)]


def test_decoding_goes_on_while_a_long_prompt_is_read(batcher: Batcher, model: Successor) -> None:
    batcher.add(run("short", max_tokens=30))
    while not any(isinstance(m, Tokens) for m in batcher.step(99)):
        pass
    batcher.add(run("long", prompt="word " * 120))
    before = len(model.steps)
    messages: list[Message] = []
    while not any(isinstance(m, Tokens) and m.run_id == "long" for m in messages):
        messages += batcher.step(99)
    steps = len(model.steps) - before
    assert steps > 5
    assert sum(isinstance(m, Tokens) and m.run_id == "short" for m in messages) == steps


def test_two_prompts_take_turns(batcher: Batcher, model: Successor) -> None:
    batcher.add(run("a", prompt="word " * 120))
    batcher.add(run("b", prompt="word " * 20))
    messages: list[Message] = []
    while not any(isinstance(m, Tokens) for m in messages):
        messages += batcher.step(99)
    assert next(m.run_id for m in messages if isinstance(m, Tokens)) == "b"


def test_cancel_frees_the_slot_at_once(batcher: Batcher) -> None:
    for number in range(4):
        batcher.add(run(f"r{number}", max_tokens=50))
    batcher.step(99)
    assert batcher.active == 3
    for run_id in ("r3", "r0"):
        (finished,) = batcher.cancel(run_id)
        assert isinstance(finished, Finished)
        assert finished.reason == "cancelled"
    assert batcher.active == 2
    assert batcher.cancel("r0") == []


def test_room_on_the_device_is_kept(batcher: Batcher) -> None:
    for number in range(3):
        batcher.add(run(f"r{number}"))
    batcher.step(room=1)
    assert batcher.active == 1


def test_context_ends_a_run(batcher: Batcher, model: Successor) -> None:
    batcher.add(run("r", prompt="word " * 160, max_tokens=1000))
    finished = until_done(batcher)[-1]
    assert isinstance(finished, Finished)
    assert finished.reason == "length"
    assert finished.prompt_tokens + finished.tokens_generated == model.context


def test_refusals(batcher: Batcher) -> None:
    (long,) = batcher.add(run("r", prompt="word " * 300))
    assert isinstance(long, RunFailed)
    assert (long.code, long.retryable) == ("prompt_too_long", False)
    (bad,) = batcher.add(run("r", top_p=7))
    assert isinstance(bad, RunFailed)
    assert bad.code == "bad_parameters"


def test_impossible_logits_are_a_device_fault(batcher: Batcher, model: Successor) -> None:
    batcher.add(run("r"))
    model.broken = True
    with pytest.raises(DeviceFault):
        until_done(batcher)
    (failed,) = batcher.fail_all("device_failed", "x")
    assert isinstance(failed, RunFailed)
    assert failed.retryable


def test_logprobs_and_padded_logits(vocabulary: Vocabulary) -> None:
    """A matrix may have rows beyond the last token: they are never chosen."""
    count = len(vocabulary.pieces)

    class Padded(Successor):
        def step(self, rows: Sequence[Row], wanted: Sequence[int]) -> np.ndarray:
            logits = super().step(rows, wanted)[:, : count + 9]
            logits[:, count:] = 100.0
            return logits

    batcher = Batcher(Padded(count + 9), vocabulary)
    assert batcher.add(run("r", max_tokens=3, logprobs=True, top_logprobs=2)) == []
    assert batcher.add(run("plain", max_tokens=3)) == []
    given = [m for m in until_done(batcher) if isinstance(m, Tokens) and m.count]
    for message in given:
        assert len(message.logprobs) == (message.run_id == "r")
    best = [message.logprobs[0] for message in given if message.run_id == "r"]
    assert len(best) == 3
    for each in best:
        assert each.best[0] == each.token
        assert len(each.best) == 2
        assert each.token.logprob > each.best[1].logprob
        assert each.token.piece.decode("utf-8", "replace") == each.token.text
