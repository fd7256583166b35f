"""The membership of a simulated store that grows, and each host's part in it, as etcd has them.

Modelled: learners that answer nobody and catch up after a while, refusals for some seconds after a change or while a
voter is not reached, a member that learns of its removal only when it runs, a seat that outlives its peer's process and
goes with its disk.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final, Protocol

import msgspec
import trio

from peer.errors import Conflict, NotFound, StoreBroken, Unavailable
from peer.ports import Store, StoreMembers, StoreUpkeep
from peer.state.voter import Seat, StoreMember
from simulations.world.disk import SimDisk
from simulations.world.etcd_cluster import EtcdModel
from simulations.world.kernel import Incarnation
from simulations.world.room import SimRooms, SimUpkeep
from simulations.world.store import SimStore

SEAT_FILE: Final = "seat"
SETTLE_S: Final = 5.0  # after a change
CATCH_UP_S: Final = 1.5  # of a learner
PORT: Final = 2380
_POLL_S: Final = 0.25


def address_of(peer_id: str) -> str:
    return f"{peer_id}.example:{PORT}"


class Seated(Protocol):
    """As much of simulations.world.host.SimHost as tells whether its member has its data."""

    gone: bool
    disk: SimDisk


class SimRoster:
    """Who is a member of the store. It begins with one, on `first`."""

    def __init__(self, model: EtcdModel, first: str) -> None:
        self.model = model
        self.first = first
        self.entries: dict[int, StoreMember] = {}
        self.on_remove: Callable[[str, str], None] = lambda by, voter: None  # asked for, and not yet done
        self._started_at: dict[int, float] = {}
        self._changed_at = -SETTLE_S
        self._ids = 1_000
        self._enter(first, learner=False, started=True)
        self.rooms = SimRooms(model, self.entries)

    @property
    def voters(self) -> list[str]:
        return sorted(each.peer_id for each in self.entries.values() if not each.learner)

    @property
    def learners(self) -> list[str]:
        return sorted(each.peer_id for each in self.entries.values() if each.learner)

    def with_data(self, hosts: Mapping[str, Seated]) -> list[str]:
        """The voters whose hosts have their member's data, now or when they are back."""
        seats = {each.peer_id: each.member_id for each in self.entries.values() if not each.learner}
        return [
            name
            for name, seat in seats.items()
            if not hosts[name].gone and int(hosts[name].disk.read(SEAT_FILE) or 0) == seat
        ]

    def lose_room(self, share: float) -> None:
        """Below 0.5 one voter's file reaches the quota: whose, this says; else everybody's is near it."""
        ids = [each.member_id for each in self.entries.values() if not each.learner]
        if share < 0.5:
            self.rooms.fill(ids[int(2 * share * len(ids))])
        else:
            self.rooms.swell()

    def first_seat(self) -> int:
        return next(iter(self.entries), 0)

    def start(self, peer_id: str, member_id: int) -> None:
        """The member's process runs on that host for the first time."""
        member = self.entries.get(member_id)
        if member is not None and not member.peer_id:
            self.entries[member_id] = msgspec.structs.replace(member, peer_id=peer_id)
            self._started_at[member_id] = trio.current_time()

    # ---------------------------------------------------------------- changes, by way of one voter

    def add(self, by: str, address: str) -> StoreMember:
        self._require_calm(by)
        if any(each.learner for each in self.entries.values()):
            raise Conflict("etcd: too many learner members in cluster")
        if not all(self.model.reaches(by, name) for name in self.voters):
            raise Unavailable("etcd: unhealthy cluster", retry_after_s=1.0)
        member = self._enter(address, learner=True, started=False)
        self._note()
        return member

    def promote(self, by: str, member_id: int) -> None:
        self._require_calm(by)
        member = self._member(member_id)
        started_at = self._started_at.get(member_id, trio.current_time())
        if not self.model.reaches(by, member.peer_id) or trio.current_time() - started_at < CATCH_UP_S:
            raise Conflict("etcd: can only promote a learner member which is in sync with leader")
        self.entries[member_id] = msgspec.structs.replace(member, learner=False)
        self._note()

    def remove(self, by: str, member_id: int) -> None:
        member = self._member(member_id)
        if not member.learner:
            self.on_remove(by, member.peer_id)
        self._require_calm(by)
        rest = [name for name in self.voters if member.learner or name != member.peer_id]
        if 2 * sum(self.model.reaches(by, name) for name in rest) <= len(rest):
            raise Unavailable("etcd: unhealthy cluster", retry_after_s=1.0)
        del self.entries[member_id]
        self._note()

    def _enter(self, where: str, *, learner: bool, started: bool) -> StoreMember:
        self._ids += 1
        member = StoreMember(
            member_id=self._ids,
            address=address_of(where) if started else where,
            peer_id=where if started else "",
            learner=learner,
        )
        self.entries[member.member_id] = member
        return member

    def _member(self, member_id: int) -> StoreMember:
        if member_id not in self.entries:
            raise NotFound("etcd: member not found")
        return self.entries[member_id]

    def _require_calm(self, by: str) -> None:
        if not self.model.serves(by):
            raise Unavailable("etcd: no leader", retry_after_s=1.0)
        if trio.current_time() - self._changed_at < SETTLE_S:
            raise Unavailable("etcd: unhealthy cluster", retry_after_s=1.0)

    def _note(self) -> None:
        self._changed_at = trio.current_time()
        self.model.set_voters(self.voters)


class _Members:
    """peer.ports.StoreMembers through one host's member."""

    def __init__(self, roster: SimRoster, by: str) -> None:
        self._roster = roster
        self._by = by

    async def members(self) -> tuple[StoreMember, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(self._roster.entries.values())

    async def add_learner(self, address: str) -> StoreMember:
        await trio.lowlevel.checkpoint()
        return self._roster.add(self._by, address)

    async def promote(self, member_id: int) -> None:
        await trio.lowlevel.checkpoint()
        self._roster.promote(self._by, member_id)

    async def remove(self, member_id: int) -> None:
        await trio.lowlevel.checkpoint()
        self._roster.remove(self._by, member_id)


class SimVoting:
    """peer.ports.Voting of one process. The seat is on the host's disk."""

    def __init__(
        self, roster: SimRoster, incarnation: Incarnation, disk: SimDisk, rng: random.Random
    ) -> None:
        self._roster = roster
        self._incarnation = incarnation
        self._peer_id = incarnation.peer_id
        self._disk = disk
        self._rng = rng
        self._changed = trio.Event()
        self._members: StoreMembers | None = None
        self._upkeep: StoreUpkeep | None = None
        self._model = roster.model
        self._model.member_down(self._peer_id)
        incarnation.on_death(lambda how: self._model.member_down(self._peer_id))  # etcd ends with its peer
        self.seat = int(disk.read(SEAT_FILE) or 0)
        if not self.seat and incarnation.life == 1 and self._peer_id == roster.first:
            self.seat = roster.first_seat()

    @property
    def address(self) -> str:
        return address_of(self._peer_id)

    @property
    def problem(self) -> str:
        member = self._model.members[self._peer_id]
        return "etcd does not answer" if self._members and (member.frozen or not member.up) else ""

    @property
    def members(self) -> StoreMembers | None:
        return self._members

    @property
    def upkeep(self) -> StoreUpkeep | None:
        return self._upkeep

    def join(self, seat: Seat) -> None:
        if seat.member_id != self.seat:
            self._want(seat.member_id)

    def leave(self, reason: str) -> None:
        if self.seat:
            self._want(0)

    def revoke(self, serials: Collection[str]) -> None:
        pass

    def _want(self, seat: int) -> None:
        self.seat = seat
        self._changed.set()

    async def run(self, begin: Callable[[Store], None], end: Callable[[], Awaitable[None]]) -> None:
        while True:
            self._changed, seat = trio.Event(), self.seat
            try:
                self._disk.write_durably(SEAT_FILE, str(seat).encode())
            except OSError as error:
                raise StoreBroken(f"the seat cannot be kept: {error}") from error
            if seat:
                await self._live(seat, begin, end)
            else:
                await self._changed.wait()

    async def _live(
        self, seat: int, begin: Callable[[Store], None], end: Callable[[], Awaitable[None]]
    ) -> None:
        self._model.member_up(self._peer_id)
        self._roster.start(self._peer_id, seat)
        store = SimStore(self._model, self._incarnation, self._rng)
        self._members = _Members(self._roster, self._peer_id)
        self._upkeep = SimUpkeep(self._roster.rooms, self._model, self._peer_id, seat, self._rng)
        begin(store)
        try:
            while not self._changed.is_set():
                if seat not in self._roster.entries and self._hears():
                    self.leave("it was removed")
                with trio.move_on_after(_POLL_S):
                    await self._changed.wait()
        finally:
            self._members, self._upkeep = None, None
            with trio.CancelScope(shield=True):
                await end()
                await store.aclose()
                self._model.member_down(self._peer_id)

    def _hears(self) -> bool:
        """Whether some voter tells this member that it is none any more."""
        return any(self._model.reaches(self._peer_id, name) for name in self._roster.voters)
