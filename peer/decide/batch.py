"""What a batch of decisions comes to: one transaction, and what to do once that is durable."""

from __future__ import annotations

from collections.abc import Iterable

from peer.decide import meter
from peer.decide.decision import Decision
from peer.state.event import Event
from peer.state.order import Order
from peer.state.snapshot import Save, Snapshot, StoreWrites
from peer.state.task import TERMINAL, Status, Task, TaskResult


class Batch:
    """Taking a decision applies it to the snapshot at once, so that the next one builds on it."""

    def __init__(self, snapshot: Snapshot, now: float) -> None:
        self._snapshot = snapshot
        self.now = now
        self.writes: StoreWrites = {}
        self.orders: list[tuple[str, Order]] = []
        self.events: list[Event] = []
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
