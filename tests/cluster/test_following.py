"""How a peer looks for who leads: hints may be old, go in circles, or name who gave them."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from peer import limits
from peer.adapters.clock import SystemEntropy
from peer.errors import Unavailable
from peer.follower import Follower
from peer.link import wire
from peer.ports import TURNED_AWAY, Connection

WAIT_S = 60.0


class Says:
    """A connection to a peer that answers Hello with one frame, and then lives as long as it is not closed."""

    serial = ""

    def __init__(self, peer_id: str, answer: wire.Frame) -> None:
        self.peer_id = peer_id
        self._answers = [wire.encode(answer)]
        self._over = trio.Event()

    async def send(self, *frames: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._answers:
            return self._answers.pop()
        with trio.move_on_after(limits.PING_S):
            await self._over.wait()
            raise Unavailable("it is closed")
        return wire.encode(wire.Ping())

    async def aclose(self) -> None:
        self._over.set()


class Peers:
    """Directory and Network: `answers` to Hello by peer; a str is why a dial is turned away."""

    def __init__(self, answers: dict[str, wire.Frame | str]) -> None:
        self.answers = answers
        self.dialled: list[str] = []

    def candidates(self) -> tuple[str, ...]:
        return tuple(sorted(self.answers))

    def address(self, peer_id: str) -> str:
        return f"{peer_id}:1"

    async def dial(self, peer_id: str, address: str) -> Connection:
        await trio.lowlevel.checkpoint()
        self.dialled.append(peer_id)
        answer = self.answers[peer_id]
        if isinstance(answer, str):
            raise Unavailable(answer, code=TURNED_AWAY)
        return Says(peer_id, answer)

    async def listen(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a follower does not listen")

    def revoke(self, *_: Any) -> None:
        raise AssertionError("nobody is revoked")


class Obedient:
    epoch = 0

    def accept(self, epoch: int) -> None:
        pass

    async def order(self, order: Any) -> None:
        raise AssertionError("nothing is ordered")

    def report_all(self) -> None:
        pass


def follower(peers: Peers) -> Follower:
    return Follower(
        "me",
        peers,
        Obedient(),
        peers,
        SystemEntropy(),
        suspect=lambda peer_id, why: None,
        trust=lambda peer_id: None,
        revoke=lambda revoked: None,
    )


def hint(leader: str) -> wire.Refused:
    return wire.Refused(reason="this peer does not lead", leader=leader, address=f"{leader}:1")


@pytest.mark.parametrize("hints", [{"a": "b", "b": "a"}, {"a": "a", "b": "b"}, {"a": "b", "b": ""}])
def test_hints_in_circles_keep_nobody_from_the_leader(hints: dict[str, str]) -> None:
    """A voter that is cut off from the store may hold for a leader who is none any more, itself for one."""
    peers = Peers(
        {name: hint(leader) for name, leader in hints.items()}
        | {"c": wire.Welcome(peer_id="c", epoch=3, wire=wire.WIRE)}
    )
    looking = follower(peers)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(looking.run, lambda: True)
            with trio.fail_after(5.0):
                while looking.leader != "c":
                    await looking.wait_for_change()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_hint_ends_the_wait_for_a_host_that_does_not_answer() -> None:
    class OneIsGone(Peers):
        async def dial(self, peer_id: str, address: str) -> Connection:
            if peer_id != "gone":
                return await super().dial(peer_id, address)
            self.dialled.append(peer_id)
            await trio.sleep(limits.DIAL_S_MAX)
            raise Unavailable("it does not answer")

    peers = OneIsGone({"gone": hint("")})
    looking = follower(peers)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(looking.run, lambda: True)
            await trio.sleep(1.7 * limits.DIAL_S_MAX)
            looking.hint("gone", "gone:1")  # an old one
            await trio.sleep(0.1)
            assert peers.dialled == ["gone", "gone"]
            peers.answers["new"] = wire.Welcome(peer_id="new", epoch=3, wire=wire.WIRE)
            began = trio.current_time()
            looking.hint("new", "new:1")
            while looking.leader != "new":
                await looking.wait_for_change()
            assert trio.current_time() - began < 0.3
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_leader_that_is_older_than_one_that_was_followed_is_not_followed_again() -> None:
    peers = Peers({"new": wire.Welcome(peer_id="new", epoch=7, wire=wire.WIRE)})
    looking = follower(peers)
    followed: list[str] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(looking.run, lambda: True)
            while not looking.leader:
                await looking.wait_for_change()
            peers.answers = {"old": wire.Welcome(peer_id="old", epoch=6, wire=wire.WIRE)}
            looking.leave("the test ends it")
            with trio.move_on_after(10.0):
                while True:
                    await looking.wait_for_change()
                    followed.append(looking.leader)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert "old" in peers.dialled
    assert followed == [""]
    assert looking.epoch == 7


def test_a_host_that_all_turn_away_asks_seldom() -> None:
    """It was revoked, for one: each try is a handshake and a line in somebody's log."""
    peers = Peers({"a": "me has been revoked", "b": "me has been revoked"})

    async def main() -> None:
        with trio.move_on_after(600.0):
            await follower(peers).run(lambda: True)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert 60 < len(peers.dialled) < 300


def test_a_host_that_some_turn_away_asks_on() -> None:
    peers = Peers({"a": "me has too many connections", "b": hint("")})

    async def main() -> None:
        with trio.move_on_after(60.0):
            await follower(peers).run(lambda: True)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(peers.dialled) > 150
