"""What becomes of tasks whose time is up, whose attempt was lost or whose worker has gone."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace as changed

from peer.decide.admit import stop
from peer.decide.decision import Decision
from peer.decide.workers import away, status
from peer.limits import ATTEMPTS_MAX, BATCH_COMMANDS_MAX, LOADS_FAILED_MAX
from peer.state.model import ReplicaState
from peer.state.snapshot import Save, Shown, Snapshot, Told
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
    """Re-queue what is held by a lost worker, or by one whose report does not know of it."""
    decision = Decision()
    for worker_id in snapshot.index.doubtful:
        _doubt(snapshot, now, worker_id, decision)
    return decision


def _doubt(snapshot: Snapshot, now: float, worker_id: str, decision: Decision) -> None:
    """A silent worker keeps its tasks until its peer is lost, unless that has reported of another one."""
    peer_id = snapshot.workers[worker_id].peer_id
    loss = snapshot.lost.get(peer_id)
    report = snapshot.reports.get(worker_id)
    is_silent = worker_id not in snapshot.listened
    if loss is None:
        if report is None:
            return  # it may still report; else it will be lost
        if is_silent and not any(w in snapshot.listened for w in snapshot.peers[peer_id]):
            return
    is_away = is_silent or status(snapshot, worker_id, now) == "offline"
    named = snapshot.index.named.get(worker_id, frozenset())
    for task in tuple(snapshot.held[worker_id].values()):
        if not is_away and f"{task.task_id}/{task.attempt}" in named:
            continue
        if loss is None and now - (task.assigned_at or 0.0) < _ATTEMPT_SHOWS_S:
            continue
        if loss is not None:
            because = f"worker {worker_id} is lost: {loss.because}"
        elif is_away:
            because = f"worker {worker_id} is silent"
        else:
            because = f"worker {worker_id} lost the attempt"
        decision.add(requeue(snapshot, now, task, "worker_lost", because, strike=True))


def hopeless(snapshot: Snapshot, now: float) -> Decision:
    """Fail the queued tasks of a model whose load has failed too often wherever it was tried."""
    decision = Decision()
    for model_name, queue in snapshot.queues.items():
        replicas = snapshot.index.placed.get(model_name)
        if replicas is None or any(
            r.state is not ReplicaState.FAILED or r.failures < LOADS_FAILED_MAX for r in replicas.values()
        ):
            continue
        last = next(reversed(replicas.values()))
        message = f"{model_name} cannot be loaded: {last.error}"
        for _, task_id in queue[:_FAILED_MAX]:
            decision.add(fail(snapshot, now, snapshot.tasks[task_id], "model_unavailable", message))
    return decision


def announce(snapshot: Snapshot, now: float, worker_ids: Iterable[str] | None = None) -> Decision:
    """Tell of every worker, or of those named, whose status has changed since clients were last told."""
    decision = Decision()
    if worker_ids is None:
        worker_ids = snapshot.index.touched
        if worker_ids:
            decision.changes.append(Told())
    for worker_id in worker_ids:
        is_now, was = status(snapshot, worker_id, now), snapshot.shown_status.get(worker_id)
        if is_now == was:
            continue
        report = snapshot.reports.get(worker_id)
        message = away(snapshot, worker_id, now) or (report.message if report is not None else "")
        decision.changes.append(Shown(worker_id, is_now))
        decision.event(
            "worker_status_changed",
            worker_id=worker_id,
            status=is_now,
            previous_status=was,
            message=message,
        )
    return decision
