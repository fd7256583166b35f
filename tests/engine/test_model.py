"""The real small model on the CPU device, one engine process for all: right tokens, whatever runs beside them."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from engine.files import gguf
from engine.protocol import (
    Cancel,
    CountTokens,
    Finished,
    Heartbeat,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Ready,
    RunFailed,
    Started,
    TokenCount,
    Tokens,
    Unload,
    Unloaded,
)
from engine.text import tokenizer
from engine.text.chat import prompt_tokens
from tests.engine.conftest import CONTEXT, DEVICE, SLOTS
from tests.engine.harness import EngineProcess
from tests.engine.memory import Watched, held
from tests.engine.reference import Reference

pytestmark = [pytest.mark.model, pytest.mark.process]
numbers = itertools.count()
LONG = "Count the words of this text. " + "The cat sat on the mat and looked at the moon. " * 12
PROMPTS = ["What is the capital of France?", "Write a haiku about the sea.", "List three colours.", LONG]


def start(real: EngineProcess, prompt: str, **parameters: Any) -> str:
    run_id = f"t/{next(numbers)}"
    real.run(run_id, prompt=prompt, **{"temperature": 0, "max_tokens": 16, **parameters})
    return run_id


def finish(real: EngineProcess, run_id: str) -> str:
    done = real.wait_end(run_id)
    assert isinstance(done, Finished), done
    return real.text(run_id)


@pytest.fixture(scope="module")
def alone(real: EngineProcess) -> dict[str, str]:
    """Greedy answers, each computed with nothing else running."""
    return {prompt: finish(real, start(real, prompt)) for prompt in PROMPTS}


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Reference:
    return Reference(model_path)


def test_ready_names_the_device(real: EngineProcess) -> None:
    ready = real.wait_type(Ready)
    assert not ready.stand_in
    assert ready.device == DEVICE
    assert ready.versions["tinygrad"]
    assert ready.memory_total_bytes > 2**30


def test_load_reports_progress_and_memory(real: EngineProcess) -> None:
    stages = [message.stage for message in real.seen if isinstance(message, LoadProgress)]
    assert [stage for stage, _ in itertools.groupby(stages)] == ["read", "upload", "compile"]
    loaded = real.wait_type(Loaded)
    assert (loaded.context, loaded.slots) == (CONTEXT, SLOTS)
    assert 120e6 < loaded.memory_bytes < 250e6  # the weights are 85e6, as in the file


def test_ready_means_that_all_its_graphs_are_captured(real: EngineProcess) -> None:
    at = next(index for index, message in enumerate(real.seen) if isinstance(message, Loaded))
    compiled = [m for m in real.seen[:at] if isinstance(m, LoadProgress) and m.stage == "compile"]
    assert [m.done for m in compiled] == list(range(compiled[0].total + 1))
    uploaded = [m for m in real.seen[:at] if isinstance(m, LoadProgress) and m.stage == "upload"]
    assert uploaded[-1].done == uploaded[-1].total > 80e6  # bytes
    assert not [m for m in real.seen[at:] if isinstance(m, LoadProgress) and m.model == "m"]


def test_a_load_needs_no_second_copy_of_the_weights(loaded: tuple[EngineProcess, Watched]) -> None:
    engine, memory = loaded
    weights = engine.wait_type(LoadProgress).total
    assert memory.peak_own - memory.after.own < 0.8 * weights
    assert memory.after.files - memory.before.files < 0.5 * weights, "the model's file is still mapped"


def test_a_plausible_answer(real: EngineProcess, alone: dict[str, str]) -> None:
    assert "Paris" in alone[PROMPTS[0]]


def test_equal_to_an_independent_reference(
    reference: Reference, model_path: Path, alone: dict[str, str]
) -> None:
    vocabulary = tokenizer.from_gguf(gguf.read(model_path))
    for prompt in PROMPTS[:2]:
        tokens = reference.greedy(prompt_tokens(vocabulary, {"prompt": prompt}), 8)
        kept = list(itertools.takewhile(lambda token: token not in vocabulary.ends, tokens))
        detokenizer = vocabulary.detokenizer()
        assert alone[prompt].startswith("".join(map(detokenizer.push, kept)))


def test_batched_equals_alone(real: EngineProcess, alone: dict[str, str]) -> None:
    """All at once, more runs than slots, each prompt twice: slots are left and taken while others run."""
    runs = [(prompt, start(real, prompt)) for prompt in PROMPTS * 2]
    for prompt, run_id in runs:
        assert finish(real, run_id) == alone[prompt]


def test_joining_later_equals_alone(real: EngineProcess, alone: dict[str, str]) -> None:
    """A long prompt, in chunks, joins while another decodes, and the other way round."""
    first = start(real, PROMPTS[1])
    real.wait_for(lambda m: isinstance(m, Tokens) and m.run_id == first)
    second = start(real, LONG)
    real.wait_for(lambda m: isinstance(m, Started) and m.run_id == second)
    third = start(real, PROMPTS[2])
    answers = {run_id: finish(real, run_id) for run_id in (first, second, third)}
    assert answers == {first: alone[PROMPTS[1]], second: alone[LONG], third: alone[PROMPTS[2]]}


def test_a_long_prompt_does_not_stall_others(real: EngineProcess) -> None:
    first = start(real, PROMPTS[1], max_tokens=40, repetition_penalty=1.3)
    real.wait_for(lambda m: isinstance(m, Tokens) and m.run_id == first)
    at = len(real.seen)
    second = start(real, LONG * 3)
    real.wait_for(lambda m: isinstance(m, Tokens) and m.run_id == second, timeout_s=60)
    between = [m for m in real.seen[at:] if isinstance(m, Tokens) and m.run_id == first]
    assert len(between) >= 4
    finish(real, first), finish(real, second)


def test_chunked_prefill_equals_unchunked(
    real: EngineProcess, reference: Reference, model_path: Path
) -> None:
    """The reference computes every position at once: a prompt of many chunks must give the same."""
    vocabulary = tokenizer.from_gguf(gguf.read(model_path))
    tokens = prompt_tokens(vocabulary, {"prompt": LONG})
    assert len(tokens) > 4 * 32
    detokenizer = vocabulary.detokenizer()
    expected = "".join(map(detokenizer.push, reference.greedy(tokens, 3)))
    assert finish(real, start(real, LONG, max_tokens=3)) == expected


def test_the_next_turn_computes_only_what_is_new(
    real: EngineProcess, reference: Reference, model_path: Path
) -> None:
    """Also after others took slots, and with a prompt that only begins alike: the reference's tokens in all."""
    vocabulary = tokenizer.from_gguf(gguf.read(model_path))
    messages = [{"role": "user", "content": "Name three colours of a rainbow and say what each is like."}]
    talk = f"t/{next(numbers)}"
    real.run(talk, messages=messages, temperature=0, max_tokens=24)
    answer = finish(real, talk)
    finish(real, start(real, PROMPTS[1]))
    messages.append({"role": "assistant", "content": answer})
    for question in ("Which one do you like best?", "Which of them has the longest name?"):
        turn, asked = f"t/{next(numbers)}", [*messages, {"role": "user", "content": question}]
        real.run(turn, messages=asked, temperature=0, max_tokens=4)
        text, done = finish(real, turn), real.wait_end(turn)
        tokens = prompt_tokens(vocabulary, {"messages": asked})
        assert (done.prompt_tokens, done.cached_tokens > 50) == (len(tokens), True)
        detokenizer = vocabulary.detokenizer()
        assert text == "".join(map(detokenizer.push, reference.greedy(tokens, 4)))


def test_a_text_that_repeats_itself_equals_the_reference(
    real: EngineProcess, reference: Reference, model_path: Path
) -> None:
    """What is guessed from the prompt changes nothing."""
    vocabulary = tokenizer.from_gguf(gguf.read(model_path))
    prompt = "Repeat this list: red, green, blue, red, green, blue, red, green, blue, red, green, blue"
    tokens = reference.greedy(prompt_tokens(vocabulary, {"prompt": prompt}), 12)
    detokenizer = vocabulary.detokenizer()
    assert finish(real, start(real, prompt, max_tokens=12)) == "".join(map(detokenizer.push, tokens))


def test_cancel_frees_within_a_second(real: EngineProcess) -> None:
    run_id = start(real, "Tell me a very long story.", max_tokens=400, repetition_penalty=1.2)
    real.wait_for(lambda m: isinstance(m, Tokens) and m.run_id == run_id)
    began = time.monotonic()
    real.send(Cancel(run_id=run_id))
    done = real.wait_end(run_id)
    assert time.monotonic() - began < 1.0
    assert done.reason == "cancelled"
    assert 0 < done.tokens_generated < 400


def test_count_tokens_while_steps_run(real: EngineProcess, model_path: Path) -> None:
    run_id = start(real, "Tell me a very long story.", max_tokens=60, repetition_penalty=1.2)
    real.wait_for(lambda m: isinstance(m, Tokens) and m.run_id == run_id)
    ask = CountTokens(request_id="c", path=str(model_path), family="llama", parameters={"prompt": "Hi"})
    real.send(ask)
    counted = real.wait_type(TokenCount)
    assert counted.tokens == 31
    assert not [m for m in real.of_run(run_id) if isinstance(m, Finished)]
    finish(real, run_id)


def test_limits_and_reasons(real: EngineProcess) -> None:
    short = start(real, PROMPTS[1], max_tokens=3)
    assert (real.wait_end(short).reason, real.wait_end(short).tokens_generated) == ("length", 3)
    long = start(real, "word " * CONTEXT)
    assert real.wait_end(long).code == "prompt_too_long"
    bad = start(real, "x", temperature=-1)
    assert real.wait_end(bad).code == "bad_parameters"
    nearly = start(real, "word " * (CONTEXT - 36), max_tokens=100, repetition_penalty=1.5)
    done = real.wait_end(nearly)
    assert done.prompt_tokens + done.tokens_generated <= CONTEXT


def test_stop_strings_and_seeds(real: EngineProcess, alone: dict[str, str]) -> None:
    stopped = start(real, PROMPTS[0], stop=["Paris"])
    assert finish(real, stopped) == alone[PROMPTS[0]].partition("Paris")[0]
    runs = [start(real, PROMPTS[1], temperature=1.0, seed=5, max_tokens=8) for _ in range(3)]
    assert len({finish(real, run_id) for run_id in runs}) == 1


def test_heartbeats_come_with_steps_and_when_idle(real: EngineProcess) -> None:
    at = len(real.seen)
    finish(real, start(real, PROMPTS[0]))
    assert any(m.phase == "decode" for m in real.seen[at:] if isinstance(m, Heartbeat))
    at = len(real.seen)
    assert (
        real.wait_for(lambda m: isinstance(m, Heartbeat) and m.phase == "idle", 3, at).memory_used_bytes > 0
    )


def test_bad_loads_are_refused(real: EngineProcess, model_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "cut.gguf"
    with model_path.open("rb") as file:
        broken.write_bytes(file.read(10_000_000))
    real.send(Load(model="cut", path=str(broken), family="llama"))
    failed = real.wait_for(lambda m: isinstance(m, LoadFailed) and m.model == "cut")
    assert failed.code == "bad_model_file"
    for family, code in (("qwen2", "bad_model_file"), ("mamba", "unsupported_architecture")):
        real.send(Load(model=family, path=str(model_path), family=family))
        failed = real.wait_for(lambda m, family=family: isinstance(m, LoadFailed) and m.model == family)
        assert failed.code == code
    real.send(Load(model="m", path=str(model_path), family="llama"))
    again = real.wait_for(lambda m: isinstance(m, LoadFailed) and m.model == "m")
    assert again.code == "already_loaded"


def test_zz_unload_gives_memory_back(loaded: tuple[EngineProcess, Watched]) -> None:
    """Last: the shared model goes."""
    real, memory = loaded
    device_bytes = real.wait_type(Loaded).memory_bytes
    assert held(real.process.pid).shared > 0.9 * device_bytes
    run_id = start(real, "Tell me a very long story.", max_tokens=400, repetition_penalty=1.2)
    real.wait_for(lambda m: isinstance(m, Started) and m.run_id == run_id)
    real.send(Unload(model="m"))
    ended = real.wait_end(run_id)
    assert isinstance(ended, RunFailed)
    assert (ended.code, ended.retryable) == ("unloaded", True)
    unloaded = real.wait_for(lambda m: isinstance(m, Unloaded) and m.model == "m")
    assert unloaded.freed_bytes >= 0.99 * device_bytes
    at = len(real.seen)
    assert real.wait_type(Heartbeat, start=at).memory_used_bytes < 10e6
    left = held(real.process.pid)
    assert left.shared < 0.02 * device_bytes, "tinygrad keeps freed buffers for later"
    assert left.own - memory.before.own < 0.5 * (memory.after.own - memory.before.own)
