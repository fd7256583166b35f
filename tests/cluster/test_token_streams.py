"""A task's text on its way from the peer that runs it to a client of any other: whole, in order, whatever breaks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from peer import limits
from peer.errors import Conflict, NotFound, Unavailable
from peer.state import command as asks
from peer.state.command import StreamEnd, StreamItem, StreamRestart, StreamToken
from peer.state.task import Status
from simulations.world.cards import expected_text
from simulations.world.fleet import Fleet
from tests.cluster.rig import finished, in_a_cluster, led, submission, until

LONG = 800  # tokens, of which an engine of these makes 40 a second


class Reader:
    """What a client was given, checked as it comes: no gap, no repeat, no text of an attempt after a later one's."""

    def __init__(self) -> None:
        self.items: list[StreamItem] = []
        self.came_at: list[float] = []
        self.error: Unavailable | None = None
        self.over = False
        self.text = ""
        self.tokens = 0
        self.attempt = 0
        self.busy_s = 0.0

    async def read(self, items: AsyncIterator[StreamItem]) -> None:
        try:
            async for item in items:
                self.take(item)
                if self.busy_s:
                    await trio.sleep(self.busy_s)
        except Unavailable as error:
            self.error = error
        self.over = True

    def take(self, item: StreamItem) -> None:
        assert not self.ended
        self.items.append(item)
        self.came_at.append(trio.current_time())
        if isinstance(item, StreamRestart):
            assert item.attempt > self.attempt > 0
            assert item.reason
            self.attempt, self.text, self.tokens = item.attempt, "", 0
        elif isinstance(item, StreamToken):
            assert item.attempt == (self.attempt or item.attempt)
            assert item.index == self.tokens
            self.attempt = item.attempt
            self.text += item.text
            self.tokens += item.count

    @property
    def ended(self) -> asks.TaskView | None:
        return self.items[-1].view if self.items and isinstance(self.items[-1], StreamEnd) else None

    @property
    def restarts(self) -> list[StreamRestart]:
        return [item for item in self.items if isinstance(item, StreamRestart)]

    def require_whole(self, ask: asks.SubmitTask) -> None:
        assert self.ended is not None
        assert self.ended.task.status is Status.COMPLETED
        assert self.ended.result is not None
        assert self.text == self.ended.result.generated_text == expected_text(ask.parameters)
        assert self.tokens == self.ended.result.tokens_generated
        assert self.attempt == self.ended.result.attempt


@asynccontextmanager
async def reading(fleet: Fleet, peer: str, task_id: str, busy_s: float = 0.0) -> AsyncIterator[Reader]:
    reader = Reader()
    reader.busy_s = busy_s
    cluster = fleet.cluster_of(peer)
    assert cluster is not None
    async with cluster.stream(task_id) as items, trio.open_nursery() as nursery:
        nursery.start_soon(reader.read, items)
        yield reader
        nursery.cancel_scope.cancel()


async def running(
    fleet: Fleet, where: Callable[[str], bool] = lambda peer: True, tokens: int = LONG
) -> tuple[asks.SubmitTask, str, str]:
    """A task that has begun on such a peer, that peer, and one that neither runs it nor leads."""
    leader = fleet.leaders()[0]
    cluster = fleet.cluster_of(leader)
    assert cluster is not None
    for number in range(12):
        ask = submission(tokens=tokens, model=f"m{number % 3}")
        submitted = await cluster.call(ask)
        task_id = submitted.view.task.task_id
        with trio.fail_after(30.0):
            while True:
                view = await cluster.call(asks.GetTask(task_id=task_id))
                if view.task.status is Status.RUNNING:
                    break
                await trio.sleep(0.05)
        if where(view.peer_id):
            return ask, task_id, view.peer_id
        await cluster.call(asks.CancelTask(task_id=task_id))
    raise AssertionError("no such peer is given a task")


def third(fleet: Fleet, *others: str) -> str:
    return next(name for name in fleet.hosts if name not in others)


def hub(fleet: Fleet, peer: str):
    return fleet.hosts[peer].peer._streams


def test_a_client_of_a_follower_gets_tokens_as_they_come_and_the_leader_has_no_part_in_it() -> None:
    async def script(fleet: Fleet) -> None:
        leader = fleet.leaders()[0]
        ask, task_id, runs = await running(fleet, lambda peer: peer != leader)
        serves = third(fleet, leader, runs)
        async with reading(fleet, serves, task_id) as reader:
            await until(lambda: reader.tokens >= LONG // 4)
            assert fleet.hosts[runs].peer._relay.given == 1
            assert fleet.hosts[serves].peer._relay.taken == 1
            assert task_id not in hub(fleet, leader)._streams
            await until(lambda: reader.over)
        reader.require_whole(ask)
        assert not reader.restarts
        assert len(reader.items) > 20
        assert max(b - a for a, b in zip(reader.came_at[1:], reader.came_at[2:], strict=False)) < 1.0
        await until(lambda: not fleet.hosts[runs].peer._relay.given, 5.0)
        assert not fleet.hosts[serves].peer._relay.taken

    in_a_cluster(script)


def test_every_peer_gives_the_same_text_the_one_that_runs_it_and_late_readers_too() -> None:
    async def script(fleet: Fleet) -> None:
        ask, task_id, _ = await running(fleet, tokens=200)
        for name in fleet.hosts:
            async with reading(fleet, name, task_id) as reader:
                await until(lambda: reader.tokens)
        readers = []
        async with trio.open_nursery() as nursery:
            for name in fleet.hosts:

                async def read(name: str = name) -> None:
                    async with reading(fleet, name, task_id) as reader:
                        await until(lambda: reader.over)
                    readers.append(reader)

                nursery.start_soon(read)
        for name in fleet.hosts:
            async with reading(fleet, name, task_id) as reader:
                await until(lambda: reader.over)
            assert len(reader.items) == 2
            readers.append(reader)
        for reader in readers:
            reader.require_whole(ask)
        with pytest.raises(NotFound):
            async with fleet.cluster_of("h1").stream("task-none"):
                pass

    in_a_cluster(script)


def test_a_stream_may_be_opened_while_the_task_is_queued_and_ends_when_it_is_cancelled() -> None:
    async def script(fleet: Fleet) -> None:
        cluster = fleet.cluster_of(fleet.leaders()[0])
        submitted = await cluster.call(submission(tokens=LONG))  # its model is loaded only now
        task_id = submitted.view.task.task_id
        async with trio.open_nursery() as nursery:
            for name in fleet.hosts:

                async def read(name: str = name) -> None:
                    async with reading(fleet, name, task_id) as reader:
                        assert submitted.view.task.status is Status.QUEUED
                        await until(lambda: reader.tokens > 10)
                        await cluster.call(asks.GetTask(task_id=task_id))
                        with suppress(Conflict):
                            await cluster.call(asks.CancelTask(task_id=task_id))
                        await until(lambda: reader.over, 5.0)
                    assert reader.ended.task.status is Status.CANCELLED

                nursery.start_soon(read)

    in_a_cluster(script)


def test_a_killed_host_costs_its_attempt_and_the_next_one_is_given_whole() -> None:
    async def script(fleet: Fleet) -> None:
        leader = fleet.leaders()[0]
        ask, task_id, runs = await running(fleet, lambda peer: peer != leader)
        async with reading(fleet, third(fleet, leader, runs), task_id) as reader:
            await until(lambda: reader.tokens > 40)
            fleet.hosts[runs].kill()
            await until(lambda: reader.restarts)
            await until(lambda: reader.tokens > 40)
            assert not reader.over
            await until(lambda: reader.over)
        reader.require_whole(ask)
        assert [item.attempt for item in reader.restarts] == [2]

    in_a_cluster(script)


def test_tokens_go_on_while_nobody_leads() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        ask, task_id, runs = await running(fleet, lambda peer: peer != old)
        async with reading(fleet, third(fleet, old, runs), task_id) as reader:
            await until(lambda: reader.tokens > 40)
            fleet.hosts[old].kill()
            before = reader.tokens
            await until(lambda: led(fleet, without=old))
            assert reader.tokens > before + 40
            await until(lambda: reader.over)
        reader.require_whole(ask)
        assert not reader.restarts

    in_a_cluster(script)


def test_a_leader_that_also_runs_the_task_is_replaced_and_the_task_begins_anew() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        ask, task_id, _ = await running(fleet, lambda peer: peer == old)
        async with reading(fleet, third(fleet, old), task_id) as reader:
            await until(lambda: reader.tokens > 40)
            fleet.hosts[old].kill()
            await until(lambda: reader.over)
        reader.require_whole(ask)
        assert [item.attempt for item in reader.restarts] == [2]

    in_a_cluster(script)


def test_when_nobody_leads_for_too_long_a_stream_ends_with_an_error_after_the_text_there_is() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        _, task_id, runs = await running(fleet, lambda peer: peer != old)
        serves = third(fleet, old, runs)
        async with reading(fleet, serves, task_id) as reader:
            await until(lambda: reader.tokens > 40)
            fleet.hosts[old].kill()
            fleet.network.cut(serves, runs)  # one voter each: nobody can lead
            at = trio.current_time()
            await until(lambda: reader.over)
            assert trio.current_time() - at < 2 * limits.HOLD_S_MAX + limits.LINK_SILENT_S
        assert reader.error is not None
        assert reader.error.retry_after_s
        assert reader.ended is None
        assert reader.tokens > 40

    in_a_cluster(script)


def test_a_reader_that_is_slow_gets_more_at_a_time_and_holds_nobody_up() -> None:
    async def script(fleet: Fleet) -> None:
        leader = fleet.leaders()[0]
        ask, task_id, runs = await running(fleet, lambda peer: peer != leader)
        async with reading(fleet, third(fleet, leader, runs), task_id, busy_s=8.0) as reader:
            view = await finished(fleet, leader, task_id)
            assert view.task.attempt == 1
            await until(lambda: not fleet.hosts[runs].peer._relay.given, 5.0)
            await until(lambda: reader.over)
        reader.require_whole(ask)
        assert len(reader.items) < 8

    in_a_cluster(script)


def test_cut_off_from_the_peer_that_runs_it_a_client_still_gets_the_whole_text() -> None:
    async def script(fleet: Fleet) -> None:
        leader = fleet.leaders()[0]
        ask, task_id, runs = await running(fleet, lambda peer: peer != leader)
        serves = third(fleet, leader, runs)
        async with reading(fleet, serves, task_id) as reader:
            await until(lambda: reader.tokens > 40)
            fleet.network.cut(serves, runs)
            await trio.sleep(limits.LINK_SILENT_S + 2.0)
            stuck = reader.tokens
            await trio.sleep(2.0)
            assert reader.tokens == stuck
            await until(lambda: reader.over)
        reader.require_whole(ask)
        assert not reader.restarts

    in_a_cluster(script)


def test_connections_that_break_again_and_again_leave_no_gap_and_no_repeat() -> None:
    async def script(fleet: Fleet) -> None:
        leader = fleet.leaders()[0]
        ask, task_id, runs = await running(fleet, lambda peer: peer != leader)
        serves = third(fleet, leader, runs)
        async with reading(fleet, serves, task_id) as reader:
            for _ in range(8):
                had = reader.tokens
                await until(lambda had=had: reader.tokens > had + 20)
                fleet.network.reset(serves, runs)
                fleet.network.cut(serves, runs, for_s=0.6)  # so that there is more when they are in touch again
            await until(lambda: reader.over)
        reader.require_whole(ask)
        assert not reader.restarts
        assert len(reader.items) > 20

    in_a_cluster(script)


def test_a_peer_gives_no_more_streams_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STREAMS_MAX", 1)

    async def script(fleet: Fleet) -> None:
        leader = fleet.leaders()[0]
        ask, task_id, runs = await running(fleet, lambda peer: peer != leader, tokens=300)
        serves = third(fleet, leader, runs)
        async with reading(fleet, serves, task_id) as first, reading(fleet, leader, task_id) as second:
            await until(lambda: first.tokens > 100)
            assert fleet.hosts[runs].peer._relay.given == 1
            assert not second.tokens
            await until(lambda: first.over and second.over)
        first.require_whole(ask)
        second.require_whole(ask)

    in_a_cluster(script)


def test_streams_of_attempts_that_ended_here_are_forgotten_whoever_leads() -> None:
    async def script(fleet: Fleet) -> None:
        leader = fleet.leaders()[0]
        _, task_id, runs = await running(fleet, lambda peer: peer != leader, tokens=50)
        await finished(fleet, leader, task_id)
        assert task_id in hub(fleet, runs)._streams
        await trio.sleep(limits.STREAM_KEPT_S + 1.0)
        await running(fleet, lambda peer: peer == runs, tokens=50)
        await until(lambda: task_id not in hub(fleet, runs)._streams, 20.0)

    in_a_cluster(script)


def test_tokens_so_far_are_of_who_runs_the_attempt_or_unknown() -> None:
    """A zero would say that a task has not begun that is half done."""

    async def script(fleet: Fleet) -> None:
        (leader,) = fleet.leaders()
        cluster = fleet.cluster_of(leader)
        await trio.sleep(5.0)
        made = [(await cluster.call(submission(tokens=LONG))).view.task.task_id for _ in range(12)]
        views: list[asks.TaskView] = []

        async def both() -> bool:
            views[:] = [await cluster.call(asks.GetTask(task_id=task_id)) for task_id in made]
            return {view.peer_id == leader for view in views if view.task.status is Status.RUNNING} == {
                True,
                False,
            }

        with trio.fail_after(60.0):
            while not await both():  # noqa: ASYNC110 - each look is a question
                await trio.sleep(0.5)
        await trio.sleep(1.0)
        await both()
        running = [view for view in views if view.task.status is Status.RUNNING]
        assert all(view.tokens_so_far for view in running if view.peer_id == leader)
        assert {view.tokens_so_far for view in running if view.peer_id != leader} == {None}

    in_a_cluster(script)
