"""A peer that is the whole cluster: leader and executor in one process, over a store that no other peer can reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog
import trio

from peer import health, limits
from peer.errors import Unavailable
from peer.establish import load_snapshot, take_leadership
from peer.executor import Executor
from peer.journal import Journal
from peer.leader import Leader
from peer.ports import Clock, Entropy, ReportSink, Store
from peer.service import LocalCluster
from peer.state.model import Model
from peer.state.order import Order, Report
from peer.state.snapshot import Policy
from peer.streams import StreamHub

log = structlog.get_logger("node")

_POLL_S = 0.01


class SinglePeer:
    """Implements peer.node.Peer. `open` takes the leadership and reads the store."""

    def __init__(
        self,
        peer_id: str,
        executor: Callable[[ReportSink, StreamHub], Executor],
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._peer_id = peer_id
        self._clock = clock
        self._entropy = entropy
        self._streams = StreamHub(clock)
        self.executor = executor(self, self._streams)
        self._executed = trio.Event()

    async def open(
        self, store: Store, *, cluster_id: str, policy: Policy, catalogue: Mapping[str, Model]
    ) -> None:
        """Before `run`. Raises StoreError."""
        epoch = await take_leadership(store, self._peer_id)
        snapshot = await load_snapshot(
            store,
            epoch,
            peer_id=self._peer_id,
            cluster_id=cluster_id,
            policy=policy,
            catalogue=catalogue,
            clock=self._clock,
        )
        journal = Journal(store, last=snapshot.events_next - 1)
        self._leader = Leader(snapshot, journal, store, self, self._clock, self._entropy, self._streams)
        self.cluster = LocalCluster(self._leader, self.executor, self._streams, journal)
        log.info("leading", peer_id=self._peer_id, epoch=epoch, live_tasks=len(snapshot.tasks))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Raises StoreError when the store fails."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._leader.run)
            nursery.start_soon(self._execute)
            task_status.started()

    async def _execute(self) -> None:
        await self.executor.run()
        self._executed.set()

    def configure(self, policy: Policy, catalogue: Mapping[str, Model]) -> None:
        self._leader.configure(policy, catalogue)

    def stuck(self) -> str:
        """Which loop stands still: see peer.health."""
        now = trio.current_time()
        return health.stuck(now, leader=self._leader.came_round_at, executor=self.executor.came_round_at)

    async def drain(self, limit_s: float) -> bool:
        """Take no new tasks, begin none, let those that run come to their end, and end the engines."""
        self._leader.refuse_new("this peer is stopping; try another one, or again when it is back")
        done = await self.executor.drain(limit_s)
        if done:
            with trio.move_on_after(limits.TICK_S):
                while self._leader.held_tasks():
                    await self._clock.sleep(_POLL_S)
        else:
            log.warning("drain_ended", left=self._leader.held_tasks(), note="they are re-queued")
        self.executor.stop()
        with trio.move_on_after(limits.ENGINE_STOP_S_MAX + 1.0):
            await self._executed.wait()
        return done

    # ---------------------------------------------------------------- between leader and executor

    async def report(self, report: Report) -> None:
        """ports.ReportSink. There is no other leader to report to once this one has ended: so will the peer."""
        try:
            await self._leader.report(report)
        except Unavailable:
            await trio.sleep_forever()

    async def send(self, peer_id: str, order: Order) -> None:
        """ports.Link"""
        if peer_id != self._peer_id:
            raise Unavailable(f"there is no way to peer {peer_id}")
        await self.executor.order(order)
