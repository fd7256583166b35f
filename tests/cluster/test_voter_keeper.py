"""The leader's care for voters against a store whose membership fails in every way: it goes on, and says so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio
import trio.testing

from peer.answers import not_leading
from peer.decide.voters import Bounds
from peer.errors import Ambiguous, Conflict, NotFound, StoreError, Unavailable
from peer.ports import Store
from peer.state.snapshot import Snapshot
from peer.state.voter import LinkedPeer, Seat, StoreMember
from peer.voters import VoterKeeper
from simulations.world.host import POLICY


class Members:
    """peer.ports.StoreMembers. `errors` are raised by the coming changes, in turn."""

    def __init__(self, members: list[StoreMember], errors: list[Exception]) -> None:
        self.found = members
        self.errors = errors
        self.calls: list[str] = []

    def _fail(self, call: str) -> None:
        self.calls.append(call)
        if self.errors:
            raise self.errors.pop(0)

    async def members(self) -> tuple[StoreMember, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(self.found)

    async def add_learner(self, address: str) -> StoreMember:
        await trio.lowlevel.checkpoint()
        self._fail(f"add {address}")
        self.found.append(StoreMember(member_id=9, address=address, learner=True))
        return self.found[-1]

    async def promote(self, member_id: int) -> None:
        raise AssertionError("two hosts have one voter")

    async def remove(self, member_id: int) -> None:
        await trio.lowlevel.checkpoint()
        self.found = [each for each in self.found if each.member_id != member_id]
        self._fail(f"remove {member_id}")


class LeadersVoting:
    address, seat, problem = "h1:1", 1, ""

    def __init__(self, members: Members) -> None:
        self.members: Members | None = members

    def join(self, seat: Seat) -> None: ...

    def leave(self, reason: str) -> None: ...

    def revoke(self, serials: Collection[str]) -> None: ...

    async def run(self, begin: Callable[[Store], None], end: Callable[[], Awaitable[None]]) -> None: ...


class Peers:
    def __init__(self) -> None:
        self.linked = {"h2": LinkedPeer(peer_id="h2", address="h2:1")}
        self.told: list[str] = []

    def vote(self, peer_id: str, seat: Seat) -> None:
        self.told.append(f"vote {peer_id} {seat.member_id} {seat.members}")

    def unvote(self, peer_id: str, reason: str) -> None:
        self.told.append(f"unvote {peer_id}")


class Now:
    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


@asynccontextmanager
async def leads() -> AsyncIterator[None]:
    await trio.lowlevel.checkpoint()
    yield


@asynccontextmanager
async def leads_no_more() -> AsyncIterator[None]:
    await trio.lowlevel.checkpoint()
    raise not_leading()
    yield


async def keep(
    members: Members,
    peers: Peers,
    seconds: float,
    voting: LeadersVoting | None = None,
    settled: Callable[[], AbstractAsyncContextManager[None]] = leads,
) -> Snapshot:
    snapshot = Snapshot(cluster_id="c", peer_id="h1", epoch=1, started_at=0.0, policy=POLICY, catalogue={})
    keeper = VoterKeeper(
        snapshot, voting or LeadersVoting(members), peers, Now(), Bounds(steady_s=2.0, start_s=30.0), settled
    )
    with trio.move_on_after(seconds):
        await keeper.run()
    return snapshot


async def test_a_change_that_fails_is_tried_until_it_is_done(autojump_clock: trio.testing.MockClock) -> None:
    errors = [Unavailable("unhealthy"), Ambiguous("no answer"), Conflict("too many"), StoreError("what?")]
    members = Members([StoreMember(member_id=1, address="h1:1", peer_id="h1")], list(errors))
    peers = Peers()
    snapshot = await keep(members, peers, 20.0)
    assert members.calls == ["add h2:1"] * (len(errors) + 1)
    assert peers.told[0] == "vote h2 9 {'h1': 'h1:1', 'h2': 'h2:1'}"
    assert len(set(peers.told)) == 1
    assert snapshot.outlook.startswith("1 voter and no copy")


async def test_what_an_earlier_try_removed_is_removed(autojump_clock: trio.testing.MockClock) -> None:
    found = [StoreMember(member_id=number, address=f"h{number}:1", peer_id=f"h{number}") for number in (1, 2)]
    members = Members(found, [NotFound("gone")])
    peers = Peers()
    peers.linked = {"h2": LinkedPeer(peer_id="h2", address="h2:1", seat=2)}
    await keep(members, peers, 60.5)
    assert members.calls == ["remove 2"]
    assert peers.told == ["unvote h2"]


async def test_a_store_that_cannot_be_asked_ends_nothing(autojump_clock: trio.testing.MockClock) -> None:
    class Silent(Members):
        async def members(self) -> tuple[StoreMember, ...]:
            await trio.lowlevel.checkpoint()
            self._fail("members")
            return tuple(self.found)

    members = Silent([StoreMember(member_id=1, address="h1:1", peer_id="h1")], [Unavailable("silent")] * 3)
    snapshot = await keep(members, Peers(), 10.0)
    assert len(snapshot.voters) >= 1
    voting = LeadersVoting(members)
    voting.members = None  # while this host has none
    assert (await keep(members, Peers(), 3.0, voting)).voters == ()


async def test_a_leader_that_is_none_any_more_changes_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """No store fences a change of its members."""
    members = Members([StoreMember(member_id=1, address="h1:1", peer_id="h1")], [])
    await keep(members, Peers(), 20.0, settled=leads_no_more)
    assert members.calls == []
