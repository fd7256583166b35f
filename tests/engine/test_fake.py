"""The stand-in engine as a real process: runs, queueing, cancelling, and every fault."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engine.protocol import (
    Cancel,
    Configure,
    CountTokens,
    Fault,
    Finished,
    Heartbeat,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    ProtocolError,
    Ready,
    Run,
    RunFailed,
    Shutdown,
    Started,
    TokenCount,
    Unload,
    Unloaded,
    Unusable,
)
from tests.engine.harness import EngineProcess

pytestmark = pytest.mark.process


@contextmanager
def fake(load: bool = True, slots_max: int = 8, **settings: Any) -> Iterator[EngineProcess]:
    configure = Configure(worker_id="w", device="fake", slots_max=slots_max, fake=settings)
    with EngineProcess(configure) as engine:
        engine.wait_type(Ready, Unusable)
        if load:
            engine.send(Load(model="m", path="/nowhere", family="llama"))
            engine.wait_type(Loaded, LoadFailed)
        yield engine


def embed(engine: EngineProcess, run_id: str, **parameters: Any) -> Any:
    engine.send(Run(run_id=run_id, model="m", task_type="embedding", parameters=parameters))
    return engine.wait_end(run_id)


def test_embeds_the_same_words_alike() -> None:
    with fake() as engine:
        done = embed(engine, "a/1", input=["one two", "one  two", "three"])
        started, output, _ = engine.of_run("a/1")
        assert (started.prompt_tokens, done.prompt_tokens, done.tokens_generated) == (5, 5, 0)
        (array,) = output.arrays
        assert (array.name, array.dtype, array.shape) == ("embeddings", "float32", (3, 8))
        rows = list(struct.iter_unpack("<8f", array.data))
        assert rows[0] == rows[1] != rows[2]
        assert all(abs(sum(number * number for number in row) - 1) < 1e-6 for row in rows)
        embed(engine, "b/1", input="one two", normalize=False)
        (raw,) = struct.iter_unpack("<8f", engine.of_run("b/1")[1].arrays[0].data)
        assert raw[0] / raw[1] == pytest.approx(rows[0][0] / rows[0][1])
        assert raw != rows[0]


def test_texts_that_are_too_long_are_refused_or_cut() -> None:
    with fake(load=False) as engine:
        engine.send(Load(model="m", path="/", family="bert", context=3, task_type="embedding"))
        engine.wait_type(Loaded)
        failed = embed(engine, "a/1", input=["x", "a b c d"])
        assert (failed.code, failed.retryable) == ("prompt_too_long", False)
        assert "text 1 has 4 tokens" in failed.message
        embed(engine, "b/1", input=["a b c d", "a b c"], truncate=True)
        cut, whole = struct.iter_unpack("<8f", engine.of_run("b/1")[1].arrays[0].data)
        assert cut == whole


def test_gives_arrays_back() -> None:
    def compute(run_id: str, **inputs: Any) -> Any:
        engine.send(Run(run_id=run_id, model="m", task_type="tensor", parameters={"inputs": inputs}))
        return engine.wait_end(run_id)

    with fake() as engine:
        numbers = {"dtype": "int16", "shape": [1, 2], "data": [-1, 258]}
        packed = {"dtype": "float32", "shape": [1], "data": "AACAPw=="}
        assert compute("a/1", x=numbers, y=packed).reason == "stop"
        x, y = engine.of_run("a/1")[1].arrays
        assert (x.name, x.dtype, x.shape, x.data) == ("x", "int16", (1, 2), b"\xff\xff\x02\x01")
        assert struct.unpack("<f", y.data) == (1.0,)
        assert compute("b/1", x={**numbers, "data": [1 << 20, 0]}).code == "bad_parameters"
        assert compute("c/1", x={**packed, "data": "no base64"}).code == "bad_parameters"
        for run_id, wrong in (("d/1", {**numbers, "shape": [3]}), ("e/1", {**packed, "shape": [2]})):
            failed = compute(run_id, x=wrong)
            assert (failed.code, failed.retryable) == ("bad_parameters", False)
            assert "4 bytes" in failed.message


def test_starts_quickly_and_says_it_is_a_stand_in() -> None:
    began = time.monotonic()
    with fake(load=False) as engine:
        ready = engine.wait_type(Ready)
        assert time.monotonic() - began < 1.5
        assert ready.stand_in
        assert ready.architecture == "fake"
        modules = f"/proc/{engine.process.pid}/maps"
        with open(modules) as maps:
            loaded = maps.read()
        assert "numpy" not in loaded
        assert "tinygrad" not in loaded


def test_echoes_the_prompt() -> None:
    with fake() as engine:
        engine.run("t/1", prompt="one two  three", max_tokens=10)
        done = engine.wait_end("t/1")
        assert isinstance(done, Finished)
        assert (done.reason, done.prompt_tokens, done.tokens_generated) == ("stop", 3, 3)
        assert engine.text("t/1") == "one two three"
        assert isinstance(engine.of_run("t/1")[0], Started)


def test_max_tokens_and_messages() -> None:
    with fake() as engine:
        engine.run("t/1", messages=[{"role": "user", "content": "a b c d"}], max_tokens=2)
        done = engine.wait_end("t/1")
        assert (done.reason, done.tokens_generated) == ("length", 2)
        assert engine.text("t/1") == "a b"


def test_at_a_rate_tokens_come_one_by_one() -> None:
    with fake(tokens_per_s=50) as engine:
        engine.run("t/1", prompt="a b c d e f g h i j")
        done = engine.wait_end("t/1")
        assert 0.15 < done.processing_s < 1.0
        assert engine.text("t/1") == "a b c d e f g h i j"
        assert len(engine.of_run("t/1")) > 4


def test_more_runs_than_slots_wait_their_turn() -> None:
    with fake(slots_max=2, tokens_per_s=100) as engine:
        for number in range(6):
            engine.run(f"t/{number}", prompt="a b c d e")
        for number in range(6):
            assert engine.wait_end(f"t/{number}").reason == "stop"
        running = most = 0
        for message in engine.seen:
            running += isinstance(message, Started) - isinstance(message, Finished)
            most = max(most, running)
        assert most == 2


def test_cancel_running_and_waiting() -> None:
    with fake(slots_max=1, tokens_per_s=1) as engine:
        engine.run("t/1", prompt="a b c d e")
        engine.run("t/2", prompt="a b c d e")
        engine.wait_type(Started)
        engine.send(Cancel(run_id="t/2"), Cancel(run_id="t/1"), Cancel(run_id="unknown"))
        assert engine.wait_end("t/2", 1).reason == "cancelled"
        assert engine.wait_end("t/1", 1).reason == "cancelled"


def test_load_beyond_memory_and_unload() -> None:
    with fake(memory_total_bytes=2.5e9) as engine:
        engine.send(Load(model="n", path="/", family="llama"), Load(model="o", path="/", family="llama"))
        failed = engine.wait_type(LoadFailed)
        assert (failed.model, failed.code) == ("o", "out_of_memory")
        assert "500000000" in failed.message
        engine.send(Load(model="m", path="/", family="llama"))
        assert (
            engine.wait_for(lambda m: isinstance(m, LoadFailed) and m.model == "m").code == "already_loaded"
        )
        engine.send(Unload(model="m"), Load(model="o", path="/", family="llama"))
        assert engine.wait_type(Unloaded).freed_bytes == 10**9
        engine.wait_for(lambda m: isinstance(m, Loaded) and m.model == "o")


def test_unload_ends_its_runs() -> None:
    with fake(tokens_per_s=1, slots_max=1) as engine:
        engine.run("t/1", prompt="a b")
        engine.run("t/2", prompt="a b")
        engine.wait_type(Started)
        engine.send(Unload(model="m"))
        assert engine.wait_end("t/1").code == "unloaded"
        assert engine.wait_end("t/2").code == "unloaded"
        engine.run("t/3", prompt="a b")
        assert engine.wait_end("t/3").code == "unknown_model"


def test_prompt_too_long_and_count() -> None:
    with fake(load=False) as engine:
        engine.send(Load(model="m", path="/", family="llama", context=4))
        engine.wait_type(Loaded)
        engine.run("t/1", prompt="a b c d")
        assert engine.wait_end("t/1").code == "prompt_too_long"
        count = CountTokens(request_id="r", path="/", family="llama", parameters={"prompt": "a b c d"})
        engine.send(count)
        assert engine.wait_type(TokenCount).tokens == 4


def test_heartbeats_while_idle() -> None:
    with fake(load=False) as engine:
        first = engine.wait_type(Heartbeat)
        assert first.temperature_c == 45.0
        at = len(engine.seen)
        assert engine.wait_type(Heartbeat, timeout_s=2.5, start=at).phase == "idle"


def test_shutdown_and_end_of_stream() -> None:
    with fake() as engine:
        engine.send(Shutdown())
        assert engine.process.wait(5) == 0
    with fake() as engine:
        engine.sock.close()
        assert engine.process.wait(5) == 0


@pytest.mark.parametrize("by_prompt", [False, True])
def test_fault_hang(by_prompt: bool) -> None:
    with fake() as engine:
        if by_prompt:
            engine.run("t/1", prompt="fault:hang now")
        else:
            engine.send(Fault(kind="hang"))
        time.sleep(0.2)
        engine.run("t/2", prompt="a")
        time.sleep(1.3)
        while True:
            at = len(engine.seen)
            try:
                engine.receive(0.3)
            except TimeoutError:
                break
            assert not [m for m in engine.seen[at:] if getattr(m, "run_id", "") == "t/2"]
        engine.sock.close()
        assert engine.process.wait(5) == 0


@pytest.mark.parametrize("by_prompt", [False, True])
def test_fault_die(by_prompt: bool) -> None:
    with fake() as engine:
        if by_prompt:
            engine.run("t/1", prompt="fault:die")
        else:
            engine.send(Fault(kind="die"))
        assert engine.process.wait(5) == 70


def test_fault_slow() -> None:
    with fake() as engine:
        engine.run("t/1", prompt="fault:slow b c")
        assert engine.wait_end("t/1").processing_s > 0.25


def test_fault_wrong() -> None:
    with fake() as engine:
        engine.send(Fault(kind="wrong"))
        with pytest.raises(ProtocolError):
            engine.wait_type(Unusable)


def test_fault_out_of_memory() -> None:
    with fake() as engine:
        engine.run("t/1", prompt="fault:out_of_memory")
        engine.run("t/2", prompt="fine")
        assert engine.wait_end("t/1").code == "out_of_memory"
        assert isinstance(engine.wait_end("t/2"), Finished)
        engine.send(Fault(kind="out_of_memory"), Load(model="n", path="/", family="llama"))
        engine.run("t/3", prompt="fine")
        assert engine.wait_type(LoadFailed).code == "out_of_memory"
        assert isinstance(engine.wait_end("t/3"), RunFailed)


def test_fault_hot_and_back() -> None:
    with fake(fault="hot") as engine:
        engine.wait_for(lambda m: isinstance(m, Heartbeat) and m.temperature_c == 110.0)
        engine.send(Fault(kind="none"))
        at = len(engine.seen)
        engine.wait_for(lambda m: isinstance(m, Heartbeat) and m.temperature_c == 45.0, start=at)


def test_unknown_setting_is_refused() -> None:
    with fake(load=False, tokens_per_second=3) as engine:
        assert "tokens_per_second" in engine.wait_type(Unusable).message


def test_version_without_overlap_is_refused() -> None:
    with EngineProcess(hello=Hello(version_min=90, version_max=91)) as engine:
        assert engine.wait_type(Unusable).code == "protocol_version"


def test_thousands_of_runs_a_second() -> None:
    with fake() as engine:
        began = time.monotonic()
        for number in range(4000):
            engine.run(f"t/{number}", prompt="a b c")
        engine.wait_end("t/3999")
        assert time.monotonic() - began < 4.0
        assert sum(isinstance(m, Finished) for m in engine.seen) == 4000
