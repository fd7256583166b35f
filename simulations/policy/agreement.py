"""The structures of a snapshot beside each other: what is kept for speed says the same as the facts."""

from __future__ import annotations

from peer.state.index import Index
from peer.state.snapshot import Snapshot
from peer.state.task import Status
from simulations.policy.losses import Checks


def queues(checks: Checks, snapshot: Snapshot) -> None:
    tasks = snapshot.tasks
    queued = sorted(i for queue in snapshot.queues.values() for _, i in queue)
    held = sorted(i for of in snapshot.held.values() for i in of)
    by_status = sorted(i for i, t in tasks.items() if t.status is Status.QUEUED)
    consistent = (
        queued == by_status
        and snapshot.queued == len(queued)
        and held == sorted(tasks.keys() - set(queued))
        and sorted(i for _, i in snapshot.deadlines) == sorted(tasks)
        and snapshot.deadlines == sorted(snapshot.deadlines)
        and sorted(snapshot.inputs) == sorted(tasks)
        and snapshot.inputs_bytes == sum(t.parameters_bytes for t in tasks.values())
    )
    checks.check("queues, slots and deadlines agree with the tasks", consistent)


def index(checks: Checks, snapshot: Snapshot) -> None:
    """What is kept beside the facts follows from them."""
    fresh = Index()
    for worker_id in snapshot.workers:
        fresh.place(worker_id, {}, snapshot.replicas.get(worker_id, {}))
        if worker_id in snapshot.reports:
            fresh.named[worker_id] = frozenset(snapshot.reports[worker_id].running)
        fresh.touch(snapshot, worker_id)
    for name in ("placed", "room", "unmet", "unused", "doubtful", "named"):
        same = getattr(fresh, name) == getattr(snapshot.index, name)
        checks.check("the index follows from the facts", same, name)
