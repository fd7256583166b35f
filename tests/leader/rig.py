"""A leader over a store in memory, with workers that are only told of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import trio

from peer.errors import Unavailable
from peer.establish import load_snapshot, take_leadership
from peer.journal import Journal
from peer.leader import Leader
from peer.ports import Authority
from peer.service import LocalCluster
from peer.state.command import GetTask, SubmitTask, TaskView
from peer.state.model import Replica
from peer.state.order import Order, RunAttempt, WorkerReported
from peer.state.snapshot import Policy
from peer.state.task import Task
from peer.streams import StreamHub
from tests.decide.build import CATALOGUE, POLICY, T0, finished, replica, worker_report
from tests.leader.memory_store import MemoryStore


class VirtualClock:
    """trio's clock, as seconds since T0."""

    def __init__(self) -> None:
        self._began = trio.current_time()

    def now(self) -> float:
        return trio.current_time() - self._began

    def wall(self) -> float:
        return T0 + self.now()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class Counting:
    """peer.ports.Entropy without chance."""

    def __init__(self) -> None:
        self._made = 0

    def token(self, nbytes: int) -> str:
        self._made += 1
        return f"{self._made:0{2 * nbytes}x}"

    def uniform(self, low: float, high: float) -> float:
        return low


class Orders:
    """peer.ports.Link that keeps what was ordered."""

    def __init__(self) -> None:
        self.sent: list[Order] = []
        self.down = False

    async def send(self, peer_id: str, order: Order) -> None:
        if self.down:
            raise Unavailable("no way")
        self.sent.append(order)


class Rig:
    leader: Leader
    cluster: LocalCluster
    journal: Journal

    def __init__(self, store: Any, clock: VirtualClock, policy: Policy, entropy: Counting) -> None:
        self.store = store
        self.clock = clock
        self.policy = policy
        self.entropy = entropy
        self.link = Orders()
        self.streams = StreamHub(clock)
        self.scope = trio.CancelScope()
        self.authority: Authority | None = None

    async def begin(self, *, behind_max: int = 1_000) -> None:
        epoch = await take_leadership(self.store, "p1")
        self.snapshot = await load_snapshot(
            self.store,
            epoch,
            peer_id="p1",
            cluster_id="c",
            policy=self.policy,
            catalogue=CATALOGUE,
            clock=self.clock,
        )
        self.journal = Journal(self.store, self.snapshot.events_next - 1, behind_max=behind_max)
        self.leader = Leader(
            self.snapshot,
            self.journal,
            self.store,
            self.link,
            self.clock,
            self.entropy,
            self.streams,
            authority=self.authority,
            seeds=lambda: ("10.0.0.1:7946",),
        )
        self.cluster = LocalCluster(self.leader, None, self.streams, self.journal)  # type: ignore[arg-type]

    async def submit(self, **fields: Any) -> TaskView:
        return (await self.leader.call(ask(**fields))).view

    async def view(self, of: Task, wait_s: float = 0.0) -> TaskView:
        view: TaskView = await self.leader.call(GetTask(task_id=of.task_id, wait_s=wait_s))
        return view

    async def hear(self, *replicas: Replica, worker: str = "w1", **fields: Any) -> None:
        """A worker's report, and time for it to be taken in."""
        await self.leader.report(WorkerReported(report=worker_report(worker, *replicas, **fields)))
        await trio.sleep(0.001)

    async def beat(self) -> None:
        """Every second the worker says that it still has what it was given."""
        while True:
            held = self.snapshot.held.get("w1", {}).values()
            await self.hear(replica("echo"), running=tuple(f"{t.task_id}/{t.attempt}" for t in held))
            await trio.sleep(1.0)

    async def running(self, **fields: Any) -> Task:
        """A task that is assigned; a worker with room has reported."""
        task = (await self.submit(**fields)).task
        await trio.sleep(0.001)
        return self.snapshot.tasks[task.task_id]

    async def finish(self, task: Task, **fields: Any) -> None:
        await self.leader.report(finished(task, self.clock.wall(), **fields))
        await trio.sleep(0.001)

    @property
    def runs(self) -> list[RunAttempt]:
        return [order for order in self.link.sent if isinstance(order, RunAttempt)]


def ask(**fields: Any) -> SubmitTask:
    return SubmitTask(
        **{
            "task_type": "text_generation",
            "model_name": "echo",
            "parameters": {"prompt": "x"},
            "priority": 5,
            "timeout_s": 300.0,
            "owner": "o",
            "key_id": "k",
            **fields,
        }
    )


@asynccontextmanager
async def leading(
    store: Any = None, *, worker: bool = True, beats: bool = True, behind_max: int = 1_000,
    entropy: Counting | None = None, clock: VirtualClock | None = None, authority: Authority | None = None,
    **policy: Any,
) -> AsyncIterator[Rig]:  # fmt: skip
    """A leader that runs; with a worker that has `echo` unless not wanted."""
    rig = Rig(
        store if store is not None else MemoryStore(),
        clock or VirtualClock(),
        replace(POLICY, **policy),
        entropy or Counting(),
    )
    rig.authority = authority
    await rig.begin(behind_max=behind_max)
    async with trio.open_nursery() as nursery:
        rig.scope = nursery.cancel_scope
        await nursery.start(rig.leader.run)
        if worker:
            await rig.hear(replica("echo"))
            if beats:
                nursery.start_soon(rig.beat)
        yield rig
        nursery.cancel_scope.cancel()
