"""What clients are told: why a task waits and how long it may, what a worker is, how the cluster is."""

from __future__ import annotations

from bisect import bisect_left

from msgspec.structs import replace as changed

from peer.decide.meter import worker_metrics
from peer.decide.place import unknown_worker
from peer.decide.workers import (
    can_run,
    free_slots,
    held_of,
    is_up,
    load_seconds,
    memory,
    memory_needed,
    status,
    takes_tasks,
)
from peer.state.command import AssignmentView, ClusterStatus, ModelView, PendingReason, TaskView, WorkerView
from peer.state.metric import WorkerMetrics
from peer.state.model import Model, Replica, ReplicaState
from peer.state.snapshot import Snapshot
from peer.state.task import Status, Task

_SCORE_MAX = 10.0
_ONE_NODE = "one node: if it is lost, nothing is served until it is back, and its disk has the only copy"


# ---------------------------------------------------------------- tasks


def live_task(snapshot: Snapshot, now: float, task: Task) -> TaskView:
    """A task that is not finished."""
    if task.status is not Status.QUEUED:
        worker = snapshot.workers.get(task.worker_id or "")
        return TaskView(task=task, peer_id=worker.peer_id if worker is not None else "")
    return TaskView(
        task=task,
        pending=pending_reasons(snapshot, now, task),
        estimated_wait_s=estimated_wait_s(snapshot, now, task),
    )


def pending_reasons(snapshot: Snapshot, now: float, task: Task) -> tuple[PendingReason, ...]:
    """Why this queued task is on none of the workers, one by one."""
    if not snapshot.workers:
        return (PendingReason(worker_id="", reason="no worker has registered yet"),)
    model = snapshot.catalogue.get(task.model_name)
    if model is None:
        text = f"`{task.model_name}` is no longer in the catalogue"
        return (PendingReason(worker_id="", reason=text),)
    return tuple(
        PendingReason(worker_id=worker_id, reason=_pending_on(snapshot, now, task, model, worker_id))
        for worker_id in sorted(snapshot.workers)
    )


def _pending_on(snapshot: Snapshot, now: float, task: Task, model: Model, worker_id: str) -> str:
    state = status(snapshot, worker_id, now)
    report = snapshot.reports.get(worker_id)
    if state in ("offline", "error"):
        why = f": {report.message}" if report is not None and report.message else ""
        return f"the worker is {state}{why}"
    if not can_run(snapshot, model, worker_id):
        return f"{model.name} only runs on the stand-in engine"
    replica = snapshot.replicas[worker_id].get(model.name)
    if replica is None:
        return _not_loaded(snapshot, now, model, worker_id)
    if replica.state is ReplicaState.READY and takes_tasks(snapshot, replica):
        if free_slots(snapshot, replica, len(snapshot.held.get(worker_id, ()))) > 0:
            return "it is next and about to be assigned"
        ahead = bisect_left(snapshot.queues[model.name], (snapshot.rank(task), task.task_id))
        return f"all slots are taken; {ahead} tasks are ahead in the queue"
    if replica.state in (ReplicaState.FETCHING, ReplicaState.LOADING):
        share = f" ({replica.stage} {100 * replica.done // replica.total}%)" if replica.total else ""
        return f"{model.name} is {replica.state.value}{share}"
    if replica.state is ReplicaState.FAILED:
        return f"{model.name} could not be loaded ({replica.failures} times): {replica.error}"
    return f"{model.name} is being unloaded"


def _barred_s(snapshot: Snapshot, now: float, model: Model, worker_id: str) -> float:
    """For how long yet no task brings it there, as an owner has unloaded it by force; 0 if one may."""
    draining = snapshot.draining.get((worker_id, model.name))
    return max(0.0, draining.until - now) if draining is not None else 0.0


def _not_loaded(snapshot: Snapshot, now: float, model: Model, worker_id: str) -> str:
    if left_s := _barred_s(snapshot, now, model, worker_id):
        return (
            f"an owner has unloaded {model.name} by force: it is loaded again when it is assigned, or for tasks in "
            f"{left_s:.0f} s"
        )
    needed = memory_needed(snapshot, model, worker_id)
    room = memory(snapshot, worker_id)
    if needed > room.free:
        going = [name for name in snapshot.replicas[worker_id] if (worker_id, name) in snapshot.draining]
        leave = f"; {' and '.join(going)} will be unloaded when its tasks end" if going else ""
        return f"{model.name} does not fit: it {room.arithmetic(needed)}{leave}"
    busy = [
        r.model_name
        for r in snapshot.replicas[worker_id].values()
        if r.state in (ReplicaState.FETCHING, ReplicaState.LOADING)
    ]
    if busy:
        return f"{model.name} is not loaded; the worker is loading {busy[0]} first"
    return f"{model.name} is not loaded"


def estimated_wait_s(snapshot: Snapshot, now: float, task: Task) -> float | None:
    """From the queue ahead, the slots and this model's measured run time; None while nothing has been measured."""
    model = snapshot.catalogue.get(task.model_name)
    if model is None:
        return None
    workers = [w for w in snapshot.workers if is_up(snapshot, w, now) and can_run(snapshot, model, w)]
    replicas = [of[model.name] for w in workers if model.name in (of := snapshot.replicas[w])]
    serving = [r for r in replicas if takes_tasks(snapshot, r)]
    load_s = 0.0
    if not serving:
        if not workers:
            return None
        load_s = min(load_seconds(snapshot, model, w) + _barred_s(snapshot, now, model, w) for w in workers)
        begun = [now - r.since for r in replicas if r.state is ReplicaState.LOADING]
        load_s = max(0.0, load_s - max(begun, default=0.0))
    slots = sum(r.slots for r in serving) or model.slots
    held = sum(held_of(snapshot, r.worker_id, model.name) for r in serving)
    ahead = held + bisect_left(snapshot.queues.get(model.name, []), (snapshot.rank(task), task.task_id))
    if ahead < slots:
        return load_s
    run_s = snapshot.run_s.get(model.name)
    if run_s is None:
        return None
    return load_s + run_s * (1 + (ahead - slots) // slots)


# ---------------------------------------------------------------- workers


def shown_replicas(snapshot: Snapshot, worker_id: str) -> tuple[Replica, ...]:
    """A worker's replicas, with those that the leader drains shown as draining."""
    return tuple(
        changed(r, state=ReplicaState.DRAINING)
        if r.state is ReplicaState.READY and (worker_id, r.model_name) in snapshot.draining
        else r
        for r in snapshot.replicas.get(worker_id, {}).values()
    )


def worker(snapshot: Snapshot, now: float, worker_id: str) -> WorkerView:
    if worker_id not in snapshot.workers:
        raise unknown_worker(snapshot, worker_id)
    return _worker(snapshot, now, worker_id, _measured(snapshot, now))


def _measured(snapshot: Snapshot, now: float) -> dict[str, WorkerMetrics]:
    return {worker_id: worker_metrics(snapshot, worker_id, now) for worker_id in sorted(snapshot.workers)}


def _worker(snapshot: Snapshot, now: float, worker_id: str, measured: dict[str, WorkerMetrics]) -> WorkerView:
    return WorkerView(
        worker=snapshot.workers[worker_id],
        status=status(snapshot, worker_id, now),
        report=snapshot.reports.get(worker_id),
        replicas=shown_replicas(snapshot, worker_id),
        current_tasks=len(snapshot.held.get(worker_id, ())),
        last_heartbeat=snapshot.heard_at.get(worker_id),
        metrics=measured[worker_id],
        performance_score=_score(worker_id, measured),
    )


def _score(worker_id: str, measured: dict[str, WorkerMetrics]) -> float:
    """0 to 10: this hour's tokens/s relative to the fastest worker, times its share of tasks that did not fail.

    A worker that has run nothing has shown nothing yet: 0.
    """
    own = measured[worker_id]
    if own.tokens_per_s is None or own.error_rate is None:
        return 0.0
    fastest = max(each.tokens_per_s or 0.0 for each in measured.values())
    relative = own.tokens_per_s / fastest if fastest > 0 else 1.0
    return _SCORE_MAX * relative * (1.0 - own.error_rate)


def workers(snapshot: Snapshot, now: float) -> tuple[WorkerView, ...]:
    measured = _measured(snapshot, now)
    return tuple(_worker(snapshot, now, worker_id, measured) for worker_id in measured)


def assignments(snapshot: Snapshot) -> tuple[AssignmentView, ...]:
    """By worker: the replicas it has and the wishes for it."""
    return tuple(
        AssignmentView(
            worker_id=worker_id,
            replicas=shown_replicas(snapshot, worker_id),
            wishes=tuple(wish for wish in snapshot.assignments.values() if wish.worker_id == worker_id),
        )
        for worker_id in sorted(snapshot.workers)
    )


def models(snapshot: Snapshot) -> tuple[ModelView, ...]:
    return tuple(
        ModelView(
            model=model,
            replicas=tuple(
                replica
                for worker_id in sorted(snapshot.workers)
                for replica in shown_replicas(snapshot, worker_id)
                if replica.model_name == model.name
            ),
            queued=len(snapshot.queues.get(model.name, ())),
        )
        for model in snapshot.catalogue.values()
    )


# ---------------------------------------------------------------- cluster


def cluster(snapshot: Snapshot, now: float) -> ClusterStatus:
    """Sums over workers that are up; memory of the others is not available."""
    states = {worker_id: status(snapshot, worker_id, now) for worker_id in sorted(snapshot.workers)}
    up = [worker_id for worker_id, state in states.items() if state in ("online", "busy")]
    telemetry = [snapshot.reports[worker_id].telemetry for worker_id in up]
    utilizations = [t.utilization_percent for t in telemetry if t.utilization_percent is not None]
    reasons = tuple(
        f"{worker_id} is {state}: {report.message}"
        if (report := snapshot.reports.get(worker_id)) is not None and report.message
        else f"{worker_id} is {state}"
        for worker_id, state in states.items()
        if worker_id not in up
    )
    if not states:
        reasons = ("no worker has registered yet",)
    if snapshot.room.message:
        reasons += (snapshot.room.message,)
    overall = "down" if not up else "degraded" if reasons else "operational"
    return ClusterStatus(
        cluster_id=snapshot.cluster_id,
        status=overall,
        total_workers=len(states),
        active_workers=len(up),
        queued_tasks=snapshot.queued,
        running_tasks=sum(len(tasks) for tasks in snapshot.held.values()),
        gpu_utilization=sum(utilizations) / len(utilizations) if utilizations else 0.0,
        total_memory_bytes=sum(t.memory_total_bytes for t in telemetry),
        available_memory_bytes=sum(t.memory_total_bytes - t.memory_used_bytes for t in telemetry),
        uptime_s=now - snapshot.started_at,
        epoch=snapshot.epoch,
        leader=snapshot.peer_id,
        reasons=reasons,
        voters=snapshot.voters,
        outlook=snapshot.outlook or _ONE_NODE,
        room=snapshot.room,
    )
