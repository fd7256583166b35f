"""Times that an earlier leader wrote when its clock was ahead of this leader's.

Hosts' wall clocks may differ, by hours where nobody sets them. While one leads, durations are right. The next one would
find attempts that begin in the future, which are never lost, and deadlines that never come. So whatever lies ahead of
its own clock is moved back as a whole when it loads the store: the distances between a record's times stay. A clock
that was behind cannot be told from an outage: deadlines have passed then.
"""

from __future__ import annotations

from msgspec.structs import replace as changed

from peer.state.base import Record
from peer.state.model import Draining
from peer.state.plan import Plan
from peer.state.task import Task


def record(loaded: Record, now: float) -> Record:
    """Any record but a task, as this leader is to take it in."""
    match loaded:
        case Plan():
            return plan(loaded, now)
        case Draining():
            return draining(loaded, now)
        case _:
            return loaded


def task(record: Task, now: float) -> Task:
    """The same live task as if it had been written with this leader's clock."""
    ahead = max(record.created_at, record.assigned_at or 0.0, record.started_at or 0.0) - now
    if ahead <= 0.0:
        return record
    return changed(
        record,
        created_at=record.created_at - ahead,
        deadline=record.deadline - ahead,
        assigned_at=_back(record.assigned_at, ahead),
        started_at=_back(record.started_at, ahead),
    )


def plan(record: Plan, now: float) -> Plan:
    """The same plan; a move that would begin in the future begins now."""
    if all((move.started_at or 0.0) <= now for move in record.moves):
        return record
    return changed(
        record,
        moves=tuple(
            changed(move, started_at=now) if (move.started_at or 0.0) > now else move for move in record.moves
        ),
    )


def draining(record: Draining, now: float) -> Draining:
    """The same; a model that an owner keeps out is kept out as long as it was to be."""
    ahead = record.since - now
    if ahead <= 0.0:
        return record
    return changed(record, since=now, until=max(0.0, record.until - ahead))


def _back(at: float | None, seconds: float) -> float | None:
    return at - seconds if at is not None else None
