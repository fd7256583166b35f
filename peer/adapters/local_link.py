"""Leader and executor in one process: orders and reports go straight across."""

from __future__ import annotations

from typing import Protocol

import trio

from peer.errors import Unavailable
from peer.ports import ReportSink
from peer.state.order import Order, Report


class LeaderSink:
    """Implements peer.ports.ReportSink. `leader` is set once it is built, before the executor runs.

    There is no other leader to report to once it leads no more: the peer is about to end.
    """

    leader: ReportSink

    async def report(self, report: Report) -> None:
        try:
            await self.leader.report(report)
        except Unavailable:
            await trio.sleep_forever()


class TakesOrders(Protocol):
    """peer.executor.Executor"""

    peer_id: str

    async def order(self, order: Order) -> None: ...


class LocalLink:
    """Implements peer.ports.Link for this one peer."""

    def __init__(self, executor: TakesOrders) -> None:
        self._executor = executor

    async def send(self, peer_id: str, order: Order) -> None:
        if peer_id != self._executor.peer_id:
            raise Unavailable(f"there is no way to peer {peer_id}")
        await self._executor.order(order)
