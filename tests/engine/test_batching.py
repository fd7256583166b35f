"""What goes into each step, against a model that is a function: no device."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.batching.batcher import Batcher, DeviceFault, Row
from engine.batching.pacing import Bucket
from engine.batching.sampling import Sampler
from engine.files import gguf
from engine.protocol import Finished, Message, Run, RunFailed, Started, Tokens
from engine.text import tokenizer
from engine.text.tokenizer import Vocabulary


class Successor:
    """Says that the token after n is n + 1; checks that each slot is filled without gaps, and who sees what there."""

    slots, context = 3, 200
    # a step of 16 rows takes as long as one: prompts are not held back
    buckets: Sequence[Bucket] = (Bucket(1, 1, 0.01), Bucket(4, 4, 0.01), Bucket(16, 3, 0.01))

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self.cached: dict[int, list[int]] = {slot: [] for slot in range(self.slots)}
        self.steps: list[list[Row]] = []
        self.copies: list[tuple[int, int, int]] = []
        self.broken = False
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def step(self, rows: Sequence[Row], wanted: Sequence[int]) -> np.ndarray:
        bucket = next(bucket for bucket in self.buckets if bucket.rows >= len(rows))
        assert len(rows) > 0
        assert len(wanted) <= bucket.logits
        self.steps.append(list(rows))
        self.now += bucket.step_s + bucket.attended_s * sum(row.position for row in rows)
        for row in rows:
            assert row.position <= len(self.cached[row.slot]), "a gap"
            del self.cached[row.slot][row.position :]
            self.cached[row.slot].append(row.token)
        logits = np.zeros((len(wanted), self._vocabulary), dtype=np.float32)
        for index, at in enumerate(wanted):
            seen = self.cached[rows[at].slot][: rows[at].position + 1]
            logits[index] = self.logits(seen)
        return logits * np.float32("nan") if self.broken else logits

    def copy(self, source: int, target: int, length: int) -> None:
        assert source != target
        assert 0 < length <= len(self.cached[source])
        self.copies.append((source, target, length))
        self.cached[target][:length] = self.cached[source][:length]

    def logits(self, seen: list[int]) -> np.ndarray:
        logits = np.zeros(self._vocabulary, dtype=np.float32)
        logits[self.next_token(seen) % self._vocabulary] = 12  # sampled, it is drawn three times of four
        return logits

    def next_token(self, seen: list[int]) -> int:
        return seen[-1] + 1


class Remembering(Successor):
    """Every token depends on all before it, and now and then repeats itself: a wrong cache or draw shows."""

    slots, context = 3, 120
    buckets = (Bucket(1, 1, 0.01), Bucket(4, 4, 0.011), Bucket(8, 8, 0.012), Bucket(16, 3, 0.03))

    def next_token(self, seen: list[int]) -> int:
        if len(seen) % 32 < 24:
            return 2000 + (seen[-1] + 1) % 5
        return 2000 + zlib.crc32(repr(seen).encode()) % 5


@pytest.fixture(scope="module")
def vocabulary(model_path: Path) -> Vocabulary:
    return tokenizer.from_gguf(gguf.read(model_path))


@pytest.fixture
def model(vocabulary: Vocabulary) -> Successor:
    return Successor(len(vocabulary.names))


@pytest.fixture
def batcher(model: Successor, vocabulary: Vocabulary) -> Batcher:
    return Batcher(model, vocabulary, model.clock)


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


def test_a_short_prompt_overtakes_a_long_one(batcher: Batcher, model: Successor) -> None:
    batcher.add(run("a", prompt="word " * 120))
    batcher.add(run("b", prompt="word " * 20))
    messages: list[Message] = []
    while not any(isinstance(m, Tokens) for m in messages):
        messages += batcher.step(99)
    assert next(m.run_id for m in messages if isinstance(m, Tokens)) == "b"


def test_cancel_frees_the_slot_at_once(batcher: Batcher, model: Successor) -> None:
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


class Measured(Successor):
    """Steps as long as SmolLM2's on two cores."""

    slots, context = 9, 1200
    buckets = tuple(
        Bucket(rows, min(rows, 16), ms / 1e3, 3.5e-7)
        for rows, ms in (
            (1, 2.5),
            (2, 3.3),
            (4, 4.9),
            (8, 7.0),
            (10, 9.5),
            (12, 11.6),
            (16, 14.0),
            (32, 24.0),
        )
    )


def streamed(
    batcher: Batcher, model: Successor, streams: int, steps: int, joins_at: int
) -> dict[str, list[float]]:
    """When each run's tokens came, of some streams and of a long prompt that joins them."""
    came: dict[str, list[float]] = {f"s{number}": [] for number in range(streams)} | {"long": []}
    for number in range(streams):
        batcher.add(run(f"s{number}", max_tokens=1000))
    for step in range(steps):
        if step == joins_at:
            batcher.add(run("long", prompt="word " * 1000))
        for message in batcher.step(99):
            if isinstance(message, Tokens):
                came[message.run_id].append(model.now)
    return came


@pytest.mark.parametrize("streams", [1, 2, 3, 7, 8])
def test_streams_hardly_notice_a_long_prompt(streams: int, vocabulary: Vocabulary) -> None:
    """The longest gap of a stream is at most 3 times the median one; a prompt alone has the largest steps."""
    model = Measured(len(vocabulary.pieces))
    batcher = Batcher(model, vocabulary, model.clock)
    came = streamed(batcher, model, streams, steps=600, joins_at=100)
    assert came.pop("long"), "the prompt was not read"
    for times in came.values():
        gaps = np.diff(times)
        assert gaps.max() <= 3 * np.median(gaps[:90])
        assert gaps.max() <= 3 * np.median(gaps)
    rows = [len(step) for step in model.steps]
    assert max(rows[100:]) >= streams + 3
    batcher.fail_all("unloaded", "x")
    batcher.add(run("again", prompt="word " * 100))
    batcher.step(99)
    assert len(model.steps[-1]) == 32


class Varying(Measured):
    """Steps that take up to twice as long, as on a virtual machine beside others."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self._random = np.random.default_rng(4)

    def step(self, rows: Sequence[Row], wanted: Sequence[int]) -> np.ndarray:
        before = self.now
        logits = super().step(rows, wanted)
        self.now = before + (self.now - before) * self._random.lognormal(0, 0.2)
        return logits


@pytest.mark.parametrize("streams", [1, 8])
def test_streams_hardly_notice_a_long_prompt_where_steps_vary(streams: int, vocabulary: Vocabulary) -> None:
    model = Varying(len(vocabulary.pieces))
    batcher = Batcher(model, vocabulary, model.clock)
    gaps = np.diff(streamed(batcher, model, streams, steps=700, joins_at=200)["s0"])
    usual, longest = np.median(gaps[:190]), np.quantile(gaps[200:], 0.99)
    assert 1.5 * usual < longest <= 3 * usual


@pytest.mark.parametrize("end", ["by itself", "cancelled", "failed"])
def test_idle_time_is_no_time_between_steps(end: str, batcher: Batcher, model: Successor) -> None:
    batcher.add(run("r", max_tokens=5))
    batcher.step(99)
    if end == "by itself":
        until_done(batcher)
    elif end == "cancelled":
        batcher.cancel("r")
    else:
        batcher.fail_all("unloaded", "x")
    model.now += 3600.0
    batcher.add(run("next"))
    until_done(batcher)
    smallest = batcher._times.buckets[0]
    assert batcher._times.seconds(smallest) == pytest.approx(smallest.step_s)


@pytest.mark.parametrize("steps", [1, 3, 12], ids=["reading", "still reading", "decoding"])
def test_a_cancelled_run_has_no_row_in_the_next_step(steps: int, batcher: Batcher, model: Successor) -> None:
    """And the run that waited for its slot begins in that step."""
    for number in range(3):
        batcher.add(run(f"r{number}", prompt="word " * 40, max_tokens=100))
    batcher.add(run("next"))
    for _ in range(steps):
        batcher.step(99)
    batcher.cancel("r1")
    messages = batcher.step(99)
    assert [m.run_id for m in messages if isinstance(m, Started)] == ["next"]
    assert not [m for m in messages if isinstance(m, Tokens) and m.run_id == "r1"]
    for slot in {row.slot for row in model.steps[-1]}:  # one run's rows alone
        at = [row.position for row in model.steps[-1] if row.slot == slot]
        assert at == list(range(at[0], at[0] + len(at)))
    assert batcher.active == 3


def alone(model: Remembering, prompt: list[int], parameters: dict[str, Any]) -> list[int]:
    """The tokens of a run by itself, one after the other."""
    sampler = Sampler(parameters, prompt)
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + parameters["max_tokens"], model.context):
        tokens.append(sampler.choose(model.logits(tokens)))
    return tokens[len(prompt) :]


def test_every_run_is_as_if_it_were_alone(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations that go on, share a beginning, repeat themselves, are cancelled: none sees another's cache."""
    monkeypatch.setattr("engine.batching.batcher.prompt_tokens", lambda _, parameters: parameters["ids"])
    model = Remembering(len(vocabulary.pieces))
    batcher = Batcher(model, replace(vocabulary, ends=frozenset()), model.clock)
    random = np.random.default_rng(4)
    talks = [[*range(1000, 1020), 1100 + talk] for talk in range(5)]
    going: dict[str, tuple[int, dict[str, Any], list[int]]] = {}
    ended, cancelled, cached, at_once = 0, 0, 0, 0
    for turn in range(400):
        idle = sorted({*range(len(talks))} - {talk for talk, _, _ in going.values()})
        if idle and turn % 2 == 0 and turn % 40 < 24:
            talk = int(random.choice(idle))
            parameters = {
                "ids": list(talks[talk]),
                "max_tokens": int(random.integers(1, 40)),
                "temperature": float(random.choice([0.0, 1.0])),
                "repetition_penalty": float(random.choice([1.0, 1.1])),
                "seed": turn,
            }
            assert batcher.add(run(f"r{turn}", logprobs=True, **parameters)) == []
            going[f"r{turn}"] = (talk, parameters, [])
        messages = batcher.step(99)
        if turn % 23 == 5 and going:
            messages += batcher.cancel(min(going))
        for message in messages:
            if isinstance(message, Tokens):
                going[message.run_id][2].extend(each.token.token for each in message.logprobs)
                at_once = max(at_once, message.count)
            elif isinstance(message, Finished):
                talk, parameters, tokens = going.pop(message.run_id)
                right = alone(model, parameters["ids"], parameters)
                assert tokens == right[: len(tokens)]
                assert message.tokens_generated == len(tokens)
                if message.reason == "cancelled":
                    cancelled += 1
                else:
                    assert tokens == right
                    ended += 1
                cached = max(cached, message.cached_tokens)
                assert message.cached_tokens < message.prompt_tokens
                talks[talk] = [*parameters["ids"], *tokens, 1200 + turn]
                if len(talks[talk]) > 90:
                    talks[talk] = [*range(1000, 1020), 1100 + talk]
    assert min(ended, cancelled) >= 10
    assert at_once > 3
    assert cached > 40  # all begin with 20
    assert model.copies


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
