"""The simulated engine tells what the real supervisor with the stand-in engine tells."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import trio
from trio.testing import MockClock

from peer.adapters.devices.engine_process import EngineLimits
from peer.engines import Device
from peer.state.model import Model, ReplicaState
from peer.state.order import (
    AlertRaised,
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    EngineStarted,
    LoadReplica,
    ReplicaLoaded,
    Report,
    WorkerReported,
)
from peer.state.worker import EngineState
from simulations.world.cards import Profile
from tests.executor.rig import Rig, rig
from tests.simulations.engine_setup import SimRig

NAMES = {AttemptFinished: "finished", AttemptStarted: "started", EngineStarted: "up", ReplicaLoaded: "loaded"}
STALL_S = {"start": 9.0, "idle": 3.0, "load": 9.0, "warmup": 9.0, "prefill": 3.0, "decode": 3.0}
ALLOWED = EngineLimits(stall_s=STALL_S, backoff_s=(0.3, 0.3, 0.3), deaths_max=3, stop_s_max=1.0)
FAKE = {"memory_total_bytes": 2.5e9, "model_memory_bytes": 1e9, "load_s": 0.4, "tokens_per_s": 40.0}
SMALL = Model(name="echo", source="builtin:echo", family="echo", context=512, slots=1)


def kinds(seen: list[Report]) -> list[str]:
    """What was reported, in order; of the states reported every second, what was new.

    Not those of replicas: how many of them are coalesced into one report is left to chance in real time.
    """
    told, state = [], ""
    for report in seen:
        if isinstance(report, WorkerReported):
            if report.report.state.value != state:
                state = report.report.state.value
                told.append(f"is {state}")
        elif isinstance(report, AttemptFailed):
            told.append(f"{report.task_id} failed: {report.code}")
        elif isinstance(report, AlertRaised):
            told.append(f"alert {report.kind} {report.level} {report.raised}")
        else:
            told.append(f"{getattr(report, 'task_id', '')} {NAMES[type(report)]}".strip())
    return told


Act = Callable[[], Awaitable[None]]


async def script(it: Rig, die: Act, hang: Act) -> list[str]:
    async def run(task_id: str, words: int = 4) -> None:
        await it.run(task_id, " ".join("w" * words), max_tokens=words)

    async def ended(task_id: str) -> None:
        await it.outcome(task_id)
        await it.forget(task_id)

    async def up(act: Act) -> None:
        start = len(it.sink.seen)
        await act()
        await it.sink.kind(EngineStarted, start)
        await it.state(EngineState.READY, len(it.sink.seen) - 1)

    other = msgspec.structs.replace(SMALL, name="other")
    third = msgspec.structs.replace(SMALL, name="third")
    await run("unloaded")
    await ended("unloaded")
    await it.load(SMALL)
    await it.load(SMALL)
    await run("t1")
    await ended("t1")
    await it.load(other)
    await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=third))
    await it.replica(ReplicaState.FAILED, "third")
    await run("cancelled", 400)
    await it.sink.wait(lambda report: isinstance(report, AttemptStarted) and report.task_id == "cancelled")
    await run("behind")
    await it.stop_run("cancelled")
    await ended("behind")
    await run("too-long", 600)
    await ended("too-long")
    await run("ejected", 400)
    await it.sink.wait(lambda report: isinstance(report, AttemptStarted) and report.task_id == "ejected")
    await it.unload()
    await ended("ejected")
    await it.load(SMALL)
    await run("killed", 400)
    await it.sink.wait(lambda report: isinstance(report, AttemptStarted) and report.task_id == "killed")
    await up(die)
    await it.forget("killed")
    await it.load(SMALL)
    await run("restarted", 400)
    await it.sink.wait(lambda report: isinstance(report, AttemptStarted) and report.task_id == "restarted")
    await up(it.restart)
    await it.forget("restarted")
    await it.load(SMALL)
    await up(hang)
    await it.forget("hung")
    await up(die)
    start = len(it.sink.seen)
    await die()
    await it.state(EngineState.ERROR, start)
    await up(it.restart)
    await trio.sleep(0.2)
    return kinds(it.sink.seen)


async def of_the_model(seed: int) -> list[str]:
    device = Device(
        label="fake0", device="fake", name="stand-in", stand_in=True, memory_total_bytes=int(2.5e9)
    )
    shape = Profile(
        start_s=(0.2, 0.6),
        load_bytes_per_s=2.5e9,
        tokens_per_s=40.0,
        batch_s=0.05,
        slots_max=4,
        other_memory_bytes=int(1e9),
    )
    made = SimRig(device, shape=shape, allowed=ALLOWED, seed=seed)

    async def die() -> None:
        made.engine.die()

    async def hang() -> None:  # the stand-in starts the run that tells it to hang
        await made.run("hung", "w w w w")
        await made.sink.wait(lambda report: isinstance(report, AttemptStarted) and report.task_id == "hung")
        made.engine.hang()

    async with trio.open_nursery() as nursery:
        await nursery.start(made.executor.run)
        await made.state(EngineState.READY)
        told = await script(made, die, hang)
        made.executor.stop()
    return told


@pytest.mark.process
def test_the_model_tells_what_the_real_one_tells() -> None:
    async def real() -> list[str]:
        async with rig(load=False, allowed=ALLOWED, fake=FAKE) as it:

            async def die() -> None:
                os.kill(it.pid(), signal.SIGKILL)

            async def hang() -> None:
                await it.run("hung", "fault:hang")

            return await script(it, die, hang)

    told = trio.run(real)
    for seed in range(5):
        assert trio.run(of_the_model, seed, clock=MockClock(autojump_threshold=0)) == told
    assert len(told) > 35
