"""Who votes: the members of the store are grown, replaced and reduced by the leader, one change at a time.

An odd number of voters is aimed at: 1, 3 or 5. Two are worse than one, since the loss of either stops both; so a
second voter is made only while a third peer is there to follow it, and unmade when none comes. Where one voter is all
there can be, a learner keeps a copy of everything. A member counts as live if its peer is linked and says that it runs
it and is answered; no change is made after which the live would not be a quorum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from peer.state.enrol import Registry
from peer.state.voter import LinkedPeer, Seat, StoreMember, VoterView

AUTOMATIC_MAX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """`wanted`: 1, 3 or 5 voters; 0: as many of these as there are peers for, at most AUTOMATIC_MAX.

    A peer whose member did not work is passed over for `retry_s`, or until it is linked anew.
    """

    wanted: int = 0
    dead_s: float = 600.0  # a voter that is away for so long is replaced if a spare is there
    pair_s: float = 60.0  # an even number of voters, and nobody to make it odd
    start_s: float = 60.0  # a new member that has not started for so long gives way; one without the key waits no more
    steady_s: float = 5.0  # a peer is counted on when it has been linked for so long
    retry_s: float = 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Roll:
    """What is known now. `peers` are those with a session and the leader; `barred` may not have a member (any more)."""

    leader: str
    members: tuple[StoreMember, ...]
    peers: Mapping[str, LinkedPeer]
    barred: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Memory:
    """Since when what is so has been so, and which peers did not get a member to work, when."""

    since: Mapping[tuple[str, str | int], float] = field(default_factory=dict)
    failed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AddLearner:
    peer_id: str
    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class Promote:
    member_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Remove:
    """`peer_id`: whose member it was, "" if that is not known."""

    member_id: int
    peer_id: str
    reason: str


Action = AddLearner | Promote | Remove


@dataclass(frozen=True, slots=True)
class Verdict:
    """One action at most, and why there is no other. `seats`: who is to be told (again) to run which member, `strays`:
    who is to be told that its member is none any more."""

    memory: Memory
    action: Action | None
    reasons: tuple[str, ...]
    seats: Mapping[str, Seat]
    strays: tuple[str, ...]


def quorum(voters: int) -> int:
    return voters // 2 + 1


def look(roll: Roll, memory: Memory, bounds: Bounds, now: float) -> Verdict:
    """`memory` is the last verdict's, a new one when a leadership begins."""
    state = _State(roll, _remembered(roll, memory, now), bounds, now)
    state.note_pair()
    action = state.decide()
    failed = state.memory.failed
    if isinstance(action, Remove) and action.peer_id and state.fails(action.member_id):
        failed = {**failed, action.peer_id: now}
    return Verdict(
        memory=replace(state.memory, failed=failed),
        action=action,
        reasons=tuple(state.reasons),
        seats=dict(_seats(roll)),
        strays=tuple(
            peer_id for peer_id in sorted(roll.peers) if state.lasted("stray", peer_id, bounds.steady_s)
        ),
    )


def barred(registry: Registry) -> frozenset[str]:
    """Peers that are revoked, and those that joined with a token of no voter."""
    return frozenset(registry.revocations) | {
        peer_id for peer_id, host in registry.hosts.items() if not host.voter
    }


def owner(member: StoreMember, peers: Mapping[str, LinkedPeer]) -> str:
    """Whose member it is: by its name, or by its address before it has started; "" if no such peer is linked."""
    if member.peer_id:
        return member.peer_id
    return next((peer.peer_id for peer in peers.values() if peer.address == member.address), "")


def _live(member: StoreMember, roll: Roll) -> bool:
    peer = roll.peers.get(member.peer_id)
    if peer is None:
        return False
    if peer.peer_id == roll.leader:
        return True
    return peer.seat == member.member_id and peer.address in (member.address, "") and not peer.problem


def _is_astray(member: StoreMember, roll: Roll) -> bool:
    """Its host is there without it: with an empty disk, at another address, or not to have one any more."""
    peer = roll.peers.get(member.peer_id)
    return (
        peer is not None
        and peer.peer_id != roll.leader
        and (peer.seat, peer.address) != (member.member_id, member.address)
    )


def _remembered(roll: Roll, memory: Memory, now: float) -> Memory:
    true: list[tuple[str, str | int]] = []
    for member in roll.members:
        if not _live(member, roll):
            true.append(("away", member.member_id))
        if _is_astray(member, roll):
            true.append(("astray", member.member_id))
    ids = {member.member_id for member in roll.members}
    for peer_id, peer in roll.peers.items():
        true.append(("linked", peer_id))
        if not peer.keyed:
            true.append(("keyless", peer_id))
        if peer.seat and peer.seat not in ids and peer_id != roll.leader:
            true.append(("stray", peer_id))
    since = {each: memory.since.get(each, now) for each in true}
    if ("pair", 0) in memory.since:
        since["pair", 0] = memory.since["pair", 0]
    return Memory(since, memory.failed)


def _seats(roll: Roll) -> Iterator[tuple[str, Seat]]:
    """For members that have not started and whose peers are linked."""
    for member in roll.members:
        peer_id = owner(member, roll.peers)
        if not member.peer_id and peer_id and peer_id not in roll.barred:
            others = [each for each in roll.members if each.member_id != member.member_id]
            if all(each.peer_id for each in others):
                addresses = {each.peer_id: each.address for each in others}
                yield (
                    peer_id,
                    Seat(member_id=member.member_id, members={**addresses, peer_id: member.address}),
                )


class _State:
    """One look. `reasons` gathers why nothing else is done."""

    def __init__(self, roll: Roll, memory: Memory, bounds: Bounds, now: float) -> None:
        self.roll = roll
        self.memory = memory
        self.bounds = bounds
        self.now = now
        self.reasons: list[str] = []
        self.voters = [member for member in roll.members if not member.learner]
        self.learners = [member for member in roll.members if member.learner]
        self.live = {member.member_id for member in roll.members if _live(member, roll)}
        self.candidates = self._candidates()

    def lasted(self, what: str, which: str | int, seconds: float) -> bool:
        since = self.memory.since.get((what, which))
        return since is not None and self.now - since >= seconds

    def fails(self, member_id: int) -> bool:
        """Whether the member's host does not get it to work."""
        (member,) = [each for each in self.roll.members if each.member_id == member_id]
        peer = self.roll.peers.get(member.peer_id)
        return not member.peer_id or (peer is not None and bool(peer.problem))

    def _candidates(self) -> list[LinkedPeer]:
        """Peers that could have the next member and can be counted on."""
        roll = self.roll
        taken = {owner(member, roll.peers) for member in roll.members}
        return [
            peer
            for peer_id, peer in sorted(roll.peers.items())
            if peer.address
            and peer_id not in roll.barred
            and peer_id not in taken
            and self.lasted("linked", peer_id, self.bounds.steady_s)
            and not self._has_failed(peer_id)
        ]

    def _has_failed(self, peer_id: str) -> bool:
        failed_at = self.memory.failed.get(peer_id)
        if failed_at is None or self.memory.since["linked", peer_id] > failed_at:
            return False
        return self.now - failed_at < self.bounds.retry_s

    def _target(self) -> int:
        if self.bounds.wanted:
            return self.bounds.wanted
        able = {peer_id for peer_id, peer in self.roll.peers.items() if peer.address}
        able |= {member.peer_id for member in self.voters}
        able -= self.roll.barred
        return min(AUTOMATIC_MAX, max(1, len(able) - 1 + len(able) % 2))

    def _quorum_without(self, gone: StoreMember) -> bool:
        rest = [member for member in self.voters if member.member_id != gone.member_id]
        return bool(rest) and self._count_live(rest) >= quorum(len(rest))

    def _count_live(self, members: list[StoreMember]) -> int:
        return sum(member.member_id in self.live for member in members)

    def _next_voter(self) -> bool:
        """Whether somebody is there to become the next voter."""
        if any(each.member_id in self.live for each in self.learners) or self.candidates:
            return True
        return any(
            not each.peer_id
            and owner(each, self.roll.peers)
            and not self.lasted("away", each.member_id, self.bounds.start_s)
            for each in self.learners
        )

    def note_pair(self) -> None:
        """Remember since when there is an even number of voters and nobody to make it odd."""
        since = dict(self.memory.since)
        if len(self.voters) % 2 == 0 and not self._next_voter():
            since.setdefault(("pair", 0), self.now)
        else:
            since.pop(("pair", 0), None)
        self.memory = replace(self.memory, since=since)

    # ---------------------------------------------------------------- rules, the most urgent first

    def decide(self) -> Action | None:
        if self._count_live(self.voters) < quorum(len(self.voters)):
            self.reasons.append("the store has no quorum of linked voters: its membership cannot be changed")
            return None
        for rule in (
            self._remove_barred,
            self._remove_astray,
            self._remove_idle_learner,
            self._remove_excess,
            self._replace_dead,
            self._promote,
            self._add,
            self._part_pair,
        ):
            action = rule()
            if action is not None:
                return action
        return None

    def _remove(self, member: StoreMember, reason: str) -> Remove | None:
        name = owner(member, self.roll.peers)
        if not member.learner and not self._quorum_without(member):
            self.reasons.append(f"{name} stays a voter ({reason}): without it the rest would be no quorum")
            return None
        return Remove(member.member_id, name, reason)

    def _remove_barred(self) -> Action | None:
        for member in self.roll.members:
            name = owner(member, self.roll.peers)
            if name in self.roll.barred and name != self.roll.leader:
                action = self._remove(member, f"{name} may not have a member of the store")
                if action is not None:
                    return action
        return None

    def _remove_astray(self) -> Action | None:
        for member in self.roll.members:
            if self.lasted("astray", member.member_id, self.bounds.steady_s):
                action = self._remove(
                    member, f"{member.peer_id} is there, and this member is not its own any more"
                )
                if action is not None:
                    return action
        return None

    def _remove_idle_learner(self) -> Action | None:
        for member in self.learners:
            if self.candidates and self.lasted("away", member.member_id, self.bounds.start_s):
                name = owner(member, self.roll.peers) or member.address
                verb = "is silent" if member.peer_id else "has not started"
                return self._remove(
                    member,
                    f"the learner of {name} {verb} for {self.bounds.start_s:g} s, and others are there",
                )
        return None

    def _remove_excess(self) -> Action | None:
        most = self.bounds.wanted or AUTOMATIC_MAX
        if len(self.voters) <= most:
            return None
        return self._remove_least(f"there are {len(self.voters)} voters, {most} are wanted")

    def _remove_least(self, reason: str) -> Action | None:
        """One that is away before one that is live; never the leader's own."""
        others = [member for member in self.voters if member.peer_id != self.roll.leader]
        others.sort(key=lambda member: (member.member_id not in self.live, member.peer_id), reverse=True)
        return self._remove(others[0], reason)

    def _replace_dead(self) -> Action | None:
        for member in self.voters:
            if self.lasted("away", member.member_id, self.bounds.dead_s):
                spare = [peer.peer_id for peer in self.candidates]
                spare += [each.peer_id for each in self.learners if each.member_id in self.live]
                if not spare:
                    self.reasons.append(f"{member.peer_id} is away, and no peer is there to replace it")
                    continue
                return self._remove(
                    member,
                    f"{member.peer_id} is away for {self.bounds.dead_s:g} s, and {spare[0]} is there",
                )
        return None

    def _promote(self) -> Action | None:
        many = len(self.voters)
        for member in self.learners:
            if member.member_id not in self.live or many >= self._target():
                continue
            if self._waits_for_key(member.peer_id):
                self.reasons.append(f"{member.peer_id} stays a learner until it has got the CA's key")
            elif many % 2 and not self.candidates:
                self.reasons.append(
                    f"{member.peer_id} stays a learner: with {many + 1} voters no more losses are survived than with "
                    f"{many}, and no further peer is there"
                )
            else:
                return Promote(
                    member.member_id, f"{member.peer_id} follows; voter {many + 1} of {self._target()}"
                )
        return None

    def _waits_for_key(self, peer_id: str) -> bool:
        """A leader without the key lets nobody in, nor gets it from itself. A voter without it is better than none."""
        keyed = self.roll.peers[peer_id].keyed
        return not keyed and not self.lasted("keyless", peer_id, self.bounds.start_s)

    def _add(self) -> Action | None:
        many = len(self.voters)
        if self.learners or not self.candidates or (many >= self._target() and many > 1):
            return None
        if self._count_live(self.voters) < many:  # etcd refuses
            self.reasons.append("a member is added when all voters are there")
            return None
        peer = self.candidates[0]
        reason = f"voter {many + 1} of {self._target()}" if many < self._target() else "a copy of everything"
        return AddLearner(peer.peer_id, peer.address, f"{peer.peer_id} learns: {reason}")

    def _part_pair(self) -> Action | None:
        if not self.lasted("pair", 0, self.bounds.pair_s):
            return None
        many = len(self.voters)
        return self._remove_least(
            f"{many} voters survive no more losses than {many - 1}, and no other peer came"
        )


# ---------------------------------------------------------------- for people


def views(roll: Roll) -> tuple[VoterView, ...]:
    """The store's members, voters first."""
    found = [
        VoterView(
            peer_id=owner(member, roll.peers) or member.address,
            learner=member.learner,
            linked=_live(member, roll),
        )
        for member in roll.members
    ]
    return tuple(sorted(found, key=lambda each: (each.learner, each.peer_id)))


def outlook(found: tuple[VoterView, ...]) -> str:
    """What the loss of a host would mean right now."""
    voters = [each for each in found if not each.learner]
    copies = [each.peer_id for each in found if each.learner and each.linked]
    many, up = len(voters), sum(each.linked for each in voters)
    spare = up - quorum(many)
    if many == 1:
        name = voters[0].peer_id
        if copies:
            return (
                f"1 voter: if {name} is lost, the cluster stops and needs `bitinglip takeover` on {copies[0]}"
            )
        return f"1 voter and no copy: if {name} is lost, the cluster stops, and what it knew is lost with its disk"
    if many == 2:
        return "2 voters: if either is lost, the cluster stops until it is back"
    if spare <= 0:
        return f"{up} of {many} voters are up: one more loss stops the cluster until one is back"
    may = "any one" if spare == 1 else f"any {spare}"
    if up == many:
        return f"{many} voters: {may} may be lost"
    return f"{up} of {many} voters are up: {may} of them may be lost"
