"""The room in a simulated store's members: files that reach their quota, and what each host can do about its own.

Modelled: an alarm that stops all writes until it is taken back, and comes again with the next write if nothing was
mended; files that shrink only when they are defragmented, during which that member answers nothing; learners that
cannot be. Not modelled: what each write takes. Files grow by faults alone.
"""

from __future__ import annotations

import random
from typing import Final

import trio

from peer.decide.space import CROWDED
from peer.errors import Unavailable
from peer.state.voter import Space, StoreMember
from simulations.world.etcd_cluster import EtcdModel

QUOTA: Final = 4 * 1024**3
USED: Final = QUOTA // 10  # of a file that was defragmented a moment ago
SWOLLEN: Final = QUOTA // 20 * 19  # near the quota, and most of it is free
DEFRAGMENT_S: Final = (0.2, 12.0)


class SimRooms:
    """`entries`: the store's members, by their ids."""

    def __init__(self, model: EtcdModel, entries: dict[int, StoreMember]) -> None:
        self._model = model
        self._entries = entries
        self._files: dict[int, int] = {}  # by member; the others' are small
        self._alarms: dict[int, None] = {}
        self._thinned: dict[int, None] = {}  # at the moment
        self.used = USED
        self.defragmented = 0
        self.disarmed = 0
        model.on_put = self._look_at_quotas

    # ---------------------------------------------------------------- faults

    def fill(self, member_id: int) -> None:
        """That member's file has reached the quota."""
        self._files[member_id] = QUOTA
        self._look_at_quotas()

    def swell(self, file_bytes: int = SWOLLEN) -> None:
        """Everybody's file is near it."""
        self._files.update(dict.fromkeys(self._entries, file_bytes))

    # ---------------------------------------------------------------- the store

    def _look_at_quotas(self) -> None:
        """Members raise their alarms when they apply what puts."""
        for member_id, member in self._entries.items():
            runs = member.peer_id and self._model.reaches(member.peer_id, member.peer_id)
            if runs and self._files.get(member_id, 0) >= QUOTA:
                self._alarms[member_id] = None
        self._model.alarmed = bool(self._alarms)

    def short(self, away: set[str]) -> str:
        """What is wrong with the room of voters, those on hosts that are `away` excepted."""
        if self._alarms:
            return f"the alarms of {', '.join(map(str, self._alarms))} are on"
        for member_id, member in self._entries.items():
            if self.is_swollen(member_id) and not member.learner and member.peer_id not in away:
                return f"the file of {member.peer_id} is near its quota"
        return ""

    def is_swollen(self, member_id: int) -> bool:
        return self._files.get(member_id, 0) >= CROWDED * QUOTA

    # ---------------------------------------------------------------- for one member

    def space(self, member_id: int) -> Space | None:
        member = self._entries.get(member_id)
        if member is None or member.learner:
            return None
        leader = [each for each, held in self._entries.items() if held.peer_id == self._model.leader]
        return Space(
            member_id=member_id,
            file_bytes=self._files.get(member_id, 2 * USED),
            used_bytes=self.used,
            quota_bytes=QUOTA,
            revision=self._model.revision,
            store_leader=leader[0] if leader else 0,
            voters=tuple(each for each, held in self._entries.items() if not held.learner),
            learners=tuple(each for each, held in self._entries.items() if held.learner),
            alarmed=tuple(self._alarms),
        )

    def disarm(self, member_id: int) -> None:
        self.disarmed += member_id in self._alarms
        self._alarms.pop(member_id, None)
        self._model.alarmed = bool(self._alarms)

    async def defragment(self, member_id: int, seconds: float) -> None:
        peer_id = self._entries[member_id].peer_id
        if self._thinned and not self._alarms:
            others = ", ".join(map(str, self._thinned))
            self._model.violated(f"{peer_id} is defragmented while {others} is", "one_member_is_defragmented")
        self._thinned[member_id] = None
        self._model.member_busy(peer_id, True)
        try:
            await trio.sleep(seconds)
            self._files[member_id] = self.used
            self.defragmented += 1
        finally:
            self._model.member_busy(peer_id, False)
            del self._thinned[member_id]


class SimUpkeep:
    """peer.ports.StoreUpkeep of one host's member."""

    def __init__(
        self, rooms: SimRooms, model: EtcdModel, peer_id: str, seat: int, rng: random.Random
    ) -> None:
        self._rooms = rooms
        self._model = model
        self._peer_id = peer_id
        self._seat = seat
        self._rng = rng

    async def look(self) -> Space | None:
        await trio.lowlevel.checkpoint()
        if not self._model.reaches(self._peer_id, self._peer_id):
            raise Unavailable("the store's member does not answer")
        return self._rooms.space(self._seat)

    async def compact(self, revision: int) -> None:
        await self._agreed()
        self._model.compact(revision)
        self._model.published.unpark_all()

    async def defragment(self) -> None:
        if await self.look() is None:
            raise Unavailable("etcd: not supported for learner")
        await self._rooms.defragment(self._seat, self._rng.uniform(*DEFRAGMENT_S))

    async def disarm(self, member_id: int) -> None:
        await self._agreed()
        self._rooms.disarm(member_id)

    async def _agreed(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self._model.serves(self._peer_id):
            raise Unavailable("etcd: no leader")
