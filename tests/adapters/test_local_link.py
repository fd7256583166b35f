"""Orders and reports within one process."""

from __future__ import annotations

import pytest

from peer.adapters.local_link import LeaderSink, LocalLink
from peer.errors import Unavailable
from peer.state.order import EngineStarted, Order, Report, RestartEngine

ORDER = RestartEngine(epoch=1, worker_id="p1-fake0")
REPORT = EngineStarted(worker_id="p1-fake0", downtime_s=1.0)


class Both:
    """An executor's orders and a leader's reports."""

    peer_id = "p1"

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.reports: list[Report] = []

    async def order(self, order: Order) -> None:
        self.orders.append(order)

    async def report(self, report: Report) -> None:
        self.reports.append(report)


async def test_orders_go_to_the_executor_of_that_name() -> None:
    executor = Both()
    link = LocalLink(executor)
    await link.send("p1", ORDER)
    assert executor.orders == [ORDER]
    with pytest.raises(Unavailable, match="p2"):
        await link.send("p2", ORDER)


async def test_reports_go_to_the_leader() -> None:
    leader, sink = Both(), LeaderSink()
    sink.leader = leader
    await sink.report(REPORT)
    assert leader.reports == [REPORT]
