"""What is forgotten: finished tasks beyond their age or number, old events, old plans."""

from __future__ import annotations

from collections.abc import Sequence

from peer.decide.decision import Decision
from peer.limits import RETENTION_BATCH
from peer.state.event import Event
from peer.state.snapshot import Drop, Snapshot
from peer.state.task import Task

_PLANS_KEPT = 50


def due(snapshot: Snapshot, now: float, oldest: Sequence[tuple[float, str]]) -> list[str]:
    """Which of the oldest finished tasks, each with its end and in that order, are too old or too many."""
    surplus = snapshot.finished - snapshot.policy.retention_count
    horizon = now - snapshot.policy.retention_age_s
    return [task_id for i, (ended_at, task_id) in enumerate(oldest) if i < surplus or ended_at < horizon]


def forget_tasks(tasks: Sequence[Task]) -> Decision:
    """All that is stored of these finished tasks goes."""
    return Decision(changes=[Drop(task) for task in tasks])


def forget_events(snapshot: Snapshot) -> Decision:
    """Keep the newest events, one at least: the numbers go on from it. A batch at most goes at once."""
    first = snapshot.events_from
    surplus = snapshot.events_next - first - max(1, snapshot.policy.events_kept)
    ids = range(first, first + min(RETENTION_BATCH, max(0, surplus)))
    return Decision(changes=[Drop(Event(id=i, event="", timestamp=0.0, data={})) for i in ids])


def forget_plans(snapshot: Snapshot) -> Decision:
    if len(snapshot.plans) <= _PLANS_KEPT:
        return Decision()
    finished = [plan for plan in snapshot.plans.values() if plan.status != "initiated"]
    finished.sort(key=lambda plan: plan.created_at)
    return Decision(changes=[Drop(plan) for plan in finished[:-_PLANS_KEPT]])
