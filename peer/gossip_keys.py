"""A rotation of gossip's key, run by the peer that is asked, through its own agent."""

from __future__ import annotations

import base64
from typing import Final

import structlog
import trio

from peer.decide import gossip_key
from peer.errors import Unavailable
from peer.ports import Entropy, Gossip
from peer.state.enrol import HostView
from peer.state.member import KeyReport, KeyRotation

log = structlog.get_logger("gossip")

_KEY_BYTES: Final = 32
_STEPS_MAX: Final = 2 * gossip_key.KEYS_MAX


class GossipKeys:
    """One rotation at a time. A key that was begun with is gone on with, as long as this process lives."""

    def __init__(self, gossip: Gossip, entropy: Entropy) -> None:
        self._gossip = gossip
        self._entropy = entropy
        self._turn = trio.Lock()
        self._new = ""

    async def rotate(self, hosts: tuple[HostView, ...], *, force: bool) -> KeyRotation:
        """`hosts`: the cluster's. Raises Conflict, Unavailable; either way it may be run again."""
        async with self._turn:
            gossip_key.check(hosts, await self._gossip.members(), force=force)
            report, used, removed = await self._gossip.keys(), False, 0
            await self._require(report, "")
            before = frozenset(report.keys)
            new = self._new or self._make(report)
            for _ in range(_STEPS_MAX):
                step = gossip_key.next_step(report, new, before, used=used)
                if step is None:
                    self._new = ""
                    return KeyRotation(members=report.nodes, removed=removed)
                await self._require(await self._gossip.change_key(step), step.action)
                log.info("gossip_key_step", step=step.action, members=report.nodes)
                used = used or step.action == "use"
                removed += step.action == "remove"
                report = await self._gossip.keys()
                await self._require(report, step.action)
            raise Unavailable("members come and go: the key of gossip is not rotated yet; run it again")

    def _make(self, report: KeyReport) -> str:
        gossip_key.require_room(report)
        self._new = base64.b64encode(bytes.fromhex(self._entropy.token(_KEY_BYTES))).decode()
        return self._new

    async def _require(self, report: KeyReport, action: str) -> None:
        if not report.done:
            gossip_key.require_done(report, action, await self._gossip.members())
