"""What is forgotten: finished tasks beyond their age or number, old events, old plans."""

from __future__ import annotations

from collections.abc import Sequence

from peer.decide.decision import Decision
from peer.limits import RETENTION_BATCH
from peer.state.event import Event
from peer.state.snapshot import Drop, Snapshot
from peer.state.task import Task

_PLANS_KEPT = 50


def excess(snapshot: Snapshot) -> int:
    """How many finished tasks are beyond the number to keep, at most a batch."""
    return min(RETENTION_BATCH, max(0, snapshot.finished - snapshot.policy.retention_count))


def forget_tasks(snapshot: Snapshot, now: float, oldest: Sequence[Task]) -> Decision:
    """`oldest`: finished tasks in order of ending, as many as may have to go."""
    surplus = excess(snapshot)
    horizon = now - snapshot.policy.retention_age_s
    gone = [t for i, t in enumerate(oldest) if i < surplus or (t.completed_at or 0.0) < horizon]
    return Decision(changes=[Drop(task) for task in gone])


def forget_events(snapshot: Snapshot) -> Decision:
    """Keep the newest events; a batch at most goes at once."""
    first, surplus = (
        snapshot.events_from,
        snapshot.events_next - snapshot.events_from - snapshot.policy.events_kept,
    )
    ids = range(first, first + min(RETENTION_BATCH, max(0, surplus)))
    return Decision(changes=[Drop(Event(id=i, event="", timestamp=0.0, data={})) for i in ids])


def forget_plans(snapshot: Snapshot) -> Decision:
    finished = [plan for plan in snapshot.plans.values() if plan.status != "initiated"]
    finished.sort(key=lambda plan: plan.created_at)
    return Decision(changes=[Drop(plan) for plan in finished[:-_PLANS_KEPT]])
