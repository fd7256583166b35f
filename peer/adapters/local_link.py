"""Leader and executor in one process: orders go straight in, reports through a bounded channel."""

from __future__ import annotations

from typing import Protocol

import trio

from peer.errors import Unavailable
from peer.state.order import Order, Report

REPORTS_WAITING_MAX = 1_024


class LocalSink:
    """Implements peer.ports.ReportSink: the leader reads `reports`."""

    def __init__(self, waiting_max: int = REPORTS_WAITING_MAX) -> None:
        self._send, self.reports = trio.open_memory_channel[Report](waiting_max)

    async def report(self, report: Report) -> None:
        try:
            self._send.send_nowait(report)
        except trio.WouldBlock:
            await self._send.send(report)


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
