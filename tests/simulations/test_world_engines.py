"""The simulated engine under the real executor and a mock clock."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from peer import limits
from peer.engines import FetchError
from peer.state.model import ReplicaState
from peer.state.order import (
    AlertRaised,
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    EngineStarted,
    LoadReplica,
    Report,
)
from peer.state.worker import EngineState
from simulations.world.cards import GIB, catalogue, devices, expected_text
from simulations.world.files import SimFiles
from tests.simulations.engine_setup import BIG, ECHO, PROFILE, SimRig, sim

# ---------------------------------------------------------------- what it does when all is well


async def test_a_run_gives_the_one_right_text_and_takes_its_time(autojump_clock: MockClock) -> None:
    async with sim() as it:
        parameters = {"prompt": "one two three", "max_tokens": 100, "seed": 7}
        began = trio.current_time()
        await it.run(**parameters)
        outcome = await it.outcome()
        assert isinstance(outcome, AttemptFinished)
        assert outcome.generated_text == expected_text(parameters)
        assert (outcome.tokens_generated, outcome.prompt_tokens, outcome.finish_reason) == (100, 3, "length")
        assert 100 / PROFILE.tokens_per_s <= trio.current_time() - began < 100 / PROFILE.tokens_per_s + 1.0


def test_other_parameters_have_another_answer() -> None:
    base = {"prompt": "one", "max_tokens": 3, "seed": 1}
    others = [{**base, "prompt": "two"}, {**base, "max_tokens": 4}, {**base, "seed": 2}, {"prompt": "one"}]
    texts = {expected_text(each) for each in [base, *others]}
    assert len(texts) == 5
    assert expected_text(base) == expected_text(dict(base))


async def test_more_runs_than_slots_wait_their_turn(autojump_clock: MockClock) -> None:
    async with sim() as it:
        for n in range(10):
            await it.run(f"t{n}", max_tokens=40)
        outcomes = [await it.outcome(f"t{n}") for n in range(10)]
        assert all(isinstance(each, AttemptFinished) for each in outcomes)
        assert outcomes[9].at - outcomes[0].at > 1.5  # three rounds of four slots


async def test_loads_take_their_time_and_their_memory(autojump_clock: MockClock) -> None:
    async with sim(load=False) as it:
        start = it.since()
        await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=ECHO))
        await it.replica(ReplicaState.FETCHING, "echo", start)
        await it.replica(ReplicaState.LOADING, "echo", start)
        assert it.card.held() == {"echo": (4 * GIB, "loading")}
        replica = await it.replica(ReplicaState.READY, "echo", start)
        assert it.card.held() == {"echo": (4 * GIB, "ready")}
        assert replica.memory_bytes == 4 * GIB
        assert replica.load_s == pytest.approx(2.0)
        assert it.sim_files.local(ECHO) is not None
        await it.unload()
        await trio.sleep(0.1)
        assert it.card.held() == {"echo": (4 * GIB, "unloading")}
        await trio.sleep(0.5)
        assert it.card.held() == {}
        assert it.card.peak_bytes == 4 * GIB


async def test_what_does_not_fit_is_refused_and_noted(autojump_clock: MockClock) -> None:
    async with sim() as it:
        await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=BIG))
        replica = await it.replica(ReplicaState.FAILED, "big")
        assert replica.error_code == "out_of_memory"
        (refusal,) = it.card.refusals
        assert (refusal.model, refusal.held_bytes, refusal.foreign_bytes, refusal.forced) == (
            "big",
            4 * GIB,
            0,
            False,
        )


async def test_a_cancelled_run_frees_its_slot(autojump_clock: MockClock) -> None:
    async with sim() as it:
        await it.run(max_tokens=4_000)
        await it.sink.kind(AttemptStarted)
        await it.stop_run()
        await trio.sleep(limits.CANCEL_S_MAX * 2)
        assert it.engine.lives == 1
        assert it.card.busy == 0.0
        assert not any(isinstance(report, AttemptFinished | AttemptFailed) for report in it.sink.seen)


async def test_tokens_are_counted(autojump_clock: MockClock) -> None:
    async with sim() as it:
        assert await it.executor.count_tokens(ECHO, {"prompt": "one two"}) == (2, 512)


def test_a_cluster_has_devices_and_models_that_do_not_all_fit() -> None:
    assert [device.label for device in devices(2)] == ["gpu0", "gpu1"]
    models = catalogue(5)
    total = sum(model.memory_bytes for model in models)
    assert max(model.memory_bytes for model in models) < devices(1)[0].memory_total_bytes < total


# ---------------------------------------------------------------- faults


async def test_death_restarts_it_and_fails_what_it_held(autojump_clock: MockClock) -> None:
    async with sim() as it:
        await it.run(max_tokens=4_000)
        await it.sink.kind(AttemptStarted)
        start = it.since()
        it.engine.die()
        outcome = await it.outcome(start=start)
        assert isinstance(outcome, AttemptFailed)
        assert (outcome.code, outcome.retryable) == ("engine_died", True)
        await trio.sleep(0.1)
        assert it.card.held() == {}
        await it.state(EngineState.RESTARTING, start)
        assert (await it.state(EngineState.READY, it.since())).deaths == 1
        started = await it.sink.kind(EngineStarted, start)
        assert 0.4 <= started.downtime_s <= 2.3


async def test_too_many_deaths_are_a_quarantine_that_a_restart_ends(autojump_clock: MockClock) -> None:
    async with sim(load=False) as it:
        for _ in range(limits.DEATHS_MAX):
            start = it.since()
            it.engine.die()
            await it.state(EngineState.RESTARTING, start)
            if it.engine.lives < limits.DEATHS_MAX:
                await it.state(EngineState.READY, it.since())
        report = await it.state(EngineState.ERROR, start)
        assert "quarantined for 600 s" in report.message
        start, began = it.since(), trio.current_time()
        await it.restart()
        await it.state(EngineState.READY, start)
        assert trio.current_time() - began < 3.0


async def test_a_quarantine_ends_by_itself(autojump_clock: MockClock) -> None:
    async with sim(load=False) as it:
        for _ in range(limits.DEATHS_MAX):
            await trio.sleep(30)
            it.engine.die()
        await it.state(EngineState.ERROR)
        began = trio.current_time()
        await it.state(EngineState.READY, it.since())
        assert limits.QUARANTINE_S - 5 < trio.current_time() - began < limits.QUARANTINE_S + 5


@pytest.mark.parametrize(
    ("busy", "limit_s"), [(False, limits.STALL_S["idle"]), (True, limits.STALL_S["prefill"])]
)
async def test_a_hang_is_ended_when_its_phase_allows_no_more(
    autojump_clock: MockClock, busy: bool, limit_s: float
) -> None:
    async with sim() as it:
        it.engine.hang()
        began, start = trio.current_time(), it.since()
        if busy:
            await it.run()
        await it.state(EngineState.RESTARTING, start)
        assert limit_s - 1.5 < trio.current_time() - began < limit_s + 1.5
        if busy:
            outcome = await it.outcome(start=start)
            assert isinstance(outcome, AttemptFailed)
            assert "no sign of life" in outcome.message
        await it.state(EngineState.READY, it.since())


@pytest.mark.parametrize("mended", [True, False])
async def test_a_short_hang_goes_unnoticed(autojump_clock: MockClock, mended: bool) -> None:
    async with sim() as it:
        it.engine.hang(1e9 if mended else 8.0)
        await it.run()
        await trio.sleep(5.0)
        assert not any(isinstance(report, AttemptStarted) for report in it.sink.seen)
        if mended:
            it.engine.mend()
        assert isinstance(await it.outcome(), AttemptFinished)
        assert it.engine.lives == 1


async def test_a_restart_of_one_that_hangs_takes_as_long_as_it_may(autojump_clock: MockClock) -> None:
    async with sim() as it:
        it.engine.hang()
        began, start = trio.current_time(), it.since()
        await it.restart()
        await it.sink.kind(EngineStarted, start)
        assert limits.ENGINE_STOP_S_MAX < trio.current_time() - began < limits.ENGINE_STOP_S_MAX + 2.5


async def test_one_that_ignores_a_cancel_is_killed(autojump_clock: MockClock) -> None:
    async with sim() as it:
        it.engine.ignore_cancel(60.0)
        await it.run(max_tokens=4_000)
        await it.sink.kind(AttemptStarted)
        start = it.since()
        await it.stop_run()
        report = await it.state(EngineState.RESTARTING, start)
        assert "still held its slot" in report.message


async def test_slow_is_slow_for_a_while(autojump_clock: MockClock) -> None:
    async with sim() as it:
        it.engine.slow(10.0, 5.0)
        began = trio.current_time()
        await it.run(max_tokens=100)
        await it.outcome()
        assert 6.5 < trio.current_time() - began < 8.0  # 5 s for 20 tokens, 2 s for the rest


async def test_loads_and_runs_that_fail(autojump_clock: MockClock) -> None:
    async with sim(load=False) as it:
        for fault, code in (
            (it.engine.load_fails, "bad_model_file"),
            (it.engine.out_of_memory_next_load, "out_of_memory"),
        ):
            fault()
            start = it.since()
            await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=ECHO))
            assert (await it.replica(ReplicaState.FAILED, "echo", start)).error_code == code
            assert it.card.held() == {}
        assert [refusal.forced for refusal in it.card.refusals] == [True]
        await it.load()
        it.engine.runs_fail()
        await it.run()
        outcome = await it.outcome()
        assert isinstance(outcome, AttemptFailed)
        assert (outcome.code, outcome.retryable) == ("out_of_memory", True)


@pytest.mark.parametrize(
    "kind", ["duplicate_finished", "late_finished", "unknown_run", "finished_after_cancel"]
)
async def test_wrong_answers_do_not_confuse_a_worker(autojump_clock: MockClock, kind: Any) -> None:
    async with sim() as it:
        it.engine.answers_wrong(kind)
        if kind == "finished_after_cancel":
            await it.run("t0", max_tokens=400)
            await it.sink.kind(AttemptStarted)
            await it.stop_run("t0")
        await it.run(max_tokens=20)
        began = trio.current_time()
        outcome = await it.outcome()
        assert isinstance(outcome, AttemptFinished)
        assert (trio.current_time() - began > 5.0) == (kind == "late_finished")
        await trio.sleep(1.0)
        assert sum(isinstance(report, AttemptFinished) for report in it.sink.seen) == 1
        assert it.engine.faults.wrong == {kind: 0}


async def test_what_is_not_the_protocol_is_a_death(autojump_clock: MockClock) -> None:
    async with sim(load=False) as it:
        it.engine.babbles()
        assert "not the protocol" in (await it.state(EngineState.RESTARTING)).message
        it.engine.babbles("early")
        start = it.since()
        assert (await it.state(EngineState.READY, start)).deaths == 2


async def test_one_that_computes_wrongly_waits_for_somebody(autojump_clock: MockClock) -> None:
    async with sim(load=False) as it:
        it.engine.self_test_fails()
        await it.restart()
        assert "computes wrongly" in (await it.state(EngineState.ERROR)).message
        await trio.sleep(700.0)
        start = it.since()
        await it.restart()
        await it.state(EngineState.READY, start)


async def test_mended_is_as_new(autojump_clock: MockClock) -> None:
    async with sim(load=False) as it:
        engine = it.engine
        engine.load_fails()
        engine.slow(100.0, 1e6)
        engine.ignore_cancel(1e6)
        engine.answers_wrong("late_finished")
        engine.runs_fail()
        engine.out_of_memory_next_load()
        it.card.foreign_memory(15 * GIB, 1e6)
        it.sim_files.fetch_fails()
        engine.mend()
        it.card.mend()
        it.sim_files.mend()
        await it.load()
        await it.run(max_tokens=40)
        assert isinstance(await it.outcome(), AttemptFinished)


async def test_heat_and_foreign_memory_are_measured(autojump_clock: MockClock) -> None:
    async with sim(telemetry=True) as it:
        it.card.overheats(99.0, 10.0)
        it.card.foreign_memory(100 * GIB, 10.0)
        assert it.card.used_bytes() == it.card.total_bytes
        start = it.since()
        for kind in ("temperature", "memory"):
            for raised in (True, False):

                def want(report: Report, kind: str = kind, raised: bool = raised) -> bool:
                    return isinstance(report, AlertRaised) and (report.kind, report.raised) == (kind, raised)

                await it.sink.wait(want, start)
        await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=BIG))
        await it.replica(ReplicaState.FAILED, "big")


async def test_a_dead_incarnation_holds_nothing(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        made = SimRig(devices(1)[0])
        await nursery.start(made.executor.run)
        await made.state(EngineState.READY)
        await made.load()
        assert made.card.held_bytes() == 4 * GIB
        made.life.alive = False
        assert made.card.held_bytes() == 0
        nursery.cancel_scope.cancel()
    assert not made.engine.alive


async def test_files_come_late_or_not(autojump_clock: MockClock) -> None:
    files, seen = SimFiles(bytes_per_s=GIB), []
    files.fetch_fails()
    with pytest.raises(FetchError):
        await files.fetch(ECHO, lambda *progress: seen.append(progress))
    assert seen[-1][0] == "fetch"
    assert files.local(ECHO) is None
    files.slow(5.0, 100.0)
    began = trio.current_time()
    path = await files.fetch(ECHO, lambda *progress: None)
    assert trio.current_time() - began == pytest.approx(5.0)
    assert files.local(ECHO) == path == await files.fetch(ECHO, lambda *progress: None)
    files.lose_disk()
    assert files.local(ECHO) is None
