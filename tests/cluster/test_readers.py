"""Those who wait long at a follower: for a task's end, for events that come faster than they read, across failovers."""

from __future__ import annotations

import pytest
import trio

from peer import limits
from peer.errors import Unavailable
from peer.link import session as link
from peer.link import wire
from peer.link.session import Session
from peer.state import command as asks
from peer.state.event import Event
from peer.state.task import Status
from simulations.world.fleet import Fleet
from tests.cluster.rig import follower_of, in_a_cluster, led, submission, until


def test_a_long_poll_goes_on_with_the_next_leader_however_long_it_has_waited() -> None:
    async def script(fleet: Fleet) -> None:
        old, other = fleet.leaders()[0], follower_of(fleet)
        cluster = fleet.cluster_of(other)
        assert cluster is not None
        task_id = (await cluster.call(submission(tokens=4_000))).view.task.task_id
        views: list[asks.TaskView] = []
        began = trio.current_time()

        async def poll() -> None:
            views.append(await cluster.call(asks.GetTask(task_id=task_id, wait_s=30.0)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            await trio.sleep(limits.HOLD_S_MAX + 5.0)
            fleet.hosts[old].kill()
            await until(lambda: views)
        assert led(fleet, without=old)
        assert views[0].task.status is not Status.COMPLETED
        assert trio.current_time() - began == pytest.approx(30.0, abs=0.5)

    in_a_cluster(script)


def test_a_slow_reader_of_events_misses_none_and_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EVENTS_BEHIND_MAX", 4)

    async def script(fleet: Fleet) -> None:
        leader, other = fleet.leaders()[0], follower_of(fleet)
        cluster = fleet.cluster_of(other)
        assert cluster is not None
        seen: list[Event] = []
        left: list[int] = []

        async def read() -> None:
            async with cluster.events(0) as events:
                async for event in events:
                    seen.append(event)
                    left.append(len(fleet.hosts[leader].peer.journal._readers))
                    await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for _ in range(15):
                await cluster.call(submission(tokens=1))
            await until(lambda: sum(event.event == "task_completed" for event in seen) == 15)
            nursery.cancel_scope.cancel()
        assert [event.id for event in seen] == list(range(1, len(seen) + 1))
        assert len(seen) > 20
        assert max(left) <= 2  # one that is being ended, one that is read
        await until(lambda: not fleet.hosts[leader].peer.journal._readers, 5.0)

    in_a_cluster(script)


class Stuck:
    """A connection whose other side does not read."""

    peer_id = "p2"

    async def send(self, *frames: bytes) -> None:
        await trio.sleep_forever()

    async def receive(self) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_many_that_put_leave_room_for_what_is_posted(autojump_clock: object) -> None:
    session = Session(Stuck())
    ended: list[str] = []

    async def put() -> None:
        try:
            await session.put(wire.Ping())
        except Unavailable as error:
            ended.append(error.code)

    async with trio.open_nursery() as nursery, session.serve():
        session.post(wire.Ping())
        await trio.sleep(0.1)  # that one is on its way alone
        for _ in range(limits.FRAMES_WAITING_MAX):
            nursery.start_soon(put)
        await trio.sleep(0.1)
        for _ in range(limits.FRAMES_WAITING_MAX - link._PUT_MAX):
            session.post(wire.Ping())
        assert not session.why
        with pytest.raises(Unavailable, match="does not read"):
            session.post(wire.Ping())
    assert set(ended) == {"link_broken"}
    assert len(ended) >= limits.FRAMES_WAITING_MAX - link._PUT_MAX - 1
