"""A voter's care for the room in its own member of the store: looks, decides, and acts; the leader also tells.

Each voter sees to its own, as nobody leads while the store is full. Errors are logged and the same is tried again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol

import structlog

from peer.decide import space
from peer.errors import Ambiguous, BitinglipError, Conflict, NotFound, Unavailable
from peer.leader import Leader
from peer.ports import Clock, Compare, Put, Store, StoreUpkeep, Voting
from peer.state.command import TransferLeadership

log = structlog.get_logger("store_space")

LOOK_S: Final = 5.0
TURN_KEY: Final = "defragmenting"  # who has it; under a lease
TURN_S: Final = 180.0  # longer than a defragmentation may take
_BEGIN_S_MAX: Final = 5.0  # one that would begin later may not be alone any more


class Following(Protocol):
    """As much of peer.follower.Follower."""

    @property
    def leader(self) -> str: ...


class Host(Protocol):
    """As much of peer.cluster_peer.ClusterPeer as this is about."""

    leader: Leader | None
    store: Store | None

    @property
    def follower(self) -> Following: ...


class SpaceKeeper:
    """`tell` hears why the store is full, "" when it is not."""

    def __init__(self, voting: Voting, host: Host, clock: Clock, tell: Callable[[str], None]) -> None:
        self._voting = voting
        self._host = host
        self._clock = clock
        self._tell = tell
        self._memory = space.Memory()
        self._said = ""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            upkeep, store = self._voting.upkeep, self._host.store
            if upkeep is None or store is None:
                self._memory = space.Memory()
                self._tell("")
            else:
                try:
                    await self._look(upkeep, store)
                except BitinglipError as error:
                    self._say(f"the store's room is not known: {error.message}")
            await self._clock.sleep(LOOK_S)

    async def _look(self, upkeep: StoreUpkeep, store: Store) -> None:
        found, leader = await upkeep.look(), self._host.leader
        if found is None:
            return
        verdict = space.look(
            found,
            self._memory,
            leads=leader is not None,
            led=leader is not None or bool(self._host.follower.leader),
            now=self._clock.now(),
        )
        self._memory = verdict.memory
        self._tell(verdict.room.message if verdict.room.level == "full" else "")
        if leader is not None:
            leader.room(verdict.room)
        if verdict.action is None:
            self._say(verdict.waits or verdict.room.message)
            return
        self._say(f"{type(verdict.action).__name__}: {verdict.action.reason}")
        await self._act(verdict.action, upkeep, store)

    async def _act(self, action: space.Action, upkeep: StoreUpkeep, store: Store) -> None:
        match action:
            case space.Compact():
                await upkeep.compact(action.revision)
            case space.Disarm():
                await upkeep.disarm(action.member_id)
            case space.Renew():
                members = self._voting.members
                if members is not None:
                    with suppress(NotFound):  # another voter has done it
                        await members.remove(action.member_id)
            case space.HandOver():
                try:
                    await self._hand_over()
                except Conflict:  # nobody else could lead
                    await self._alone(upkeep, store)
            case space.Defragment(alone=True):
                await self._alone(upkeep, store)
            case space.Defragment():
                await upkeep.defragment()

    async def _hand_over(self) -> None:
        """When it does not lead any more, it is decided anew. Raises Conflict."""
        leader = self._host.leader
        if leader is not None:
            with suppress(Unavailable):  # that is how it says that it has let go
                await leader.call(TransferLeadership(epoch=leader.epoch))

    async def _alone(self, upkeep: StoreUpkeep, store: Store) -> None:
        async with self._turn(store) as in_time:
            if in_time():
                await upkeep.defragment()

    @asynccontextmanager
    async def _turn(self, store: Store) -> AsyncIterator[Callable[[], bool]]:
        """While no other member is defragmented, by the leave of most voters. Raises Unavailable where one is."""
        begun = self._clock.now()
        lease = await store.grant(TURN_S)
        is_over = True
        try:
            mine = [Put(TURN_KEY, b"", lease.lease_id)]
            if not (await store.txn([Compare(TURN_KEY, "create_revision", 0)], mine)).succeeded:
                raise Unavailable("another member is being defragmented")
            yield lambda: self._clock.now() - begun < _BEGIN_S_MAX
        except Ambiguous:  # the member may be at it yet: the turn ends with its lease
            is_over = False
            raise
        finally:
            if is_over:
                await store.revoke(lease.lease_id)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            if text:
                log.warning("store_space", why=text)
