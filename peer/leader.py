"""The leader's shell: takes requests and reports, lets `peer.decide` decide, commits, and only then acts.

One task applies and commits batches in turn; whatever arrives meanwhile forms the next batch. Queries wait for the
commit in progress, so nobody ever reads what is not durable. A commit that fails ends the leadership: the memory that
ran ahead of the store is thrown away with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
import trio

from peer import limits
from peer.decide import admit, keys, meter, place, rebalance, record, recover, retain, schedule, view
from peer.decide.decision import Decision
from peer.errors import BitinglipError, NotFound, Unavailable
from peer.journal import Journal
from peer.ports import Clock, Delete, Entropy, Link, Put, Store, Write
from peer.state import command as asks
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.model import Model
from peer.state.order import Order, Report
from peer.state.plan import Plan
from peer.state.record import decode, idempotency_key, list_prefix, prefix_end, task_id
from peer.state.snapshot import Policy, Save, Snapshot, StoreWrites
from peer.state.task import TERMINAL, Idempotency, Status, Task, TaskResult
from peer.streams import StreamHub

log = structlog.get_logger(__name__)

_RECENT_MAX = 1_000  # finished tasks kept in memory for those who wait for them
_RECENT_CHARS_MAX = 16_384  # of result text; longer ones are read from the store
_ENTROPY_BYTES = 5
_encode_json = msgspec.json.Encoder().encode


class _Pending:
    """A command on its way, and where its answer will be."""

    __slots__ = ("answer", "command", "done", "error", "stored")

    def __init__(self, command: asks.Command) -> None:
        self.command = command
        self.done = trio.Event()
        self.answer: Any = None
        self.error: BitinglipError | None = None
        self.stored: Task | Idempotency | None = (
            None  # what the store holds for it, read before it is decided
        )


@dataclass(frozen=True, slots=True)
class _First:
    """The answer to a repeated idempotency key: the task that the first request made."""

    task_id: str


class Leader:
    """Serves while `run` runs. `snapshot` was loaded by `peer.establish` under `epoch`."""

    def __init__(
        self,
        snapshot: Snapshot,
        journal: Journal,
        store: Store,
        link: Link,
        clock: Clock,
        entropy: Entropy,
        streams: StreamHub,
    ) -> None:
        self._snapshot = snapshot
        self._journal = journal
        self._store = store
        self._link = link
        self._clock = clock
        self._entropy = entropy
        self._streams = streams
        self._inbox_send, self._inbox = trio.open_memory_channel[_Pending | Report](
            limits.COMMANDS_WAITING_MAX
        )
        self._committing = trio.Lock()
        self._waiting: dict[str, trio.Event] = {}
        self._recent: OrderedDict[str, asks.TaskView] = OrderedDict()
        self._stopping = ""
        self._sampled_at = 0

    # ---------------------------------------------------------------- what callers use

    def key(self, key_id: str) -> ApiKey | None:
        return self._snapshot.keys.get(key_id)

    def models(self) -> Mapping[str, Model]:
        return self._snapshot.catalogue

    def configure(self, policy: Policy, catalogue: Mapping[str, Model]) -> None:
        """Take a reloaded configuration; decisions follow it from the next batch on."""
        self._snapshot.policy = policy
        self._snapshot.catalogue = catalogue

    def refuse_new(self, why: str) -> None:
        """From now on new tasks get 503 and queued ones stay queued; everything else goes on."""
        self._stopping = why

    def held_tasks(self) -> int:
        """How many tasks are assigned or running, for a drain."""
        return sum(len(tasks) for tasks in self._snapshot.held.values())

    async def report(self, message: Report) -> None:
        """ports.ReportSink: waits while the leader is behind."""
        await self._inbox_send.send(message)

    async def call(self, request: asks.Request) -> Any:
        """Commands are handed over to the leader's task: a caller that goes away does not undo them."""
        if isinstance(request, asks.Command):
            return await self._command(request)
        return await self._query(request)

    async def _command(self, command: asks.Command) -> Any:
        if self._stopping and isinstance(command, asks.SubmitTask):
            raise Unavailable(self._stopping, code="stopping", retry_after_s=5.0)
        pending = _Pending(command)
        try:
            self._inbox_send.send_nowait(pending)
        except trio.WouldBlock:
            raise Unavailable("the leader is behind", code="overloaded", retry_after_s=1.0) from None
        except trio.BrokenResourceError:
            raise Unavailable("this peer is stopping", code="stopping", retry_after_s=5.0) from None
        with trio.move_on_after(limits.COMMAND_S_MAX):
            await pending.done.wait()
        if pending.error is not None:
            raise pending.error
        if not pending.done.is_set():
            raise Unavailable(
                f"no answer from the store in {limits.COMMAND_S_MAX:g} s; it is not known whether this was done",
                code="ambiguous",
                retry_after_s=1.0,
            )
        if isinstance(pending.answer, _First):
            view_of_first = await self._get_task(asks.GetTask(task_id=pending.answer.task_id))
            return asks.Submitted(view=view_of_first, replayed=True)
        return pending.answer

    # ---------------------------------------------------------------- queries

    async def _query(self, query: asks.Query) -> Any:
        match query:
            case asks.GetTask():
                return await self._get_task(query)
            case asks.ListTasks():
                return await self._list_tasks(query)
        async with self._committing:
            return self._read(query)

    def _read(self, query: asks.Query) -> Any:
        now = self._clock.wall()
        match query:
            case asks.ListWorkers():
                return view.workers(self._snapshot, now)
            case asks.GetWorker():
                return view.worker(self._snapshot, now, query.worker_id)
            case asks.ListAssignments():
                return view.assignments(self._snapshot)
            case asks.ListModels():
                return view.models(self._snapshot)
            case asks.GetStatus():
                return view.cluster(self._snapshot, now)
            case asks.GetMetrics():
                return meter.metrics(self._snapshot, query.timeframe, now)
            case asks.ListKeys():
                return tuple(self._snapshot.keys.values())
            case asks.GetPlan():
                return self._plan(query.rebalance_id)
            case _:
                raise TypeError(f"not a query: {type(query).__name__}")

    def _plan(self, rebalance_id: str) -> Plan:
        plan = self._snapshot.plans.get(rebalance_id)
        if plan is None:
            raise NotFound(f"there is no rebalance `{rebalance_id}`", code="rebalance_not_found")
        return plan

    async def _get_task(self, query: asks.GetTask) -> asks.TaskView:
        if query.wait_s > 0 and query.task_id in self._snapshot.tasks:
            finished = self._waiting.setdefault(query.task_id, trio.Event())
            with trio.move_on_after(query.wait_s):
                await finished.wait()
        async with self._committing:
            task = self._snapshot.tasks.get(query.task_id)
            if task is not None:
                live = view.live_task(self._snapshot, self._clock.wall(), task)
                return msgspec.structs.replace(live, tokens_so_far=self._streams.tokens_so_far(task.task_id))
            recent = self._recent.get(query.task_id)
        if recent is not None:
            return recent
        stored = await self._stored_task(query.task_id)
        if stored is None:
            raise admit.no_task(query.task_id)
        return stored

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
        async with self._committing:
            pass  # what was in flight when the caller asked is in the store now
        total = await self._store.count(prefix, end)
        page = await self._store.range(prefix, end, limit=query.limit, offset=query.offset, keys_only=True)
        names = [f"task/{item.key.rpartition('/')[2]}" for item in page.items]
        found = await self._store.get(names)
        tasks = tuple(decode(Task, found[name].value) for name in names if name in found)
        # The store's copy of a running task lacks its start, which is kept in memory only.
        return asks.TaskPage(tasks=tuple(self._snapshot.tasks.get(t.task_id, t) for t in tasks), total=total)

    # ---------------------------------------------------------------- the loop

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Lead until cancelled. Raises StoreError when the store fails or another epoch leads."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ticks)
                task_status.started()
                async for first in self._inbox:
                    await self._batch(self._gather(first))
        finally:
            self._inbox.close()

    def _gather(self, first: _Pending | Report) -> list[_Pending | Report]:
        batch = [first]
        while len(batch) < limits.BATCH_COMMANDS_MAX:
            try:
                batch.append(self._inbox.receive_nowait())
            except trio.WouldBlock:
                break
        return batch

    async def _ticks(self) -> None:
        while True:
            await self._batch([])
            await self._forget_old_tasks()
            await self._clock.sleep(limits.TICK_S)

    async def _batch(self, batch: list[_Pending | Report]) -> None:
        """Decide, commit and carry out one batch; an empty one is a tick."""
        async with self._committing:
            for item in batch:
                if isinstance(item, _Pending):
                    await self._read_stored(item)
            work = _Batch(self._snapshot, self._clock.wall())
            for item in batch:
                if isinstance(item, _Pending):
                    self._decide_command(item, work)
                else:
                    self._decide_report(item, work)
            if not batch:
                self._decide_tick(work)
            if not self._stopping:
                work.take(schedule.schedule(self._snapshot, work.now))
            work.count_ended()
            await self._commit(work.writes)
        await self._carry_out(work)

    async def _commit(self, writes: StoreWrites) -> None:
        if not writes:
            return
        changes: list[Write] = [
            Put(key, value) if value is not None else Delete(key) for key, value in writes.items()
        ]
        await self._store.commit(self._snapshot.epoch, changes)

    async def _carry_out(self, work: _Batch) -> None:
        """After the commit: answer, publish, order."""
        for task, result in work.ended.values():
            self._remember(task, result)
            self._streams.end(task.task_id)
            waiting = self._waiting.pop(task.task_id, None)
            if waiting is not None:
                waiting.set()
        for task in work.requeued:
            self._streams.restart(task.task_id, task.attempt + 1, task.requeued_because)
        self._journal.publish(work.events)
        for pending in work.answered:
            pending.done.set()
        for reason in work.reasons:
            log.debug("decided", reason=reason)
        for peer_id, order in work.orders:
            await self._order(peer_id, order)

    async def _order(self, peer_id: str, order: Order) -> None:
        try:
            await self._link.send(peer_id, order)
        except Unavailable as error:
            # The worker's reports will not show what was ordered; it is then decided anew.
            log.warning("order_not_delivered", peer_id=peer_id, order=type(order).__name__, why=error.message)

    def _remember(self, task: Task, result: TaskResult | None) -> None:
        if result is not None and len(result.generated_text) > _RECENT_CHARS_MAX:
            return
        self._recent[task.task_id] = asks.TaskView(task=task, result=result)
        if len(self._recent) > _RECENT_MAX:
            self._recent.popitem(last=False)

    # ---------------------------------------------------------------- deciding

    async def _read_stored(self, pending: _Pending) -> None:
        """What a decision needs to know of a finished task, which only the store holds."""
        match pending.command:
            case asks.SubmitTask(owner=owner, idempotency_key=text) if text:
                key = idempotency_key(owner, text)
                found = await self._store.get([key])
                pending.stored = decode(Idempotency, found[key].value) if found else None
            case asks.CancelTask(task_id=wanted) if wanted not in self._snapshot.tasks:
                stored = await self._stored_task(wanted)
                pending.stored = stored.task if stored is not None else None

    def _decide_command(self, pending: _Pending, work: _Batch) -> None:
        try:
            decision = self._decide(pending, work.now)
        except BitinglipError as error:
            pending.error = error
        except Exception:
            # Decisions change nothing before they return, so a bug in one costs this command and no more.
            log.exception("command_failed", command=type(pending.command).__name__)
            pending.error = BitinglipError("an internal error; it has been logged")
        else:
            work.take(decision)
            pending.answer = decision.reply
        work.answered.append(pending)

    def _decide(self, pending: _Pending, now: float) -> Decision:
        snapshot = self._snapshot
        match pending.command:
            case asks.SubmitTask() as command:
                return self._submit(command, pending, now)
            case asks.CancelTask() as command:
                stored = pending.stored if isinstance(pending.stored, Task) else None
                return admit.cancel(snapshot, now, command, stored)
            case asks.AssignModel() as command:
                return place.assign(snapshot, now, command, f"assign-{self._entropy.token(_ENTROPY_BYTES)}")
            case asks.UnloadModel() as command:
                return place.unload(snapshot, now, command)
            case asks.RestartWorker() as command:
                return place.restart(snapshot, now, command)
            case asks.Rebalance() as command:
                rebalance_id = f"rebal-{self._entropy.token(_ENTROPY_BYTES)}"
                return rebalance.rebalance(snapshot, now, command, rebalance_id)
            case asks.CreateKey() as command:
                return keys.create(snapshot, command)
            case asks.RevokeKey() as command:
                return keys.revoke(snapshot, now, command)

    def _submit(self, command: asks.SubmitTask, pending: _Pending, now: float) -> Decision:
        stored = pending.stored if isinstance(pending.stored, Idempotency) else None
        first = admit.first_of(self._snapshot, command, stored)
        if first is not None:
            return Decision(reply=_First(first))
        size = len(_encode_json(command.parameters))
        new_id = task_id(now, self._entropy.token(_ENTROPY_BYTES))
        return admit.submit(self._snapshot, now, command, new_id, size)

    def _decide_report(self, message: Report, work: _Batch) -> None:
        try:
            decision = record.report(self._snapshot, work.now, message)
        except Exception:
            # Decisions change nothing before they return, so a bug in one costs this report and no more.
            log.exception("report_failed", report=type(message).__name__)
        else:
            work.take(decision)

    def _decide_tick(self, work: _Batch) -> None:
        snapshot, now = self._snapshot, work.now
        work.take(recover.time_out(snapshot, now))
        work.take(recover.lost_attempts(snapshot, now))
        work.take(recover.hopeless(snapshot, now))
        work.take(place.reconcile(snapshot, now))
        work.take(rebalance.advance(snapshot, now))
        work.take(recover.announce(snapshot, now))
        work.take(retain.forget_events(snapshot))
        work.take(retain.forget_plans(snapshot))
        if int(now) != self._sampled_at:
            self._sampled_at = int(now)
            work.take(meter.sample_gauges(snapshot, now))
            work.take(meter.roll_up(snapshot, now))

    async def _forget_old_tasks(self) -> None:
        """Retention: read the tasks that ended first, and drop those beyond age or number."""
        page = await self._store.range(
            "ended/", prefix_end("ended/"), limit=max(1, retain.excess(self._snapshot)), keys_only=True
        )
        names = [f"task/{item.key.rpartition('/')[2]}" for item in page.items]
        found = await self._store.get(names) if names else {}
        oldest = [decode(Task, found[name].value) for name in names if name in found]
        async with self._committing:
            work = _Batch(self._snapshot, self._clock.wall())
            work.take(retain.forget_tasks(self._snapshot, work.now, oldest))
            await self._commit(work.writes)
        for task in oldest:
            if f"task/{task.task_id}" in work.writes:
                self._recent.pop(task.task_id, None)


class _Batch:
    """What a batch has decided so far; taking a decision applies it to the snapshot at once."""

    def __init__(self, snapshot: Snapshot, now: float) -> None:
        self._snapshot = snapshot
        self.now = now
        self.writes: StoreWrites = {}
        self.orders: list[tuple[str, Order]] = []
        self.events: list[Event] = []
        self.answered: list[_Pending] = []
        self.reasons: list[str] = []
        self.ended: dict[str, tuple[Task, TaskResult | None]] = {}
        self.requeued: list[Task] = []

    def take(self, decision: Decision) -> None:
        for change in decision.changes:
            self.writes.update(self._snapshot.apply(change))
            if isinstance(change, Save):
                self._note(change.record)
        for draft in decision.events:
            event = Event(
                id=self._snapshot.events_next, event=draft.event, timestamp=self.now, data=draft.data
            )
            self.writes.update(self._snapshot.apply(Save(event)))
            self.events.append(event)
        self.orders += decision.orders
        self.reasons += decision.reasons

    def _note(self, saved: object) -> None:
        if isinstance(saved, Task):
            if saved.status in TERMINAL:
                self.ended[saved.task_id] = (saved, None)
            elif saved.status is Status.QUEUED and saved.attempt:
                self.requeued.append(saved)
        elif isinstance(saved, TaskResult):
            self.ended[saved.task_id] = (self.ended[saved.task_id][0], saved)

    def count_ended(self) -> None:
        """Add this batch's ended tasks to the measured history, in the same transaction."""
        if self.ended:
            pairs: Iterable[tuple[Task, int]] = (
                (task, result.tokens_generated if result is not None else 0)
                for task, result in self.ended.values()
            )
            self.take(meter.ended(self._snapshot, self.now, pairs))
