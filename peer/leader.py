"""The leader's shell: takes requests and reports, lets `peer.decide` decide, commits, and only then acts.

One task applies and commits batches in turn; whatever arrives meanwhile forms the next batch. Queries wait for the
commit in progress, so nobody ever reads what is not durable. A commit that fails ends the leadership: the memory that
ran ahead of the store is thrown away with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import structlog
import trio

from peer import limits
from peer.answers import Alone, Answers, Voucher, not_leading
from peer.decide import retain, schedule
from peer.decide.batch import Batch
from peer.decide.decision import Decision
from peer.decide.quota import Quota
from peer.deciding import Deciding, First, Pending
from peer.errors import Ambiguous, BitinglipError, Unavailable
from peer.journal import Journal
from peer.ports import Authority, Clock, Delete, Entropy, Link, Put, Store, Write
from peer.registrar import Registrar
from peer.state import command as asks
from peer.state.enrol import Revocation
from peer.state.key import ApiKey
from peer.state.model import Model
from peer.state.order import AttemptFinished, Order, Report, RunAttempt
from peer.state.quota import Counted
from peer.state.record import bytes_of, decode, ended_at, idempotency_key, prefix_end
from peer.state.snapshot import Linked, Policy, Rumoured, Snapshot, StoreWrites
from peer.state.task import Idempotency, Task
from peer.state.voter import Room
from peer.streams import StreamHub
from peer.transfer import nobody_else, transfer

log = structlog.get_logger(__name__)

_FORGET_ROUNDS_MAX = 8  # in a tick: more end in a second than one batch
_RETAIN_S = 1.0  # between two looks at the oldest finished tasks
_BATCH_BYTES_MAX = limits.BODY_BYTES_MAX  # of prompts and results; the store bounds its transactions


def _size(item: Pending | Report | Linked | Rumoured) -> int:
    """About how many bytes of it go into the transaction, beyond the few of every record."""
    if isinstance(item, Pending):
        return item.size
    return item.nbytes if isinstance(item, AttemptFinished) else 0


_Item = Pending | Report | Linked | Rumoured


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
        voucher: Voucher | None = None,
        authority: Authority | None = None,
        seeds: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """`authority` None: this host is in no cluster. `seeds`: where a new host finds the others."""
        self._voucher = voucher or Alone()
        self._snapshot = snapshot
        self._journal = journal
        self._store = store
        self._link = link
        self._clock = clock
        self._entropy = entropy
        self._streams = streams
        self._inbox_send, self._inbox = trio.open_memory_channel[_Item](limits.COMMANDS_WAITING_MAX)
        self._committing = trio.Lock()
        self._registrar = Registrar(snapshot, entropy, authority, seeds)
        self._answers = Answers(snapshot, store, clock, streams, self._registrar, self.settled)
        self._late_evidence: dict[tuple[type, str], Linked | Rumoured] = {}
        self._decide = Deciding(snapshot, entropy, self._registrar)
        self._deciding: list[Pending] = []
        self._stopping = ""
        self._over = False  # memory may be ahead of the store, or another epoch may lead
        self._forgot_at: float | None = None  # when nothing more was to be forgotten
        self.came_round_at: float | None = None
        """When a tick last began, for a watchdog."""
        self.quota = Quota()
        self.let_go: Callable[[], None] = nobody_else  # cancels `run`. Raises Conflict
        self.on_shared: Callable[[], None] = lambda: None  # keys, catalogue or who is revoked have changed

    # ---------------------------------------------------------------- what callers use

    def key(self, key_id: str) -> ApiKey | None:
        return self._snapshot.keys.get(key_id)

    def keys(self) -> tuple[ApiKey, ...]:
        return tuple(self._snapshot.keys.values())

    def revoked(self) -> tuple[Revocation, ...]:
        return self._registrar.revoked()

    def models(self) -> Mapping[str, Model]:
        return self._snapshot.catalogue

    def configure(self, policy: Policy, catalogue: Mapping[str, Model]) -> None:
        """Take a reloaded configuration; decisions follow it from the next batch on."""
        self._snapshot.policy = policy
        self._snapshot.catalogue = catalogue
        self.on_shared()

    @property
    def epoch(self) -> int:
        return self._snapshot.epoch

    def room(self, room: Room) -> None:
        """How full the store is; decisions follow it from the next batch on."""
        self._snapshot.room = room

    def refuse_new(self, why: str) -> None:
        """From now on new tasks get 503 and queued ones stay queued; everything else goes on."""
        self._stopping = why

    def held_tasks(self) -> int:
        """How many tasks are assigned or running, for a drain."""
        return sum(len(tasks) for tasks in self._snapshot.held.values())

    def queued(self) -> int:
        return self._snapshot.queued

    async def report(self, message: Report) -> None:
        """ports.ReportSink: waits while the leader is behind. Raises Unavailable once it leads no more."""
        try:
            await self._inbox_send.send(message)
        except trio.BrokenResourceError:
            raise not_leading() from None

    def linked(self, peer_id: str, up: bool, *, dead: bool = False) -> None:
        """The session with this peer's process came up, or ended: evidence for `peer.decide.lose`."""
        self._note(Linked(peer_id, up, self._clock.wall(), dead))

    def rumour(self, peer_id: str, status: Literal["alive", "leaving", "left", "failed"]) -> None:
        """Gossip's new opinion of this peer."""
        self._note(Rumoured(peer_id, status, self._clock.wall()))

    def _note(self, evidence: Linked | Rumoured) -> None:
        """In line with the reports; beside them, where the line is full, until the next tick."""
        try:
            self._inbox_send.send_nowait(evidence)
            self._late_evidence.pop((type(evidence), evidence.peer_id), None)  # the older one would come after it
        except trio.WouldBlock:
            self._late_evidence[type(evidence), evidence.peer_id] = evidence
        except trio.BrokenResourceError:
            pass  # it leads no more

    async def call(self, request: asks.Request) -> Any:
        """Commands are handed over to the leader's task: a caller that goes away does not undo them."""
        if isinstance(request, Counted):
            return self.quota.answer(request, self._clock.now())
        if isinstance(request, asks.TransferLeadership):
            return await transfer(request, self._snapshot, self.settled, self.let_go)
        if isinstance(request, asks.Command):
            return await self._command(request)
        return await self._answers.query(request)

    async def _command(self, command: asks.Command) -> Any:
        if self._stopping and isinstance(command, asks.SubmitTask):
            raise Unavailable(self._stopping, code="stopping", retry_after_s=5.0)
        pending = Pending(command)
        try:
            self._inbox_send.send_nowait(pending)
        except trio.WouldBlock:
            raise Unavailable("the leader is behind", code="overloaded", retry_after_s=1.0) from None
        except trio.BrokenResourceError:
            raise not_leading() from None
        with trio.move_on_after(limits.COMMAND_S_MAX):
            await pending.done.wait()
        if not pending.done.is_set():
            raise _ambiguous(f"no answer from the store in {limits.COMMAND_S_MAX:g} s")
        if pending.error is not None:
            raise pending.error
        if isinstance(pending.answer, First):
            view_of_first = await self._answers.query(asks.GetTask(task_id=pending.answer.task_id))
            return asks.Submitted(view=view_of_first, replayed=True)
        return pending.answer

    # ---------------------------------------------------------------- queries

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """While nothing is in flight and no other peer can have led since: what the snapshot says is durable and the
        newest. Raises Unavailable when this is over."""
        async with self._committing:
            await self._confirm()
            yield

    async def _confirm(self) -> None:
        """Wait until this is certainly the leader. Raises Unavailable when it is not."""
        while not self._over and not self._voucher.lost and not self._voucher.fresh():
            await self._voucher.renewed()
        if self._over or self._voucher.lost:
            raise not_leading()

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
            self._give_up()

    def _give_up(self) -> None:
        """Nobody waits for an answer that will not come, and nobody reads what may not be durable."""
        in_flight, self._over = self._over, True
        for pending in self._deciding:
            if not pending.done.is_set():
                pending.error = _ambiguous("this peer has stopped leading") if in_flight else not_leading()
                pending.done.set()
        while True:
            try:
                item = self._inbox.receive_nowait()
            except trio.WouldBlock:
                break
            if isinstance(item, Pending):
                item.error = not_leading()
                item.done.set()
        self._inbox.close()
        self._answers.end()

    def _gather(self, first: _Item) -> list[_Item]:
        batch, nbytes = [first], _size(first)
        while len(batch) < limits.BATCH_COMMANDS_MAX and nbytes < _BATCH_BYTES_MAX:
            try:
                item = self._inbox.receive_nowait()
            except trio.WouldBlock:
                break
            batch.append(item)
            nbytes += _size(item)
        return batch

    async def _ticks(self) -> None:
        while True:
            self.came_round_at = trio.current_time()
            await self._batch([])
            try:
                await self._retain()
            except (Ambiguous, Unavailable) as error:
                if self._over:  # it was a commit
                    raise
                log.warning("retention_put_off", why=error.message)
            await self._clock.sleep(limits.TICK_S)

    async def _batch(self, batch: list[_Item]) -> None:
        """Decide, commit and carry out one batch; an empty one is a tick."""
        commands = [item for item in batch if isinstance(item, Pending)]
        if commands:
            self._deciding = commands
        async with self._committing:
            if self._over:
                return  # the other task's commit has failed, which ends this one too
            await self._read_stored(commands)
            work = Batch(self._snapshot, self._clock.wall())
            for item in batch:
                if isinstance(item, Pending):
                    self._decide.command(item, work)
                elif isinstance(item, Linked | Rumoured):
                    self._decide.evidence(item, work)
                else:
                    self._decide.report(item, work)
            if not batch:
                late, self._late_evidence = self._late_evidence, {}
                work.take(Decision(changes=[*late.values()]))
                self._decide.tick(work)
            if not self._stopping:
                work.take(schedule.schedule(self._snapshot, work.now))
            work.count_ended()
            work.take(retain.forget_events(self._snapshot))
            await self._commit(work.transactions)
            if (
                commands and not work.transactions
            ):  # refusals and repeats tell what memory says, as queries do
                await self._confirm()
        await self._carry_out(work, commands)

    async def _commit(self, transactions: Sequence[StoreWrites]) -> None:
        if not transactions:
            return
        self._over = True  # and stays so if this fails: then memory is ahead of the store
        for writes in transactions:
            await self._commit_until_known(
                [Put(key, value) if value is not None else Delete(key) for key, value in writes.items()]
            )
        self._over = False

    async def _commit_until_known(self, changes: list[Write]) -> None:
        """The same commit again while it is not known what became of it: a short outage ends no leadership."""
        until = self._clock.now() + limits.COMMIT_S_MAX
        while True:
            try:
                await self._store.commit(self._snapshot.epoch, changes)
                return
            except (Ambiguous, Unavailable) as error:
                pause_s = self._entropy.uniform(*limits.COMMIT_PAUSE_S)
                if self._clock.now() + pause_s >= until:
                    raise
                log.warning("commit_tried_again", why=error.message, code=error.code)
            await self._clock.sleep(pause_s)

    async def _carry_out(self, work: Batch, commands: list[Pending]) -> None:
        """After the commit: answer, publish, order."""
        for task, result in work.ended.values():
            self._streams.end(task.task_id)
            self._answers.ended(task, result)
        for task in work.requeued:
            self._streams.restart(task.task_id, task.attempt + 1, task.requeued_because)
            self._answers.moved(task.task_id)
        self._journal.publish(work.events)
        for pending in commands:
            if isinstance(pending.command, asks.HostCommand) and pending.error is None:
                pending.answer, pending.error = self._registrar.answer(pending.command, pending.answer)
            pending.done.set()
        of_keys = asks.CreateKey | asks.RevokeKey
        if self._registrar.news() or any(isinstance(pending.command, of_keys) for pending in commands):
            self.on_shared()
        for reason in work.reasons:
            log.debug("decided", reason=reason)
        for peer_id, order in work.orders:
            if isinstance(order, RunAttempt):
                self._answers.moved(order.task_id)
            await self._order(peer_id, order)

    async def _order(self, peer_id: str, order: Order) -> None:
        try:
            await self._link.send(peer_id, order)
        except Unavailable as error:
            # The worker's reports will not show what was ordered; it is then decided anew.
            log.warning("order_not_delivered", peer_id=peer_id, order=type(order).__name__, why=error.message)

    # ---------------------------------------------------------------- what only the store holds

    async def _read_stored(self, commands: list[Pending]) -> None:
        """What decisions need to know of finished tasks, which only the store holds, in one read."""
        wanted: dict[str, list[Pending]] = {}
        for pending in commands:
            match pending.command:
                case asks.SubmitTask(owner=owner, idempotency_key=text) if text:
                    wanted.setdefault(idempotency_key(owner, text), []).append(pending)
                case asks.CancelTask(task_id=task) if task not in self._snapshot.tasks:
                    wanted.setdefault(f"task/{task}", []).append(pending)
        if not wanted:
            return
        try:
            found = await self._store.get(list(wanted))
        except (Ambiguous, Unavailable) as error:  # costs these commands, not the leadership
            for each in wanted.values():
                for pending in each:
                    pending.error = _store_silent(error)
            return
        for key, item in found.items():
            for pending in wanted[key]:
                cancels = isinstance(pending.command, asks.CancelTask)
                pending.stored = decode(Task, item.value) if cancels else decode(Idempotency, item.value)

    async def _retain(self) -> None:
        """Once in a while, and while there is more to forget at every tick."""
        now = self._clock.now()
        if self._forgot_at is not None and now - self._forgot_at < _RETAIN_S:
            return
        self._forgot_at = None
        for _ in range(_FORGET_ROUNDS_MAX):
            if not await self._forget_old_tasks():
                self._forgot_at = now
                return

    async def _forget_old_tasks(self) -> bool:
        """Retention: drop tasks that ended first, beyond age, number or bytes. True: there may be more."""
        page = await self._store.range("ended/", prefix_end("ended/"), limit=limits.RETENTION_BATCH)
        oldest = [ended_at(item.key) for item in page.items]
        nbytes = [bytes_of(item.value) for item in page.items]
        names = [f"task/{each}" for each in retain.due(self._snapshot, self._clock.wall(), oldest, nbytes)]
        if not names:
            return False
        tasks = [decode(Task, item.value) for item in (await self._store.get(names)).values()]
        async with self._committing:
            if self._over:
                return False
            work = Batch(self._snapshot, self._clock.wall())
            work.take(retain.forget_tasks(tasks))
            await self._commit(work.transactions)
        for task in tasks:
            self._answers.forget(task.task_id)
        return len(names) == limits.RETENTION_BATCH


def _store_silent(error: BitinglipError) -> Unavailable:
    return Unavailable(f"the store does not answer: {error.message}", code="store_silent", retry_after_s=1.0)


def _ambiguous(why: str) -> Unavailable:
    return Unavailable(f"{why}; it is not known whether this was done", code="ambiguous", retry_after_s=1.0)
