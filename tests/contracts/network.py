"""What every `peer.ports.Network` must do.

A test module subclasses `NetworkContract` and gives it a fixture `play`, which runs a scenario on a Stage. Scenarios
run in virtual or in real time, and rely on neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio

from peer import limits
from peer.errors import Unavailable
from peer.ports import Connection, Network

Accept = Callable[[Connection], Awaitable[None]]
WAIT_S = 10.0  # for what happens; of a real network on a busy machine
SOON_S = 0.1  # for what must not happen


class Node:
    """A peer that listens. `accepted` are the connections that came in, whose `accept` runs until it is told."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.address = ""
        self.accepted: list[Connection] = []
        self.scope = trio.CancelScope()
        self.release = trio.Event()

    async def hold(self, connection: Connection) -> None:
        self.accepted.append(connection)
        await self.release.wait()

    async def listen(self, accept: Accept, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            await self.network.listen(accept, task_status=task_status)


class Stage(ABC):
    """Where a scenario plays."""

    nursery: trio.Nursery

    @abstractmethod
    async def start(self, peer_id: str, accept: Accept | None = None) -> Node:
        """A peer that listens; `accept` is Node.hold if none is given."""

    @abstractmethod
    async def silent_address(self) -> str:
        """Where packets go and nothing ever answers."""

    @abstractmethod
    async def dead_address(self) -> str:
        """Of a host that is there and on which nobody listens."""

    async def connect(self, one: Node, other: Node, other_id: str) -> tuple[Connection, Connection]:
        """Both sides of a new connection."""
        before = len(other.accepted)
        here = await one.network.dial(other_id, other.address)
        await until(lambda: len(other.accepted) > before)
        return here, other.accepted[-1]

    async def pair(self) -> tuple[Connection, Connection]:
        """Both sides of a connection from h1 to h2."""
        return await self.connect(await self.start("h1"), await self.start("h2"), "h2")


Scenario = Callable[[Stage], Awaitable[None]]
Play = Callable[[Scenario], None]


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT_S):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.001)


async def frames(connection: Connection, count: int) -> list[bytes]:
    with trio.fail_after(WAIT_S):
        return [await connection.receive() for _ in range(count)]


async def ends(connection: Connection) -> list[bytes]:
    """What came before the end."""
    got: list[bytes] = []
    with trio.fail_after(WAIT_S):
        try:
            while True:
                got.append(await connection.receive())
        except Unavailable:
            return got


async def send_on(connection: Connection, frame: bytes) -> None:
    """Until it is broken."""
    try:
        while True:
            await connection.send(frame)
            await trio.sleep(0.001)
    except Unavailable:
        pass


async def fill(connection: Connection) -> int:
    """Send to who does not read until nothing more goes through; how many frames went."""
    sent = 0
    frame = bytes(256 * 1024)
    while True:
        with trio.move_on_after(0.3) as patience:
            await connection.send(frame)
            sent += 1
        if patience.cancelled_caught:
            return sent


class NetworkContract:
    # -------------------------------------------------------------------------------- frames

    def test_frames_arrive_whole_and_in_order_both_ways(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            sizes = [0, 1, 3, 4, 5, 1_000, 65_536, 262_143, 262_144, 262_145, 1_000_000, 0, 7]
            sent = [bytes([number]) * size for number, size in enumerate(sizes)]

            async def send(connection: Connection) -> None:
                for frame in sent:
                    await connection.send(frame)

            for one, other in ((here, there), (there, here)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send, one)
                    assert await frames(other, len(sent)) == sent

        play(scenario)

    def test_the_largest_frame_passes(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            frame = bytes(range(256)) * (limits.FRAME_BYTES_MAX // 256)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.send, frame)
                assert await frames(there, 1) == [frame]

        play(scenario)

    def test_many_small_frames_cross_while_others_come_back(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            sent = [b"%d" % number for number in range(500)]

            async def send(connection: Connection) -> None:
                for frame in sent:
                    await connection.send(frame)

            async def check(connection: Connection) -> None:
                assert await frames(connection, len(sent)) == sent

            async with trio.open_nursery() as nursery:
                for side in (here, there):
                    nursery.start_soon(send, side)
                    nursery.start_soon(check, side)

        play(scenario)

    def test_the_side_that_accepts_may_speak_first(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            async def greet(connection: Connection) -> None:
                await connection.send(b"welcome " + connection.peer_id.encode())
                await connection.send(b"x" * 100_000)
                await ends(connection)

            one, other = await stage.start("h1"), await stage.start("h2", greet)
            connection = await one.network.dial("h2", other.address)
            assert await frames(connection, 2) == [b"welcome h1", b"x" * 100_000]

        play(scenario)

    def test_several_tasks_may_send(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            sent = [bytes([number]) * (1 + number * 3_000) for number in range(40)]
            async with trio.open_nursery() as nursery:
                for frame in sent:
                    nursery.start_soon(here.send, frame)
                assert sorted(await frames(there, len(sent))) == sorted(sent)

        play(scenario)

    # -------------------------------------------------------------------------------- who it is

    def test_both_sides_know_each_other(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            assert (here.peer_id, there.peer_id) == ("h2", "h1")

        play(scenario)

    def test_another_peer_at_the_address_is_refused(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            one, other = await stage.start("h1"), await stage.start("h2")
            with pytest.raises(Unavailable, match=r"h2 answers .* in place of h3"):
                await one.network.dial("h3", other.address)
            for connection in other.accepted:
                assert await ends(connection) == []

        play(scenario)

    def test_nobody_listens(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            one = await stage.start("h1")
            began = trio.current_time()
            with pytest.raises(Unavailable):
                await one.network.dial("h2", await stage.dead_address())
            assert trio.current_time() - began < limits.DIAL_S_MAX

        play(scenario)

    def test_nobody_answers(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            one = await stage.start("h1")
            began = trio.current_time()
            with pytest.raises(Unavailable, match="does not answer"):
                await one.network.dial("h2", await stage.silent_address())
            assert trio.current_time() - began <= limits.DIAL_S_MAX + 0.5

        play(scenario)

    def test_connections_of_the_same_two_are_apart(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            one, other = await stage.start("h1"), await stage.start("h2")
            first, first_there = await stage.connect(one, other, "h2")
            second, second_there = await stage.connect(one, other, "h2")
            back, back_there = await stage.connect(other, one, "h1")
            await first.aclose()
            assert await ends(first_there) == []
            await second.send(b"a")
            await back.send(b"b")
            assert await frames(second_there, 1) + await frames(back_there, 1) == [b"a", b"b"]

        play(scenario)

    # -------------------------------------------------------------------------------- who is revoked

    def test_who_is_revoked_is_cut_off_and_let_in_no_more(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            one, other = await stage.start("h1"), await stage.start("h2")
            dialled, came = await stage.connect(one, other, "h2")
            back, back_there = await stage.connect(other, one, "h1")
            third = await stage.start("h3")
            kept, kept_there = await stage.connect(one, third, "h3")
            one.network.revoke(["h2", "h9"])
            for connection in (dialled, came, back, back_there):
                assert await ends(connection) == []
            with pytest.raises(Unavailable, match="revoked"):
                await one.network.dial("h2", other.address)
            with pytest.raises(Unavailable):
                await other.network.dial("h1", one.address)
            assert len(one.accepted) == 1
            await kept.send(b"x")
            assert await frames(kept_there, 1) == [b"x"]
            one.network.revoke([])
            await stage.connect(one, other, "h2")
            await stage.connect(other, one, "h1")

        play(scenario)

    def test_to_revoke_ends_a_dial_that_is_under_way(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            one, other = await stage.start("h1"), await stage.start("h2")
            refused: list[str] = []

            async def dial() -> None:
                with pytest.raises(Unavailable) as caught:
                    await one.network.dial("h2", other.address)
                refused.append(caught.value.message)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(dial)
                await trio.lowlevel.checkpoint()
                one.network.revoke(["h2"])
            assert len(refused) == 1
            for connection in other.accepted:
                assert await ends(connection) == []

        play(scenario)

    # -------------------------------------------------------------------------------- ends

    def test_what_was_sent_before_the_end_arrives(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            sent = [b"%d" % number * 1_000 for number in range(50)]
            for frame in sent:
                await here.send(frame)
            await here.aclose()
            assert await ends(there) == sent
            for operation in (there.receive, here.receive):
                with pytest.raises(Unavailable):
                    await operation()
            with pytest.raises(Unavailable):
                await here.send(b"late")
            await here.aclose()

        play(scenario)

    def test_who_sends_to_who_has_ended_it_hears_of_it(self, play: Play) -> None:
        """By receiving at the latest."""

        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            await there.aclose()
            with suppress(Unavailable):
                for _ in range(20):
                    await here.send(b"x")
                    await trio.sleep(0.001)
            assert await ends(here) == []

        play(scenario)

    def test_to_close_wakes_who_waits_in_it(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, _ = await stage.pair()
            woken: list[str] = []

            async def receive() -> None:
                with pytest.raises(Unavailable):
                    await here.receive()
                woken.append("receive")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await trio.sleep(0.01)
                await here.aclose()
            assert woken == ["receive"]

        play(scenario)

    def test_it_ends_when_accept_returns(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            one, other = await stage.start("h1"), await stage.start("h2")
            here, _ = await stage.connect(one, other, "h2")
            other.release.set()
            assert await ends(here) == []

        play(scenario)

    def test_all_end_when_listening_does(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            one, other = await stage.start("h1"), await stage.start("h2")
            here, _ = await stage.connect(one, other, "h2")
            other.scope.cancel()
            assert await ends(here) == []
            with pytest.raises(Unavailable):
                await one.network.dial("h2", other.address)

        play(scenario)

    # -------------------------------------------------------------------------------- who does not read

    def test_a_send_waits_for_who_does_not_read(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            sent: list[int] = []

            async def send() -> None:
                for number in range(160):
                    await here.send(bytes([number % 256]) * 262_144)
                    sent.append(number)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await trio.sleep(0.5)
                assert len(sent) < 160
                got = await frames(there, 160)
            assert [frame[0] for frame in got] == [number % 256 for number in range(160)]

        play(scenario)

    def test_to_close_does_not_wait_for_who_does_not_read(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, _ = await stage.pair()
            await fill(here)
            with trio.fail_after(1.0):
                await here.aclose()

        play(scenario)

    def test_to_close_wakes_a_send_that_waits(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, _ = await stage.pair()
            woken = trio.Event()

            async def send() -> None:
                await send_on(here, bytes(262_144))
                woken.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await trio.sleep(0.3)
                await here.aclose()
                with trio.fail_after(1.0):
                    await woken.wait()

        play(scenario)

    def test_to_close_closes_even_if_it_is_cancelled(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            with trio.CancelScope() as scope:
                scope.cancel()
                await here.aclose()
            assert await ends(there) == []

        play(scenario)

    # -------------------------------------------------------------------------------- cancelled

    def test_a_cancelled_receive_loses_nothing(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            sent = [bytes([number]) * 300_000 for number in range(20)]

            async def send() -> None:
                for frame in sent:
                    await here.send(frame)
                    await trio.sleep(0.002)

            got: list[bytes] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                with trio.fail_after(WAIT_S):
                    while len(got) < len(sent):
                        with trio.move_on_after(0.0007):
                            got.append(await there.receive())
            assert got == sent

        play(scenario)

    def test_a_cancelled_send_is_whole_or_the_end(self, play: Play) -> None:
        """What comes after it is never taken for its rest."""

        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            await fill(here)  # the last one was cancelled
            after: list[bytes] = []

            async def read() -> None:
                after.extend(await ends(there))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                try:
                    await here.send(b"after")
                except Unavailable:
                    sent_after = False
                else:
                    sent_after = True
                await here.aclose()
            assert after == [bytes(262_144)] * (len(after) - sent_after) + [b"after"] * sent_after

        play(scenario)

    def test_a_send_that_is_cancelled_at_once_sends_nothing(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            here, there = await stage.pair()
            with trio.CancelScope() as scope:
                scope.cancel()
                await here.send(b"never")
            await here.send(b"next")
            assert await frames(there, 1) == [b"next"]

        play(scenario)

    def test_a_cancelled_dial_leaves_nothing(self, play: Play) -> None:
        async def scenario(stage: Stage) -> None:
            one, other = await stage.start("h1"), await stage.start("h2")
            for delay_s in (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.004):
                with trio.move_on_after(delay_s):
                    connection = await one.network.dial("h2", other.address)
                    await connection.aclose()
            await trio.sleep(SOON_S)
            for connection in other.accepted:
                assert await ends(connection) == []
            here, _ = await stage.connect(one, other, "h2")
            await here.send(b"x")

        play(scenario)
