"""What a leader answers to queries: from its memory while that is the newest there is, else from the store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

import msgspec
import trio

from peer.decide import admit, meter, view
from peer.errors import NotFound, Unavailable
from peer.ports import Clock, Store
from peer.registrar import Registrar
from peer.state import command as asks
from peer.state.enrol import GetAuthority, ListHosts
from peer.state.plan import Plan
from peer.state.record import decode, list_prefix, prefix_end
from peer.state.snapshot import Snapshot
from peer.state.task import Status, Task, TaskResult, stage
from peer.streams import StreamHub

_RECENT_MAX: Final = 1_000  # finished tasks kept in memory for those who wait for them
_RECENT_BYTES_MAX: Final = 16_384  # of a result; larger ones are read from the store


class Voucher(Protocol):
    """Whether this peer's memory is still the newest: peer.election.Leadership. `lost` says why it leads no more."""

    lost: str

    def fresh(self) -> bool: ...

    async def renewed(self) -> None:
        """Until `fresh` may have changed."""


class Alone:
    """The voucher of a store that no other peer can reach."""

    lost = ""

    def fresh(self) -> bool:
        return True

    async def renewed(self) -> None:
        await trio.lowlevel.checkpoint()


def not_leading() -> Unavailable:
    return Unavailable("this peer does not lead any more", code="not_leading", retry_after_s=1.0)


class Answers:
    """`settled` is entered to read the snapshot: nothing is in flight then, and no other peer can have led since."""

    def __init__(
        self,
        snapshot: Snapshot,
        store: Store,
        clock: Clock,
        streams: StreamHub,
        registrar: Registrar,
        settled: Callable[[], AbstractAsyncContextManager[None]],
    ) -> None:
        self._snapshot = snapshot
        self._store = store
        self._clock = clock
        self._streams = streams
        self._registrar = registrar
        self._settled = settled
        self._waiting: dict[str, trio.Event] = {}  # by task
        self._over = False
        self._recent: OrderedDict[str, asks.TaskView] = OrderedDict()

    # ---------------------------------------------------------------- what the leader tells

    def ended(self, task: Task, result: TaskResult | None) -> None:
        """It is durable that this task is finished."""
        if result is None or result.nbytes <= _RECENT_BYTES_MAX:
            self._recent[task.task_id] = asks.TaskView(task=task, result=result)
            if len(self._recent) > _RECENT_MAX:
                self._recent.popitem(last=False)
        self.moved(task.task_id)

    def moved(self, task_id: str) -> None:
        """It is durable that this task is finished, assigned or queued again."""
        waiting = self._waiting.pop(task_id, None)
        if waiting is not None:
            waiting.set()

    def forget(self, task_id: str) -> None:
        self._recent.pop(task_id, None)

    def end(self) -> None:
        """This peer leads no more: who waits is told."""
        self._over = True
        for waiting in self._waiting.values():
            waiting.set()

    # ---------------------------------------------------------------- queries

    async def query(self, query: asks.Query) -> Any:
        """Raises NotFound; Unavailable when this peer does not lead any more."""
        match query:
            case asks.GetTask():
                return await self._get_task(query)
            case asks.ListTasks():
                return await self._list_tasks(query)
        async with self._settled():
            return self._read(query)

    def _read(self, query: asks.Query) -> Any:
        snapshot, now = self._snapshot, self._clock.wall()
        match query:
            case asks.ListWorkers():
                return view.workers(snapshot, now)
            case asks.GetWorker():
                return view.worker(snapshot, now, query.worker_id)
            case asks.ListAssignments():
                return view.assignments(snapshot)
            case asks.ListModels():
                return view.models(snapshot)
            case asks.GetStatus():
                return view.cluster(snapshot, now)
            case asks.GetMetrics():
                return meter.metrics(snapshot, query.timeframe, now)
            case asks.ListKeys():
                return tuple(snapshot.keys.values())
            case asks.GetPlan():
                return self._plan(query.rebalance_id)
            case GetAuthority():
                return self._registrar.key(query)
            case ListHosts():
                return self._registrar.hosts()
            case _:
                raise TypeError(f"not a query: {type(query).__name__}")

    def _plan(self, rebalance_id: str) -> Plan:
        plan = self._snapshot.plans.get(rebalance_id)
        if plan is None:
            raise NotFound(f"there is no rebalance `{rebalance_id}`", code="rebalance_not_found")
        return plan

    async def _get_task(self, query: asks.GetTask) -> asks.TaskView:
        with trio.move_on_after(query.wait_s):
            while self._must_wait(query):
                await self._waiting.setdefault(query.task_id, trio.Event()).wait()
        async with self._settled():
            task = self._snapshot.tasks.get(query.task_id)
            if task is not None:
                live = view.live_task(self._snapshot, self._clock.wall(), task)
                elsewhere = live.peer_id not in ("", self._snapshot.peer_id)
                tokens = None if elsewhere else self._streams.tokens_so_far(task.task_id)
                return msgspec.structs.replace(live, tokens_so_far=tokens)
            recent = self._recent.get(query.task_id)
        if recent is not None:
            return recent
        stored = await self._stored_task(query.task_id)
        if stored is None:
            raise admit.no_task(query.task_id)
        return stored

    def _must_wait(self, query: asks.GetTask) -> bool:
        task = self._snapshot.tasks.get(query.task_id)
        if task is None or self._over or query.wait_s <= 0.0:
            return False
        return query.past is None or stage(task) <= query.past

    async def _stored_task(self, wanted: str) -> asks.TaskView | None:
        found = await self._store.get([f"task/{wanted}", f"result/{wanted}"])
        task, result = found.get(f"task/{wanted}"), found.get(f"result/{wanted}")
        if task is None:
            return None
        return asks.TaskView(
            task=decode(Task, task.value),
            result=decode(TaskResult, result.value) if result is not None else None,
        )

    async def _list_tasks(self, query: asks.ListTasks) -> asks.TaskPage:
        prefix = list_prefix(query.status, query.worker_id)
        end = prefix_end(prefix)
        async with self._settled():
            pass  # what was in flight when the caller asked is in the store now
        total = await self._store.count(prefix, end)
        page = await self._store.range(prefix, end, limit=query.limit, offset=query.offset, keys_only=True)
        names = [f"task/{item.key.rpartition('/')[2]}" for item in page.items]
        found = await self._store.get(names)
        tasks = tuple(decode(Task, found[name].value) for name in names if name in found)
        return asks.TaskPage(tasks=tuple(self._with_start(task) for task in tasks), total=total)

    def _with_start(self, stored: Task) -> Task:
        """The store's copy of a running task lacks its start, which is kept in memory only."""
        live = self._snapshot.tasks.get(stored.task_id)
        if live is None or live.attempt != stored.attempt or live.status is not Status.RUNNING:
            return stored
        return live
