"""Loading and unloading on a real stand-in engine, with files that come late or never."""

from __future__ import annotations

import msgspec
import pytest
import trio

from peer.engines import FetchError
from peer.state.model import ReplicaState
from peer.state.order import AttemptFailed, LoadReplica, ReplicaLoaded, WorkerReported
from peer.state.worker import EngineState
from tests.executor.rig import ECHO, FAKE, Rig, odd_engine, rig

pytestmark = pytest.mark.process

REAL = msgspec.structs.replace(FAKE, label="cpu0", device="fake", stand_in=False)
MODEL = msgspec.structs.replace(ECHO, name="m", source="file:/models/m.gguf", size_bytes=1000)


async def order_load(it: Rig, name: str = "m") -> None:
    model = msgspec.structs.replace(MODEL, name=name)
    await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=model))


async def test_a_load_is_measured_and_reported() -> None:
    async with rig() as it:
        loaded = await it.sink.kind(ReplicaLoaded)
        assert (loaded.model_name, loaded.memory_bytes) == ("echo", 1_000_000_000)
        assert loaded.device_name
        ready = await it.replica(ReplicaState.READY)
        assert (ready.memory_bytes, ready.slots, ready.context) == (1_000_000_000, 4, 512)
        assert ready.since > 1e9


async def test_fetching_shows_its_progress_and_then_loads() -> None:
    async with rig(devices=(REAL,), load=False) as it:
        it.files.gate = trio.Event()
        await order_load(it)
        await order_load(it)
        fetching = await it.sink.wait(
            lambda r: (
                isinstance(r, WorkerReported)
                and any(x.state is ReplicaState.FETCHING and x.done == 10 for x in r.report.replicas)
            )
        )
        replica = fetching.report.replicas[0]
        assert (replica.stage, replica.total) == ("fetch", 100)
        it.files.gate.set()
        await it.replica(ReplicaState.READY, "m")
        assert it.files.fetched == ["m"]


async def test_a_fetch_that_fails_says_why_and_can_be_tried_again() -> None:
    async with rig(devices=(REAL,), load=False) as it:
        it.files.error = FetchError("not_found", "no such file there")
        await order_load(it)
        failed = await it.replica(ReplicaState.FAILED, "m")
        assert (failed.error_code, failed.error, failed.failures) == ("not_found", "no such file there", 1)
        it.files.error = None
        await order_load(it)
        ready = await it.replica(ReplicaState.READY, "m")
        assert ready.failures == 0


async def test_a_model_that_does_not_fit_fails_with_the_engines_words() -> None:
    async with rig(fake={"memory_total_bytes": 1.5e9}) as it:
        await order_load(it)
        failed = await it.replica(ReplicaState.FAILED, "m")
        assert failed.error_code == "out_of_memory"
        assert "bytes" in failed.error
        assert failed.memory_bytes == 0


async def test_fewer_slots_than_asked_for_are_told_and_are_no_measure_for_others() -> None:
    async with rig(load=False, fake={"slots_fit": 2}) as it:
        await order_load(it)
        assert (await it.replica(ReplicaState.READY, "m")).slots == 2
        assert not [report for report in it.sink.seen if isinstance(report, ReplicaLoaded)]


async def test_unloading_interrupts_runs_and_is_idempotent() -> None:
    async with rig(fake={"tokens_per_s": 2}) as it:
        await it.run(prompt="a b c d e f")
        await it.unload()
        failed = await it.outcome()
        assert isinstance(failed, AttemptFailed)
        assert (failed.code, failed.retryable) == ("unloaded", True)
        start = len(it.sink.seen)
        await it.unload()
        await it.unload("never-there")
        await it.sink.wait(lambda r: isinstance(r, WorkerReported) and not r.report.replicas, start)


async def test_unload_and_load_at_once_ends_loaded() -> None:
    async with rig() as it:
        await it.unload()
        start = len(it.sink.seen)
        await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=ECHO))
        await it.sink.kind(ReplicaLoaded, start)
        await it.replica(ReplicaState.READY, start=start)


async def test_unloading_ends_a_fetch() -> None:
    async with rig(devices=(REAL,), load=False) as it:
        it.files.gate = trio.Event()
        await order_load(it)
        await it.replica(ReplicaState.FETCHING, "m")
        start = len(it.sink.seen)
        await it.unload("m")
        await it.sink.wait(lambda r: isinstance(r, WorkerReported) and not r.report.replicas, start)
        assert it.files.fetched == []
        it.files.gate = None
        await order_load(it)
        await it.replica(ReplicaState.READY, "m", start)


async def test_a_load_ordered_while_the_engine_starts_waits_for_it() -> None:
    async with rig(ready=False) as it:
        await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=ECHO))
        await it.replica(ReplicaState.READY)


async def test_a_load_on_a_device_in_error_fails() -> None:
    broken = msgspec.structs.replace(FAKE, problem="no such card")
    async with rig(devices=(broken,), ready=False) as it:
        await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=ECHO))
        failed = await it.replica(ReplicaState.FAILED)
        assert failed.error_code == "worker_unavailable"
        assert "no such card" in failed.error


async def test_a_load_that_kills_the_engine_has_failed() -> None:
    script = (
        "say(Hello());say(Ready(device='fake',device_name='x',architecture='x',memory_total_bytes=1,self_test_s=0));"
        "f=Frames('engine');\nwhile 1:\n for m in f.feed(s.recv(99999)):\n  type(m) is Load and os._exit(9)"
    )
    async with rig(load=False, command=odd_engine(script)) as it:
        await order_load(it)
        failed = await it.replica(ReplicaState.FAILED, "m")
        assert failed.error_code == "engine_died"
        again = await it.sink.wait(
            lambda r: (
                isinstance(r, WorkerReported) and r.report.deaths == 1 and r.report.state is EngineState.READY
            )
        )
        assert again.report.replicas[0].failures == 1


async def test_the_stand_ins_model_runs_on_no_real_device() -> None:
    async with rig(devices=(REAL,), load=False) as it:
        await it.executor.order(LoadReplica(epoch=1, worker_id=it.worker_id, model=ECHO))
        failed = await it.replica(ReplicaState.FAILED)
        assert failed.error_code == "stand_in_only"
