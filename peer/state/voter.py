"""The store's members and the peers that could be: who votes; and the room that is left in it."""

from __future__ import annotations

from typing import Literal

from peer.state.base import Record


class StoreMember(Record, frozen=True):
    """One member of the store. A learner has a copy of everything and no vote."""

    member_id: int  # given anew to each member: one that was removed and added again is another
    address: str  # HOST:PORT where other members reach it
    peer_id: str = ""  # "" until it has started
    learner: bool = False


class Seat(Record, frozen=True):
    """Permission to run that member of the store, and what it needs to start: every member's address by peer."""

    member_id: int
    members: dict[str, str]


class LinkedPeer(Record, frozen=True):
    """A peer with a session, or the leader itself.

    `address` is where its member of the store is or would be; "" if it may not or cannot have one. `seat` is the member
    that it runs now, 0 for none; `problem` why that does not answer. `keyed`: as a leader it could let hosts in.
    """

    peer_id: str
    address: str = ""
    seat: int = 0
    problem: str = ""
    keyed: bool = True


class VoterView(Record, frozen=True):
    """A member of the store for people. `linked`: it is believed to be up."""

    peer_id: str
    learner: bool
    linked: bool


RoomLevel = Literal["", "warning", "critical", "full"]


class Space(Record, frozen=True):
    """What one voter says of its room. Ids are members'; `store_leader` 0: it knows none.

    `file_bytes` is what counts against the quota: what is stored, its history, and free pages, which a file keeps until
    it is defragmented. `used_bytes` is that without the free pages. `alarmed`: who has reached the quota; as long as
    anybody has, no member takes a write.
    """

    member_id: int
    file_bytes: int
    used_bytes: int
    quota_bytes: int
    revision: int
    store_leader: int
    voters: tuple[int, ...]
    learners: tuple[int, ...] = ()
    alarmed: tuple[int, ...] = ()


class Room(Record, frozen=True):
    """For people: how full the store is. `level` is "", warning, critical (no new tasks) or full (no writes at all),
    `message` why it is not ""."""

    level: RoomLevel = ""
    used_bytes: int = 0
    file_bytes: int = 0
    quota_bytes: int = 0  # 0: it is not known
    message: str = ""


class RoomTold(Record, frozen=True):
    """Clients were told of this level of the store's room; volatile."""

    level: RoomLevel
