"""Hosts and a store's membership without a network or etcd: what a leader's decisions about voters do to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from peer.decide import voters
from peer.decide.voters import AddLearner, Bounds, Memory, Promote, Remove, Roll, look, quorum
from peer.state.voter import LinkedPeer, StoreMember

BOUNDS = Bounds(dead_s=20.0, pair_s=6.0, start_s=6.0, steady_s=2.0, retry_s=400.0)


@dataclass
class Peer:
    """A host of the model. `broken`: a member never starts there; `problem`: why the one it runs does not answer;
    `keyed`: it has the CA's key."""

    linked: bool = True
    eligible: bool = True
    broken: bool = False
    problem: str = ""
    seat: int = 0
    keyed: bool = True


@dataclass
class Model:
    """A store's membership and hosts, without a network or etcd: what actions do, and what may never be."""

    hosts: dict[str, Peer]
    members: dict[int, StoreMember] = field(default_factory=dict)
    barred: frozenset[str] = frozenset()
    bounds: Bounds = BOUNDS
    leader: str = "h1"
    memory: Memory = field(default_factory=Memory)
    now: float = 0.0
    ids: int = 100
    done: list[voters.Action] = field(default_factory=list)
    reasons: tuple[str, ...] = ()

    def add(self, name: str, *, learner: bool = False, started: bool = True, seated: bool = True) -> int:
        self.ids += 1
        peer_id = name if started else ""
        self.members[self.ids] = StoreMember(
            member_id=self.ids, address=f"{name}:1", peer_id=peer_id, learner=learner
        )
        if seated and name in self.hosts:
            self.hosts[name].seat = self.ids
        return self.ids

    def roll(self) -> Roll:
        peers = {
            name: LinkedPeer(
                peer_id=name,
                address=f"{name}:1" if host.eligible else "",
                seat=host.seat,
                problem=host.problem,
                keyed=host.keyed,
            )
            for name, host in self.hosts.items()
            if host.linked
        }
        return Roll(leader=self.leader, members=tuple(self.members.values()), peers=peers, barred=self.barred)

    def voters(self) -> list[StoreMember]:
        return [each for each in self.members.values() if not each.learner]

    def live(self) -> int:
        return sum(self.is_live(each) for each in self.voters())

    def is_live(self, member: StoreMember) -> bool:
        host = self.hosts.get(member.peer_id)
        return host is not None and host.linked and host.seat == member.member_id and not host.problem

    def step(self, *, refuse: bool = False, seconds: float = 1.0) -> voters.Action | None:
        self.now += seconds
        had_quorum = self.live() >= quorum(len(self.voters()))
        verdict = look(self.roll(), self.memory, self.bounds, self.now)
        self.memory, self.reasons = verdict.memory, verdict.reasons
        for name in verdict.strays:
            assert self.hosts[name].seat not in self.members
            self.hosts[name].seat = 0
        for name, seat in verdict.seats.items():
            self.hosts[name].seat = seat.member_id
            if not self.hosts[name].broken:
                member = self.members[seat.member_id]
                self.members[seat.member_id] = StoreMember(
                    member_id=member.member_id, address=member.address, peer_id=name, learner=member.learner
                )
        if verdict.action is not None:
            assert had_quorum
            if not refuse:
                self.apply(verdict.action)
                assert self.live() >= quorum(len(self.voters()))
        return verdict.action

    def apply(self, action: voters.Action) -> None:
        self.done.append(action)
        match action:
            case AddLearner():
                assert not any(each.learner for each in self.members.values())
                assert self.live() == len(self.voters())  # else etcd refuses
                self.add(action.peer_id, learner=True, started=False, seated=False)
            case Promote():
                member = self.members[action.member_id]
                assert member.learner
                assert self.is_live(member)
                self.members[action.member_id] = StoreMember(
                    member_id=member.member_id, address=member.address, peer_id=member.peer_id
                )
            case Remove():
                assert action.peer_id != self.leader
                del self.members[action.member_id]
                if action.peer_id in self.hosts and self.hosts[action.peer_id].linked:
                    self.hosts[action.peer_id].seat = 0

    def settle(self, seconds: int = 150) -> None:
        for _ in range(seconds):
            self.step()

    def names(self, *, learner: bool = False) -> list[str]:
        return sorted(each.peer_id for each in self.members.values() if each.learner is learner)
