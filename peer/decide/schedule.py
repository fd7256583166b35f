"""Which queued task goes to which replica. Run after every batch; takes the highest rank first."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from msgspec.structs import replace as changed

from peer.decide.decision import Decision
from peer.decide.workers import free_slots, reachable
from peer.state.order import RunAttempt
from peer.state.snapshot import Save, Snapshot
from peer.state.task import Happening, Task, step


def schedule(snapshot: Snapshot, now: float) -> Decision:
    """Assign queued tasks to the free slots of ready replicas, the least loaded worker first."""
    decision = Decision()
    if not snapshot.queued or not snapshot.index.room:
        return decision
    taken: dict[str, int] = {}  # slots of each worker, by this decision
    for model_name, queue in _by_first_rank(snapshot):
        choice = _choice(snapshot, now, model_name, taken)
        if not choice:
            continue
        for _, task_id in queue:
            _, worker_id, load, free = heappop(choice)
            _assign(snapshot, now, snapshot.tasks[task_id], worker_id, decision)
            taken[worker_id] = taken.get(worker_id, 0) + 1
            if free > 1:
                heappush(choice, _entry(worker_id, load + 1, free - 1))
            elif not choice:
                break
    return decision


def _by_first_rank(snapshot: Snapshot) -> list[tuple[str, list[tuple[float, str]]]]:
    return sorted(snapshot.queues.items(), key=lambda entry: entry[1][0])


def _choice(
    snapshot: Snapshot, now: float, model_name: str, taken: dict[str, int]
) -> list[tuple[float, str, int, int]]:
    """A heap of the workers that have a free slot for this model and can be reached, the least loaded first."""
    choice = []
    for worker_id, free in snapshot.index.room.get(model_name, {}).items():
        load = len(snapshot.held.get(worker_id, ()))
        if worker_id in taken:
            load += taken[worker_id]
            free = free_slots(snapshot, snapshot.replicas[worker_id][model_name], load)
        if free > 0 and reachable(snapshot, worker_id, now):
            choice.append(_entry(worker_id, load, free))
    heapify(choice)
    return choice


def _entry(worker_id: str, load: int, free: int) -> tuple[float, str, int, int]:
    return load / (load + free), worker_id, load, free


def _assign(snapshot: Snapshot, now: float, task: Task, worker_id: str, decision: Decision) -> None:
    assigned = changed(
        task,
        status=step(task.status, Happening.ASSIGN),
        attempt=task.attempt + 1,
        worker_id=worker_id,
        assigned_at=now,
        started_at=None,
    )
    decision.changes.append(Save(assigned))
    order = RunAttempt(
        epoch=snapshot.epoch,
        worker_id=worker_id,
        task_id=task.task_id,
        attempt=assigned.attempt,
        model_name=task.model_name,
        task_type=task.task_type,
        parameters=snapshot.inputs[task.task_id].parameters,
        request_id=task.request_id,
    )
    decision.orders.append((snapshot.workers[worker_id].peer_id, order))
