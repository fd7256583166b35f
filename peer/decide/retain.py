"""What is forgotten: finished tasks beyond their age, number or bytes, old events, old plans."""

from __future__ import annotations

from collections.abc import Sequence

from peer.decide.decision import Decision
from peer.limits import RETENTION_BATCH
from peer.state.event import Event
from peer.state.snapshot import Drop, Snapshot
from peer.state.task import Task

QUOTA_PART = 2  # the rest is for live tasks, the history and the indexes

_PLANS_KEPT = 50


def due(
    snapshot: Snapshot, now: float, oldest: Sequence[tuple[float, str]], nbytes: Sequence[int] = ()
) -> list[str]:
    """Which of the oldest finished tasks, each with its end and in that order, are too old, too many or too large.

    `nbytes`: what is kept of each. All together never are more than a part of the store's quota.
    """
    surplus = snapshot.finished - snapshot.policy.retention_count
    bytes_max = snapshot.policy.retention_bytes
    if snapshot.room.quota_bytes:
        bytes_max = min(bytes_max, snapshot.room.quota_bytes // QUOTA_PART)
    excess = snapshot.finished_bytes - bytes_max
    horizon = now - snapshot.policy.retention_age_s
    found = []
    for i, (ended_at, task_id) in enumerate(oldest):
        if i < surplus or excess > 0 or ended_at < horizon:
            found.append(task_id)
            excess -= nbytes[i] if nbytes else 0
    return found


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


def forget_revoked(snapshot: Snapshot) -> Decision:
    """Workers of hosts that were put out, once their tasks are elsewhere: nobody waits for them to come back."""
    decision = Decision()
    for peer_id in snapshot.registry.revocations:
        leaving = snapshot.leaving.get(peer_id)
        if leaving is not None:
            decision.changes.append(Drop(leaving))
        for worker_id in snapshot.peers.get(peer_id, ()):
            if snapshot.held.get(worker_id):
                continue
            decision.changes += [Drop(wish) for wish in snapshot.wishes.get(worker_id, {}).values()]
            decision.changes += [Drop(each) for key, each in snapshot.draining.items() if key[0] == worker_id]
            decision.changes.append(Drop(snapshot.workers[worker_id]))
            decision.reasons.append(f"{worker_id} is forgotten: {peer_id} was revoked")
    return decision
