"""Who votes where the leader makes voters: what it may ask of the store, and what must have come of it in the end."""

from __future__ import annotations

from typing import Final

from peer.decide.voters import Bounds, quorum
from simulations.world.fleet import Fleet
from simulations.world.kernel import World

BOUNDS: Final = Bounds(dead_s=40.0, pair_s=20.0, start_s=20.0, steady_s=3.0, retry_s=120.0)
_STALE_S: Final = 1.0  # what the leader knew when it decided
_VOTERS: Final = 3


class Electorate:
    """`asked`: how often a voter was to go. Without a roster nothing is looked at."""

    def __init__(self, world: World, fleet: Fleet) -> None:
        self.asked = 0
        self._world = world
        self._fleet = fleet
        self._linked_at: dict[tuple[str, str], float] = {}  # (leader, voter)
        if fleet.roster is not None:
            fleet.roster.on_remove = self._removes

    def look(self) -> None:
        """Every now and then: with whom leaders have sessions."""
        if self._fleet.roster is None:
            return
        for leader in self._fleet.leaders():
            for name in self._linked(leader):
                self._linked_at[leader, name] = self._world.now()

    def _linked(self, leader: str) -> list[str]:
        peer = self._fleet.hosts[leader].peer
        followers = peer._followers if peer is not None else None
        return [n for n, each in followers.linked.items() if not each.problem] if followers else []

    def _removes(self, by: str, voter: str) -> None:
        """Before and after it those with sessions must be a quorum. The store is not asked yet."""
        self.asked += 1
        now, linked = self._world.now(), self._linked(by)
        voters = self._fleet.voters()
        rest = [name for name in voters if name != voter]
        for group in (voters, rest):
            live = [
                name
                for name in group
                if name == by or name in linked or now - self._linked_at.get((by, name), -99.0) < _STALE_S
            ]
            if len(live) < quorum(len(group)):
                self._world.violated(
                    "quorum_is_not_given_away", f"{by} removes {voter}: it sees {live} of {group}"
                )

    def unsettled(self) -> str:
        """Three vote, as there are that many hosts; each is up and knows it."""
        hosts, voters = self._fleet.hosts, self._fleet.voters()
        there = [name for name, host in hosts.items() if not host.gone]
        wanted = _VOTERS if len(there) >= _VOTERS else 1
        if len(voters) != wanted:
            return f"{', '.join(voters)} vote, and {len(there)} hosts are there"
        for name in voters:
            peer = hosts[name].peer
            if peer is None or peer.election is None:
                return f"{name} votes and does not know it"
        return ""
