"""The stream hub: late and early readers, restarts, ends, bounds. Virtual time."""

from __future__ import annotations

from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from peer.adapters.clock import SystemClock
from peer.state.command import StreamRestart, StreamToken
from peer.streams import StreamHub


class Clock(SystemClock):
    def __init__(self) -> None:
        super().__init__()
        self.time_s = 0.0

    def now(self) -> float:
        return getattr(self, "time_s", 0.0)


async def follow(hub: StreamHub, into: list[Any], task_id: str = "t") -> None:
    async with hub.subscribe(task_id) as items:
        async for item in items:
            into.append(item)


async def test_an_early_and_a_late_reader_get_the_same_text() -> None:
    hub = StreamHub(Clock())
    early: list[Any] = []
    late: list[Any] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, hub, early)
        await wait_all_tasks_blocked()
        for word in ("a", " b", " c"):
            hub.publish("t", 1, word, 1)
            await wait_all_tasks_blocked()
        nursery.start_soon(follow, hub, late)
        await wait_all_tasks_blocked()
        hub.publish("t", 1, " d", 2)
        hub.end("t")
    assert early == [
        StreamToken(attempt=1, index=index, text=text, count=count)
        for index, text, count in ((0, "a", 1), (1, " b", 1), (2, " c", 1), (3, " d", 2))
    ]
    assert late == [
        StreamToken(attempt=1, index=0, text="a b c", count=3),
        StreamToken(attempt=1, index=3, text=" d", count=2),
    ]
    after: list[Any] = []
    await follow(hub, after)
    assert after == [StreamToken(attempt=1, index=0, text="a b c d", count=5)]


async def test_what_is_ready_comes_as_one() -> None:
    hub = StreamHub(Clock())
    seen: list[Any] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, hub, seen)
        await wait_all_tasks_blocked()
        for number in range(100):
            hub.publish("t", 1, str(number % 10), 1)
        await wait_all_tasks_blocked()
        hub.end("t")
    assert len(seen) == 1
    assert seen[0].count == 100


async def test_a_new_attempt_voids_the_old_one() -> None:
    hub = StreamHub(Clock())
    seen: list[Any] = []
    async with trio.open_nursery() as nursery:
        hub.publish("t", 1, "lost", 1)
        nursery.start_soon(follow, hub, seen)
        await wait_all_tasks_blocked()
        hub.restart("t", 2, "engine_died")
        await wait_all_tasks_blocked()
        assert hub.tokens_so_far("t") == 0
        hub.publish("t", 1, "of the dead", 1)
        hub.publish("t", 2, "kept", 1)
        hub.restart("t", 2, "again")
        await wait_all_tasks_blocked()
        hub.publish("t", 3, "third", 1)
        hub.end("t")
    assert seen == [
        StreamToken(attempt=1, index=0, text="lost", count=1),
        StreamRestart(attempt=2, reason="engine_died"),
        StreamToken(attempt=2, index=0, text="kept", count=1),
        StreamRestart(attempt=3, reason="the attempt before ended without a result"),
        StreamToken(attempt=3, index=0, text="third", count=1),
    ]
    assert hub.tokens_so_far("t") == 1


async def test_a_reader_that_came_first_sees_no_restart_for_a_later_first_attempt() -> None:
    hub = StreamHub(Clock())
    seen: list[Any] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, hub, seen)
        await wait_all_tasks_blocked()
        hub.restart("t", 2, "x")
        await wait_all_tasks_blocked()
        hub.end("t")
    assert seen == []


async def test_nothing_is_kept_of_tasks_that_nobody_wrote_or_reads() -> None:
    hub = StreamHub(Clock())
    hub.end("never")
    hub.restart("never", 2, "x")
    with trio.move_on_after(0):
        await follow(hub, [], "t")
    assert len(hub) == 0
    assert hub.tokens_so_far("t") == 0


async def test_ended_streams_are_kept_for_a_time_and_up_to_a_number() -> None:
    clock = Clock()
    hub = StreamHub(clock, kept_s=60.0, kept_max=3)
    for number in range(10):
        hub.publish(f"t{number}", 1, "x", 1)
        hub.end(f"t{number}")
    assert len(hub) == 3
    clock.time_s = 61.0
    hub.publish("last", 1, "x", 1)
    hub.end("last")
    hub.publish("last", 1, "too late", 1)
    assert len(hub) == 1
    assert hub.tokens_so_far("last") == 1
