"""Who may lead, and when: a voter's decisions about the leader key, and a leader's about itself.

The store alone gives authority: whoever holds the leader key leads, and the key's create-revision is the epoch. A
leader writes a fenced beat every BEAT_S. The key goes when its lease ends; evidence that the leader is gone only
hurries that up, and only past the *silence guard*: a voter removes another's key in one transaction that holds if the
beat is still the one it had read at least GUARD_S before. A leader that can write can therefore not be deposed by those
who merely cannot see it.

What is read may be old, so that the guard runs also while the store elects a leader of its own: a beat that was read
had been begun by then, and if it is not the newest one, the transaction does not hold.

What follows for reads: a leader that began a beat at time t, acknowledged later, has not been deposed before
t + GUARD_S; and one that began to keep its lease alive at time k, acknowledged later, has not lost it before
k + LEASE_TTL_S. So until t + READ_FRESH_S and k + LEASE_SURE_S, both shorter, its memory is the newest there is. One of
the two alone is not enough: a lease may end although beats go on. (Durations only: no two clocks are compared. The
differences of the bounds allow clocks to differ in rate by a quarter.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peer.limits import GUARD_S, LEASE_SURE_S, READ_FRESH_S, STEP_DOWN_S
from peer.state.member import Member
from peer.state.voter import LinkedPeer, VoterView

_LOOK_S = 1.0  # how often a voter without evidence looks at the leader key
_LOOK_CLOSELY_S = 0.25  # and one with evidence: a leader that stops politely gives the key back at once


@dataclass(frozen=True, slots=True)
class Seen:
    """The leader key and the beat, both of one revision; `ended` is when the read had returned."""

    epoch: int  # 0: nobody leads
    holder: str
    address: str  # of the holder's link
    beat_revision: int  # 0: never beaten
    ended: float


def key_value(peer_id: str, address: str, nonce: str) -> bytes:
    """What the leader key holds: who leads, where its link is, and what makes this try's value its own."""
    return f"{peer_id} {address} {nonce}".encode()


def holder_of(value: bytes) -> tuple[str, str]:
    """The peer and the address of its link in a leader key's value; "" for what is not there."""
    peer_id, _, rest = value.decode(errors="replace").partition(" ")
    return peer_id, rest.partition(" ")[0]


@dataclass(frozen=True, slots=True)
class Guard:
    """This beat of this epoch was already there at `since`."""

    epoch: int
    beat_revision: int
    since: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again after so long, or as soon as there is new evidence."""

    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Campaign:
    """Put the leader key if nobody has."""

    reason: str


@dataclass(frozen=True, slots=True)
class Depose:
    """Delete the leader key if it is of this epoch and, unless `beat_revision` is None, the beat has not moved."""

    epoch: int
    beat_revision: int | None
    reason: str


Action = Wait | Campaign | Depose


def candidate(
    peer_id: str, seen: Seen, guard: Guard | None, evidence: str, now: float, aside_until: float = 0.0
) -> tuple[Guard | None, Action]:
    """What a voter that does not lead does next. `evidence`: why the holder is believed gone, "" if it is not.

    Until `aside_until` a free key is left to the others. The guard is what to remember until the next look.
    """
    if seen.epoch == 0 and now < aside_until:
        return None, Wait(_LOOK_CLOSELY_S, "this peer has led, and leaves it to another one")
    if seen.epoch == 0:
        return None, Campaign("nobody leads")
    if seen.holder == peer_id:
        return None, Depose(seen.epoch, None, "the leadership of an earlier life of this peer")
    if not evidence:
        return None, Wait(_LOOK_S, f"{seen.holder} leads under epoch {seen.epoch}")
    if guard is None or (guard.epoch, guard.beat_revision) != (seen.epoch, seen.beat_revision):
        guard = Guard(seen.epoch, seen.beat_revision, seen.ended)
    left = guard.since + GUARD_S - now
    if left > 0:
        return guard, Wait(
            min(left, _LOOK_CLOSELY_S), f"{seen.holder} may be gone ({evidence}): is its beat still?"
        )
    return guard, Depose(seen.epoch, seen.beat_revision, f"{evidence}, and no beat for {GUARD_S:g} s")


def heirs(
    leader: str, voters: Iterable[VoterView], members: Iterable[Member], linked: Mapping[str, LinkedPeer]
) -> tuple[str, ...]:
    """The peers that could lead at once instead: voters with a session whose store answers.

    Who votes is what the store's members say; where others run the store, what the peers say in their tags.
    """
    voting = {each.peer_id for each in voters if not each.learner} or {
        each.peer_id for each in members if each.tags.get("voter") == "1"
    }
    return tuple(sorted(name for name in voting - {leader} if name in linked and not linked[name].problem))


def vouched(beat_begun: float, kept_begun: float, now: float) -> bool:
    """Whether an acknowledged beat and keepalive that were begun then vouch for what a leader reads in its memory."""
    return now - beat_begun < READ_FRESH_S and now - kept_begun < LEASE_SURE_S


def must_step_down(beat_begun: float, now: float) -> bool:
    """Whether a leader has been without an acknowledged beat for too long to go on."""
    return now - beat_begun >= STEP_DOWN_S
