"""Runs on a real stand-in engine: outcomes, repeats, cancelling, refusals, streams."""

from __future__ import annotations

import msgspec
import pytest
import trio

from peer import limits
from peer.errors import Fenced, Unavailable
from peer.state.command import StreamToken
from peer.state.order import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    LoadReplica,
    RunAttempt,
    WorkerReported,
)
from peer.state.worker import EngineState
from tests.executor.rig import ECHO, FAKE, QUICK, rig, until

pytestmark = pytest.mark.process


async def test_a_run_starts_streams_and_finishes() -> None:
    async with rig() as it:
        await it.run(prompt="the quick brown fox")
        done = await it.outcome()
        assert isinstance(done, AttemptFinished)
        assert done.generated_text == "the quick brown fox"
        assert (done.tokens_generated, done.prompt_tokens, done.finish_reason) == (4, 4, "stop")
        assert done.stand_in
        assert abs(done.at - it.clock.wall()) < 10
        started = await it.sink.kind(AttemptStarted)
        assert it.sink.seen.index(started) < it.sink.seen.index(done)
        assert it.streams.tokens_so_far("t1") == 4
        it.streams.end("t1")
        async with it.streams.subscribe("t1") as items:
            assert [item async for item in items] == [
                StreamToken(attempt=1, index=0, text="the quick brown fox", count=4)
            ]


async def test_logprobs_come_with_the_tokens_and_the_result() -> None:
    async with rig() as it:
        await it.run(prompt="the fox", logprobs=True)
        done = await it.outcome()
        assert isinstance(done, AttemptFinished)
        assert [each.own.piece for each in done.logprobs] == [b"the", b"fox"]
        it.streams.end("t1")
        async with it.streams.subscribe("t1") as items:
            assert tuple([each async for item in items for each in item.logprobs]) == done.logprobs


async def test_a_text_that_no_leader_could_take_fails_its_task_and_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a report it would never go through, and all that came after it would wait behind it."""
    monkeypatch.setattr(limits, "RESULT_CHARS_MAX", 12)
    async with rig() as it:
        await it.run(prompt="the quick brown fox")
        failed = await it.outcome()
        assert isinstance(failed, AttemptFailed)
        assert (failed.code, failed.retryable) == ("result_too_large", False)
        await it.run(task_id="t2", prompt="the fox")
        done = await it.outcome("t2")
        assert isinstance(done, AttemptFinished)


async def test_the_worker_report_tells_what_there_is() -> None:
    async with rig(fake={"temperature_c": 51.0}) as it:
        report = await it.state(EngineState.READY)
        assert report.worker_id == "p1-fake0"
        assert report.device.stand_in
        assert report.engine_pid > 0
        found = await it.sink.wait(
            lambda r: isinstance(r, WorkerReported) and r.report.telemetry.temperature_c == 51.0
        )
        assert found.report.telemetry.memory_total_bytes == 16_000_000_000
        assert found.report.telemetry.source == "stand-in"


async def test_the_same_attempt_twice_runs_once() -> None:
    async with rig(fake={"tokens_per_s": 50}) as it:
        await it.run(prompt="a b c d e f")
        await it.run(prompt="a b c d e f")
        await it.outcome()
        await it.run(prompt="a b c d e f")
        await it.run("t2", prompt="x")
        await it.outcome("t2")
        assert sum(isinstance(r, AttemptStarted) and r.task_id == "t1" for r in it.sink.seen) == 1


async def test_an_outcome_is_reported_again_until_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.hosted.OUTCOME_AGAIN_S", 0.1)
    async with rig(report_interval_s=0.05) as it:
        await it.run()
        first = await it.outcome()
        again = await it.outcome(start=it.sink.seen.index(first) + 1)
        assert again == first
        listed = await it.sink.wait(lambda r: isinstance(r, WorkerReported) and r.report.running == ("t1/1",))
        assert listed
        await it.forget()
        start = len(it.sink.seen) + 1  # one may already be under way
        await it.sink.wait(lambda r: isinstance(r, WorkerReported) and not r.report.running, start)
        await trio.sleep(0.3)
        assert not any(isinstance(r, AttemptFinished) for r in it.sink.seen[start:])


async def test_outcomes_of_every_worker_are_reported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.hosted.OUTCOME_AGAIN_S", 0.1)
    devices = (FAKE, msgspec.structs.replace(FAKE, label="fake1"))
    async with rig(load=False, devices=devices, report_interval_s=0.05) as it:
        it.worker_id = "p1-fake1"  # not the first one
        await it.load()
        await it.run()
        first = await it.outcome()
        assert await it.outcome(start=it.sink.seen.index(first) + 1) == first


async def test_cancelling_frees_the_slot_without_a_report() -> None:
    async with rig(fake={"tokens_per_s": 2}, slots_max=1) as it:
        await it.run(prompt="a b c d e f g h i j")
        await it.sink.kind(AttemptStarted)
        began = trio.current_time()
        await it.stop_run()
        await it.run("t2", prompt="x")
        await it.sink.wait(lambda r: isinstance(r, AttemptStarted) and r.task_id == "t2")
        assert trio.current_time() - began < 1.0
        assert not any(isinstance(r, AttemptFinished | AttemptFailed) for r in it.sink.seen)


async def test_a_run_that_ignores_its_cancellation_costs_the_engine_its_life() -> None:
    async with rig(fake={"tokens_per_s": 5}) as it:
        await it.run("other", prompt="a b c d e f g h i j k l m n o p q r s t u v w x y z")
        await it.sink.kind(AttemptStarted)
        pid = it.pid()
        await it.run("t1", prompt="fault:hang")
        began = trio.current_time()
        await it.stop_run("t1")
        failed = await it.outcome("other")
        assert trio.current_time() - began < 0.8
        assert isinstance(failed, AttemptFailed)
        assert (failed.code, failed.retryable) == ("engine_died", True)
        await it.sink.wait(
            lambda r: (
                isinstance(r, WorkerReported)
                and r.report.state is EngineState.READY
                and r.report.engine_pid not in (0, pid)
            )
        )
        assert not any(isinstance(r, AttemptFailed) and r.task_id == "t1" for r in it.sink.seen)


async def test_what_cannot_be_run_fails_and_may_be_tried_elsewhere() -> None:
    async with rig(load=False) as it:
        await it.run("t1")
        no_model = await it.outcome("t1")
        await it.executor.order(
            RunAttempt(
                epoch=1,
                worker_id="p1-gpu9",
                task_id="t2",
                attempt=1,
                model_name="echo",
                task_type="text_generation",
                parameters={},
            )
        )
        no_worker = await it.outcome("t2")
        assert isinstance(no_model, AttemptFailed)
        assert isinstance(no_worker, AttemptFailed)
        assert (no_model.code, no_model.retryable) == ("model_not_loaded", True)
        assert (no_worker.code, no_worker.retryable) == ("worker_unavailable", True)


async def test_a_worker_that_is_not_ready_takes_no_run() -> None:
    async with rig(ready=False) as it:
        await it.run()
        failed = await it.outcome()
        assert isinstance(failed, AttemptFailed)
        assert (failed.code, failed.retryable) == ("worker_unavailable", True)


async def test_an_older_epoch_is_refused_and_a_newer_one_remembered() -> None:
    epochs: list[int] = []
    async with rig(remember_epoch=epochs.append) as it:
        await it.executor.order(LoadReplica(epoch=7, worker_id=it.worker_id, model=ECHO))
        with pytest.raises(Fenced, match="epoch 7"):
            await it.run(epoch=6)
        await it.run(epoch=7)
        await it.outcome()
        assert epochs == [1, 7]
        assert it.executor.epoch == 7


async def test_a_leader_whose_epoch_is_not_kept_is_not_obeyed() -> None:
    full = False

    def remember(epoch: int) -> None:
        if full:
            raise Unavailable("no space left")

    async with rig(remember_epoch=remember) as it:
        await it.run(epoch=7)
        await it.outcome()
        full = True
        with pytest.raises(Unavailable, match="no space"):
            it.executor.accept(8)
        with pytest.raises(Unavailable, match="no space"):
            await it.run("t2", epoch=8)
        assert it.executor.epoch == 7
        await it.run("t3", epoch=7)
        await it.outcome("t3")
        full = False
        it.executor.accept(8)
        with pytest.raises(Fenced, match="epoch 8"):
            it.executor.accept(7)


async def test_out_of_memory_of_a_run_is_retryable() -> None:
    async with rig() as it:
        await it.run(prompt="fault:out_of_memory")
        failed = await it.outcome()
        assert isinstance(failed, AttemptFailed)
        assert (failed.code, failed.retryable) == ("out_of_memory", True)


async def test_a_prompt_that_is_too_long_is_not_retryable() -> None:
    async with rig() as it:
        await it.run(prompt="w " * 600)
        failed = await it.outcome()
        assert isinstance(failed, AttemptFailed)
        assert (failed.code, failed.retryable) == ("prompt_too_long", False)


async def test_tokens_of_a_prompt_are_counted_by_any_engine() -> None:
    async with rig() as it:
        assert await it.executor.count_tokens(ECHO, {"prompt": "a b c"}) == (3, 512)
        it.files.path = None
        assert await it.executor.count_tokens(ECHO, {"prompt": "a b c"}) is None


async def test_nobody_to_count_tokens() -> None:
    async with rig(ready=False) as it:
        assert await it.executor.count_tokens(ECHO, {"prompt": "a b c"}) is None


async def test_a_slow_leader_does_not_pile_up_states() -> None:
    async with rig(report_interval_s=0.01) as it:
        it.sink.blocked = trio.Event()
        await trio.sleep(0.2)
        assert len(it.executor._reports) < 5
        it.sink.blocked.set()
        it.sink.blocked = None
        await it.run()
        await it.outcome()


async def test_draining_waits_for_runs_and_takes_no_more() -> None:
    async with rig(fake={"tokens_per_s": 50}) as it:
        await it.run(prompt="a b c d e f g h i j")
        assert not await it.executor.drain(0.01)
        assert await it.executor.drain(5.0)
        assert isinstance(await it.outcome(), AttemptFinished)
        await it.run("t2")
        refused = await it.outcome("t2")
        assert isinstance(refused, AttemptFailed)
        assert refused.code == "worker_unavailable"


async def test_stopping_gives_runs_back_and_ends_the_engine() -> None:
    async with rig(fake={"tokens_per_s": 1}) as it:
        await it.run(prompt="a b c d e f g h i j")
        await it.sink.kind(AttemptStarted)
        it.executor.stop()
        failed = await it.outcome()
        assert isinstance(failed, AttemptFailed)
        assert (failed.code, failed.retryable) == ("peer_stopping", True)
        await until(lambda: it.engines[0]._process is None)


async def test_many_runs_at_once() -> None:
    async with rig(allowed=QUICK) as it:
        start = len(it.sink.seen)
        for number in range(500):
            await it.run(f"n{number}", prompt=f"word{number}")
        for number in range(500):
            done = await it.outcome(f"n{number}", start)
            assert isinstance(done, AttemptFinished)
            assert done.generated_text == f"word{number}"
