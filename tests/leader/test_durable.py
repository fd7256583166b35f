"""What outlives a leader: tasks, events and their numbers, metrics; and what is forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from peer import limits
from peer.adapters.clock import SystemClock
from peer.adapters.stores.sqlite_store import SqliteStore
from peer.errors import Ambiguous, Compacted, Overloaded
from peer.establish import load_keys, take_leadership
from peer.ports import LEADER_KEY, Put
from peer.state import command as asks
from peer.state.key import ApiKey
from peer.state.model import Draining
from peer.state.record import encode, index_keys, key_of
from peer.state.task import Status, Task
from tests.decide.build import POLICY, T0, replica
from tests.leader.memory_store import MemoryStore
from tests.leader.rig import Counting, Rig, VirtualClock, leading

# ---------------------------------------------------------------- events


async def end_one(rig: Rig) -> None:
    await rig.finish(await rig.running())


async def take(rig: Rig, since: int | None, count: int) -> list[int]:
    async with rig.cluster.events(since) as events:
        ids = []
        async for event in events:
            ids.append(event.id)
            if len(ids) == count:
                break
    return ids


async def test_the_journal_from_any_event_each_once_and_in_order(autojump_clock: Any) -> None:
    async with leading() as rig:
        for _ in range(5):
            await end_one(rig)
        last = rig.snapshot.events_next - 1
        assert await take(rig, 0, last) == list(range(1, last + 1))
        assert await take(rig, 2, last - 2) == list(range(3, last + 1))
        with trio.move_on_after(1) as nothing:
            await take(rig, None, 1)
        assert nothing.cancelled_caught
        async with rig.cluster.events(last) as events:
            await end_one(rig)
            assert (await anext(events)).id == last + 1


async def test_what_happens_while_a_subscriber_reads_comes_once(autojump_clock: Any) -> None:
    async with leading() as rig:
        for _ in range(3):
            await end_one(rig)
        read = rig.store.range

        async def slow(*args: Any, **options: Any) -> Any:
            page = await read(*args, **options)
            if args[0].startswith("event/"):
                await trio.sleep(5)
            return page

        rig.store.range = slow
        first = rig.snapshot.events_next
        got: list[int] = []

        async def follow() -> None:
            got.extend(await take(rig, 0, first + 2))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            for _ in range(4):
                await trio.sleep(1.5)
                await end_one(rig)
        assert got == list(range(1, first + 3))


async def test_a_slow_reader_is_cut_off(autojump_clock: Any) -> None:
    async with leading(behind_max=3) as rig:
        async with rig.cluster.events(None) as events:
            for _ in range(6):
                await end_one(rig)
            for _ in range(3):
                await anext(events)
            with pytest.raises(Overloaded):
                await anext(events)
        assert rig.journal._readers == {}


async def test_events_that_are_no_longer_kept(autojump_clock: Any) -> None:
    async with leading(events_kept=4) as rig:
        for _ in range(9):
            await end_one(rig)
        with pytest.raises(Compacted):
            async with rig.cluster.events(1):
                pass
        oldest = rig.snapshot.events_from
        assert rig.snapshot.events_next - oldest == 4
        assert await take(rig, oldest - 1, 4) == list(range(oldest, oldest + 4))
        for since, gone in ((oldest - 1, oldest), (oldest, None)):  # while it is read
            async with rig.cluster.events(since) as events:
                for key in [k for k in rig.store.data if k.startswith("event/")]:
                    if gone is None or key.endswith(str(gone)):
                        del rig.store.data[key]
                with pytest.raises(Compacted):
                    await anext(events)


async def test_event_numbers_go_on_across_restarts_and_retention(autojump_clock: Any) -> None:
    store, clock, entropy = MemoryStore(), VirtualClock(), Counting()
    seen = 0
    for _ in range(4):
        async with leading(store, events_kept=5, clock=clock, entropy=entropy) as rig:
            assert rig.snapshot.events_next > seen
            seen = rig.snapshot.events_next
            for _ in range(4):
                await end_one(rig)
            assert rig.snapshot.events_next >= seen + 4
            seen = rig.snapshot.events_next - 1
            numbers = [int(key[6:]) for key in sorted(store.data) if key.startswith("event/")]
            assert numbers == list(range(seen - 4, seen + 1))


# ---------------------------------------------------------------- retention


async def test_old_and_surplus_tasks_are_forgotten(autojump_clock: Any) -> None:
    async with leading(retention_count=3, retention_age_s=60.0) as rig:
        tasks = []
        for _ in range(5):
            tasks.append(await rig.running(idempotency_key=f"i{len(tasks)}"))
            await rig.finish(tasks[-1])
        await trio.sleep(1)
        page = await rig.leader.call(asks.ListTasks(status="completed"))
        assert [task.task_id for task in page.tasks] == [task.task_id for task in reversed(tasks[2:])]
        assert (page.total, rig.snapshot.finished, len(rig.leader._answers._recent)) == (3, 3, 3)
        await trio.sleep(60)
        assert (await rig.leader.call(asks.ListTasks())).total == 0
        left = {key.partition("/")[0] for key in rig.store.data}
        assert left == {LEADER_KEY, "worker", "event", "metric"}


async def test_what_is_kept_of_finished_tasks_is_bounded_across_leaderships(autojump_clock: Any) -> None:
    store, clock, entropy = MemoryStore(), VirtualClock(), Counting()
    async with leading(store, clock=clock, entropy=entropy) as rig:
        tasks = []
        for _ in range(4):
            tasks.append(await rig.running())
            await rig.finish(tasks[-1], generated_text="x" * 100_000)
        kept = rig.snapshot.finished_bytes
        assert 400_000 < kept < 410_000
    async with leading(store, clock=clock, entropy=entropy, retention_bytes=250_000) as rig:
        await trio.sleep(2)
        assert (rig.snapshot.finished, rig.snapshot.finished_bytes) == (2, kept // 2)
        left = {key.removeprefix("result/") for key in store.data if key.startswith("result/")}
        assert left == {task.task_id for task in tasks[2:]}


async def test_retention_looks_once_a_second(autojump_clock: Any) -> None:
    """Each look is a read of the store, of a batch at most."""
    store = MemoryStore()
    await store.txn([], [put for n in range(500) for put in stored(n)])
    async with leading(store, worker=False, retention_age_s=3_600.0):
        await trio.sleep(1)
        store.calls.clear()
        await trio.sleep(10)
        assert 9 <= len([kind for kind, _ in store.calls if kind == "range"]) <= 11


async def test_retention_keeps_up_with_many(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a batch may be over at once, by age too."""
    store = MemoryStore()
    await store.txn([], [put for n in range(500) for put in stored(n)])
    async with leading(store, worker=False, retention_age_s=60.0) as rig:
        assert rig.snapshot.finished == 500
        monkeypatch.setattr(limits, "RETENTION_BATCH", 100)
        await trio.sleep(70)
        assert rig.snapshot.finished == 0
        assert not [key for key in store.data if key.startswith(("task/", "by/", "ended/"))]


def stored(n: int) -> list[Put]:
    task = Task(
        task_id=f"task-{n:08d}", task_type="text_generation", model_name="echo", priority=5, timeout_s=1.0,
        created_at=T0 - n, deadline=T0, status=Status.COMPLETED, attempt=1, worker_id=f"w{n % 2}",
        started_at=T0 - n, completed_at=T0 - n / 1_000,
    )  # fmt: skip
    return [Put(key_of(task), encode(task)), *(Put(key, b"") for key in sorted(index_keys(task)))]


# ---------------------------------------------------------------- a new leadership


async def test_what_was_acknowledged_is_there_again(autojump_clock: Any) -> None:
    store, clock, entropy = MemoryStore(), VirtualClock(), Counting()
    async with leading(store, clock=clock, entropy=entropy) as rig:
        held = await rig.running(idempotency_key="i", body_digest="d")
        ended = await rig.running()
        await rig.finish(ended)
        waiting = (await rig.submit(model_name="small")).task
        wish = asks.AssignModel(model_name="echo", worker_ids=("w1",), preload=True, priority=5)
        await rig.leader.call(wish)
        key = ApiKey(key_id="a", owner="o", scopes=("read",), secret_sha256="", created_at=0.0)
        await rig.leader.call(asks.CreateKey(key=key))
        epoch = rig.snapshot.epoch
    async with leading(store, clock=clock, entropy=entropy, beats=False) as rig:
        assert rig.snapshot.epoch > epoch
        assert set(rig.snapshot.inputs) == {held.task_id, waiting.task_id} == set(rig.snapshot.tasks)
        assert (rig.snapshot.finished, set(rig.snapshot.keys)) == (1, {"a"})
        assert set(rig.snapshot.assignments) == {("w1", "echo")}
        again = await rig.leader.call(
            asks.SubmitTask(
                task_type="text_generation", model_name="echo", parameters={}, priority=5, timeout_s=1.0,
                owner="o", key_id="k", idempotency_key="i", body_digest="d",
            )
        )  # fmt: skip
        assert (again.replayed, again.view.task.task_id) == (True, held.task_id)
        await trio.sleep(4)
        await rig.hear(replica("echo"))
        await trio.sleep(0.5)
        assert [(run.task_id, run.attempt) for run in rig.runs] == [(held.task_id, 2)]
        await rig.finish(held)  # of the attempt before: refused
        assert (await rig.view(held)).task.status is Status.ASSIGNED
        await rig.finish(rig.snapshot.tasks[held.task_id])
        view = await rig.view(held)
        assert view.result is not None
        assert view.result.attempt == 2
    fresh = Rig(store, clock, POLICY, entropy)
    await fresh.begin()
    fresh.snapshot.keys.clear()
    await load_keys(store, fresh.snapshot)
    assert set(fresh.snapshot.keys) == {"a"}


async def test_what_a_clock_that_was_ahead_kept_out_is_kept_out_for_as_long(autojump_clock: Any) -> None:
    store = MemoryStore()
    async with leading(store):
        pass
    since = T0 + 9_000.0
    ahead = Draining(worker_id="w1", model_name="echo", since=since, because="owner", until=since + 600.0)
    await store.txn([], [Put(key_of(ahead), encode(ahead))])
    async with leading(store, worker=False) as rig:
        (loaded,) = rig.snapshot.draining.values()
        assert loaded.until - rig.snapshot.started_at == 600.0


async def test_a_large_queue_is_read_page_by_page(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.establish._PAGE", 7)
    store, clock, entropy = MemoryStore(), VirtualClock(), Counting()
    async with leading(store, worker=False, clock=clock, entropy=entropy) as rig:
        for _ in range(20):
            await rig.submit()
            await trio.sleep(61)
    async with leading(store, worker=False, clock=clock, entropy=entropy) as rig:
        assert set(rig.snapshot.tasks) == set(rig.snapshot.inputs)
        assert len(list(rig.snapshot.history.starts("1m"))) >= 7


async def test_a_leader_key_that_another_takes_is_no_leadership(autojump_clock: Any) -> None:
    store = MemoryStore()
    write = store.txn

    async def taken(compare: Any, then: Any, orelse: Any = ()) -> Any:
        return await write(compare, [replace_value(each) for each in then])

    store.txn = taken  # type: ignore[method-assign]
    with pytest.raises(Ambiguous):
        await take_leadership(store, "p1")  # type: ignore[arg-type]


def replace_value(write: Any) -> Any:
    return Put(write.key, b"another") if isinstance(write, Put) else write


# ---------------------------------------------------------------- metrics


async def test_metrics_over_a_week_with_restarts(autojump_clock: Any) -> None:
    """Tasks end at known hours; the peer is away for a while, twice."""
    store, clock, entropy = MemoryStore(), VirtualClock(), Counting()
    ends: list[float] = []
    for hours in (2, 30, 3):
        async with leading(store, clock=clock, entropy=entropy, beats=False, worker=False) as rig:
            rig.leader._clock = slow_ticks(clock)
            for _ in range(hours):
                await rig.hear(replica("echo"))
                await end_one(rig)
                ends.append(clock.now())
                await trio.sleep(3_600)
        await trio.sleep(5_000)
    async with leading(store, clock=clock, entropy=entropy) as rig:
        await trio.sleep(2)
        for timeframe, span_s, width in (("1h", 3_600, 1), ("24h", 86_400, 60), ("7d", 7 * 86_400, 3_600)):
            start = int(clock.wall()) - span_s
            start += -start % width
            shown = await rig.leader.call(asks.GetMetrics(timeframe=timeframe))
            assert shown.total_tasks == sum(T0 + at >= start for at in ends), timeframe
        assert shown.total_tasks == 35
        assert shown.peak_tasks_per_minute == 1


def slow_ticks(clock: VirtualClock) -> Any:
    """The same time, but hours pass with few ticks."""

    class Slow:
        now = clock.now
        wall = clock.wall

        async def sleep(self, seconds: float) -> None:
            await trio.sleep(1_000)

    return Slow()


# ---------------------------------------------------------------- the real store


async def test_lists_read_a_page_however_many_tasks_are_finished(tmp_path: Path) -> None:
    """Keys are counted in the store; values are read for the page alone."""
    reads: list[int] = []
    async with trio.open_nursery() as nursery:
        store = await SqliteStore.open(tmp_path / "s.db", nursery, clock=SystemClock())
        try:
            for at in range(0, 20_000, 2_000):
                await store.txn([], [put for n in range(at, at + 2_000) for put in stored(n)])
            clock = VirtualClock()
            rig = Rig(store, clock, replace(POLICY, retention_count=100_000), Counting())
            await rig.begin()
            assert (rig.snapshot.finished, rig.snapshot.tasks) == (20_000, {})
            get, key_range = store.get, store.range

            async def counted_get(keys: Any) -> Any:
                reads.append(len(keys))
                return await get(keys)

            async def counted_range(*args: Any, **options: Any) -> Any:
                assert options["keys_only"]
                page = await key_range(*args, **options)
                reads.append(len(page.items))
                return page

            store.get, store.range = counted_get, counted_range  # type: ignore[method-assign]
            for query, total, first in (
                (asks.ListTasks(limit=50), 20_000, 0),
                (asks.ListTasks(limit=50, offset=15_000), 20_000, 15_000),
                (asks.ListTasks(status="completed", worker_id="w1", limit=50, offset=100), 10_000, 201),
                (asks.ListTasks(status="failed"), 0, None),
            ):
                reads.clear()
                page = await rig.leader.call(query)
                assert page.total == total
                assert sum(reads) <= 100
                assert len(reads) == 2
                if first is not None:
                    assert page.tasks[0].task_id == f"task-{first:08d}"
        finally:
            await store.aclose()
        nursery.cancel_scope.cancel()
