"""What a batch of decisions comes to: a transaction, seldom several, and what to do once they are durable.

A store takes transactions up to some size. A batch beyond that is committed as several, in order: after each of them
the store is as it would be after fewer decisions. Only a decision that is too large by itself, about many tasks at
once, is split, and never between a task and what belongs to it: its input, its idempotency record, its result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from peer.decide import meter
from peer.decide.decision import Decision
from peer.state.event import Event
from peer.state.order import Order
from peer.state.snapshot import Drop, Save, Snapshot, StoreWrites
from peer.state.task import TERMINAL, Idempotency, Status, Task, TaskInput, TaskResult

TRANSACTION_WRITES_MAX: Final = 4_096  # about half of what etcd's members are started with
TRANSACTION_BYTES_MAX: Final = (
    2 * 1024 * 1024
)  # of keys and values, quickly written; a single task may have more


class Batch:
    """Taking a decision applies it to the snapshot at once, so that the next one builds on it."""

    def __init__(self, snapshot: Snapshot, now: float) -> None:
        self._snapshot = snapshot
        self.now = now
        self.transactions: list[StoreWrites] = []
        self._nbytes = 0  # of the last of them
        self.orders: list[tuple[str, Order]] = []
        self.events: list[Event] = []
        self.reasons: list[str] = []
        self.ended: dict[str, tuple[Task, TaskResult | None]] = {}
        self.requeued: list[Task] = []

    def take(self, decision: Decision) -> None:
        made: list[StoreWrites] = []
        of_a_task = False
        for change in decision.changes:
            writes = self._snapshot.apply(change)
            record = change.record if isinstance(change, Save | Drop) else None
            if of_a_task and isinstance(record, TaskInput | TaskResult | Idempotency):
                made[-1].update(writes)  # they follow their task, and nobody is to find one without the other
            else:
                of_a_task = isinstance(record, Task)
                made.append(writes)
            if isinstance(change, Save):
                self._note(change.record)
        for draft in decision.events:
            event = Event(
                id=self._snapshot.events_next, event=draft.event, timestamp=self.now, data=draft.data
            )
            made.append(self._snapshot.apply(Save(event)))
            self.events.append(event)
        self._write(made)
        self.orders += decision.orders
        self.reasons += decision.reasons

    @property
    def writes(self) -> StoreWrites:
        """Of all transactions together."""
        return _together(self.transactions)

    def _write(self, made: Sequence[StoreWrites]) -> None:
        whole = _together(made)
        for writes in [whole] if _fits(len(whole), _nbytes(whole)) else made:
            if not writes:
                continue
            nbytes = _nbytes(writes)
            if not self.transactions or not _fits(
                len(self.transactions[-1]) + len(writes), self._nbytes + nbytes
            ):
                self.transactions.append({})
                self._nbytes = 0
            self.transactions[-1].update(writes)
            self._nbytes += nbytes

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


def _together(made: Iterable[StoreWrites]) -> StoreWrites:
    return {key: value for writes in made for key, value in writes.items()}


def _nbytes(writes: StoreWrites) -> int:
    return sum(len(key) + len(value or b"") for key, value in writes.items())


def _fits(count: int, nbytes: int) -> bool:
    return count <= TRANSACTION_WRITES_MAX and nbytes <= TRANSACTION_BYTES_MAX
