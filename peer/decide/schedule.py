"""Which queued task goes to which replica. Run after every batch; takes the highest rank first."""

from __future__ import annotations

from msgspec.structs import replace as changed

from peer.decide.decision import Decision
from peer.decide.workers import free_slots, takes_tasks, usable
from peer.state.order import RunAttempt
from peer.state.snapshot import Save, Snapshot
from peer.state.task import Happening, Task, step


def schedule(snapshot: Snapshot, now: float) -> Decision:
    """Assign queued tasks to the free slots of ready replicas, the least loaded worker first."""
    decision = Decision()
    if not snapshot.queued:
        return decision
    workers = [w for w in usable(snapshot, now) if w not in snapshot.paused]
    load = {worker_id: len(snapshot.held.get(worker_id, ())) for worker_id in workers}
    for model_name, queue in _by_first_rank(snapshot):
        free = _free_slots(snapshot, model_name, load)
        for _, task_id in queue[: sum(free.values())]:
            worker_id = min(free, key=lambda w: (load[w] / (load[w] + free[w]), w))
            _assign(snapshot, now, snapshot.tasks[task_id], worker_id, decision)
            load[worker_id] += 1
            free[worker_id] -= 1
            if not free[worker_id]:
                del free[worker_id]
    return decision


def _by_first_rank(snapshot: Snapshot) -> list[tuple[str, list[tuple[float, str]]]]:
    return sorted(snapshot.queues.items(), key=lambda entry: entry[1][0])


def _free_slots(snapshot: Snapshot, model_name: str, load: dict[str, int]) -> dict[str, int]:
    """Free slots of this model's replicas, by worker; only those that have one. `load`: tasks that each holds."""
    free = {}
    for worker_id, held in load.items():
        replica = snapshot.replicas[worker_id].get(model_name)
        if replica is not None and takes_tasks(snapshot, replica):
            slots = free_slots(snapshot, replica, held)
            if slots > 0:
                free[worker_id] = slots
    return free


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
