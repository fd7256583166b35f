"""What becomes of tasks whose time is up, whose attempt was lost or whose worker has gone."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace as changed

from peer.decide.admit import stop
from peer.decide.decision import Decision
from peer.decide.workers import status
from peer.limits import ATTEMPTS_MAX, BATCH_COMMANDS_MAX, LOADS_FAILED_MAX
from peer.state.model import ReplicaState
from peer.state.snapshot import Save, Shown, Snapshot
from peer.state.task import Happening, Task, TaskError, run_s, step

_ATTEMPT_SHOWS_S = (
    3.0  # an attempt that its worker's report does not name so long after it was assigned is lost
)
_FAILED_MAX = 4 * BATCH_COMMANDS_MAX  # in one tick: a long queue whose time was up is no giant transaction


def fail(snapshot: Snapshot, now: float, task: Task, code: str, message: str) -> Decision:
    """The task ends as failed and its slot, if it holds one, is freed."""
    failed = changed(
        task,
        status=step(task.status, Happening.FAIL),
        completed_at=now,
        error=TaskError(code=code, message=message),
    )
    decision = Decision(changes=[Save(failed)], reasons=[f"{task.task_id} failed: {message}"])
    stop(snapshot, task, decision)
    decision.event(
        "task_failed",
        task_id=task.task_id,
        worker_id=task.worker_id,
        model_name=task.model_name,
        duration_s=run_s(failed),
        success=False,
        code=code,
        message=message,
    )
    return decision


def requeue(snapshot: Snapshot, now: float, task: Task, code: str, because: str, *, strike: bool) -> Decision:
    """Try again, unless engines and workers have failed this task too often."""
    strikes = task.strikes + strike
    if strikes >= ATTEMPTS_MAX:
        message = f"{strikes} attempts were lost; the last one because {because}"
        return fail(snapshot, now, task, "attempts_exhausted", message)
    queued = changed(
        task,
        status=step(task.status, Happening.REQUEUE),
        strikes=strikes,
        assigned_at=None,
        started_at=None,
        requeued_because=because,
    )
    decision = Decision(changes=[Save(queued)], reasons=[f"{task.task_id} re-queued: {because}"])
    stop(snapshot, task, decision)
    decision.event(
        "task_requeued",
        task_id=task.task_id,
        worker_id=task.worker_id,
        attempt=task.attempt,
        code=code,
        message=because,
    )
    return decision


def time_out(snapshot: Snapshot, now: float) -> Decision:
    """Fail live tasks whose deadline has passed, those that are longest overdue first."""
    decision = Decision()
    for deadline, task_id in snapshot.deadlines[:_FAILED_MAX]:
        if deadline > now:
            break
        task = snapshot.tasks[task_id]
        message = f"the task was not finished {task.timeout_s:g} s after its submission"
        decision.add(fail(snapshot, now, task, "timeout", message))
    return decision


def lost_attempts(snapshot: Snapshot, now: float) -> Decision:
    """Re-queue what is held by a silent worker, or by one whose report does not know of it."""
    decision = Decision()
    for worker_id, tasks in snapshot.held.items():
        if not tasks:
            continue
        report = snapshot.reports.get(worker_id)
        if report is None and now - snapshot.started_at < _ATTEMPT_SHOWS_S:
            continue  # a new leader gives every worker time for its first report
        silent = report is None or status(snapshot, worker_id, now) == "offline"
        running = frozenset(report.running) if report is not None else frozenset()
        for task in tasks.values():
            if f"{task.task_id}/{task.attempt}" in running and not silent:
                continue
            if now - (task.assigned_at or 0.0) < _ATTEMPT_SHOWS_S:
                continue
            because = f"worker {worker_id} is silent" if silent else f"worker {worker_id} lost the attempt"
            decision.add(requeue(snapshot, now, task, "worker_lost", because, strike=True))
    return decision


def hopeless(snapshot: Snapshot, now: float) -> Decision:
    """Fail the queued tasks of a model whose load has failed too often wherever it was tried."""
    decision = Decision()
    for model_name, queue in snapshot.queues.items():
        replicas = [of[model_name] for of in snapshot.replicas.values() if model_name in of]
        if not replicas or any(
            r.state is not ReplicaState.FAILED or r.failures < LOADS_FAILED_MAX for r in replicas
        ):
            continue
        last = replicas[-1]
        message = f"{model_name} cannot be loaded: {last.error}"
        for _, task_id in queue[:_FAILED_MAX]:
            decision.add(fail(snapshot, now, snapshot.tasks[task_id], "model_unavailable", message))
    return decision


def announce(snapshot: Snapshot, now: float, worker_ids: Iterable[str] | None = None) -> Decision:
    """Tell of every worker, or of those named, whose status has changed since clients were last told."""
    decision = Decision()
    for worker_id in snapshot.workers if worker_ids is None else worker_ids:
        is_now, was = status(snapshot, worker_id, now), snapshot.shown_status.get(worker_id)
        if is_now == was:
            continue
        report = snapshot.reports.get(worker_id)
        decision.changes.append(Shown(worker_id, is_now))
        decision.event(
            "worker_status_changed",
            worker_id=worker_id,
            status=is_now,
            previous_status=was,
            message=report.message if report is not None else "",
        )
    return decision
