"""The store's members and the peers that could be: who votes."""

from __future__ import annotations

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
