"""Who is in the cluster, as gossip shows it: polled, compared with what was known, and told on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import structlog

from peer import limits
from peer.decide import members
from peer.errors import Unavailable
from peer.ports import Clock, Gossip
from peer.state.member import Member

_SEEDS_MAX: Final = 8

log = structlog.get_logger("membership")


class Membership:
    """`rumour(member)` hears of each change of a member's status."""

    def __init__(self, peer_id: str, gossip: Gossip, clock: Clock, rumour: Callable[[Member], None]) -> None:
        self._peer_id = peer_id
        self._gossip = gossip
        self._clock = clock
        self._rumour = rumour
        self._tags: dict[str, str] = {}
        self.members: Mapping[str, Member] = MappingProxyType({})

    def announce(self, tags: dict[str, str]) -> None:
        """Tell the others at the next poll; see peer.decide.members.tags."""
        self._tags = tags

    async def run(self) -> None:
        """Until cancelled. An agent that does not answer leaves what was known."""
        problem = ""
        while True:
            try:
                await self._poll()
                problem = ""
            except Unavailable as error:
                if not problem:  # once: it may last
                    log.warning("gossip_not_answering", why=error.message)
                problem = error.message
            await self._clock.sleep(limits.GOSSIP_POLL_S)

    async def _poll(self) -> None:
        after = {member.peer_id: member for member in await self._gossip.members()}
        changes = members.changes(self.members, after)
        self.members = MappingProxyType(after)
        for member in changes:
            log.info("member_changed", peer_id=member.peer_id, status=member.status)
            self._rumour(member)
        tags, mine = self._tags, after.get(self._peer_id)
        if mine is None or mine.tags != tags:  # changed here, or lost by an agent that started anew
            await self._gossip.set_tags(tags)

    def seeds(self) -> tuple[str, ...]:
        """Gossip's addresses of some members that are alive, for a new one."""
        alive = [each for each in self.members.values() if each.status == "alive"]
        return tuple(map(_address, alive[:_SEEDS_MAX]))

    # ---------------------------------------------------------------- peer.follower.Directory

    def candidates(self) -> tuple[str, ...]:
        """Whom gossip calls the leader, then voters, the living first."""
        leader = members.leader(self.members.values())
        voters = [each for each in self.members.values() if each.tags.get("voter") == "1"]
        voters.sort(key=lambda each: (each.status != "alive", each.peer_id))
        names = [each.peer_id for each in voters]
        if leader is None:
            return tuple(names)
        return (leader.peer_id, *(name for name in names if name != leader.peer_id))

    def address(self, peer_id: str) -> str | None:
        member = self.members.get(peer_id)
        return (member.tags.get("link") or None) if member is not None else None


def _address(member: Member) -> str:
    host = f"[{member.address}]" if ":" in member.address else member.address
    return f"{host}:{member.port}"
