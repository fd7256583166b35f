"""Handing the leadership over: a leader lets go between two commits, so that nobody is left without an answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from peer import limits
from peer.answers import not_leading
from peer.errors import Conflict, Unavailable
from peer.state.command import Led, TransferLeadership
from peer.state.snapshot import Snapshot

Settled = Callable[[], AbstractAsyncContextManager[None]]
"""peer.leader.Leader.settled"""


def nobody_else() -> None:
    """What a peer that is alone says. Raises Conflict."""
    raise Conflict("this peer is alone: nobody else could lead", code="no_other_voter")


async def transfer(
    asked: TransferLeadership, snapshot: Snapshot, settled: Settled, let_go: Callable[[], None]
) -> Led:
    """Let go if the epoch is the one that is to end, which raises Unavailable `not_leading`: who asks again is answered
    by the next leader. Raises Conflict."""
    async with settled():
        if snapshot.epoch > asked.epoch:
            return Led(peer_id=snapshot.peer_id, epoch=snapshot.epoch)
        let_go()
    raise not_leading()


async def let_go_politely(settled: Settled, let_go: Callable[[], None]) -> None:
    """Between two commits, if it comes to that soon."""
    try:
        with trio.move_on_after(limits.STORE_CALL_S_MAX):
            async with settled():
                let_go()
                return
    except Unavailable:
        pass  # it leads no more
    let_go()
