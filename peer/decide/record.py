"""What peers report becomes fact: the first result of a live attempt wins; what comes late is refused."""

from __future__ import annotations

from msgspec.structs import replace as changed

from peer.decide.decision import Decision
from peer.decide.recover import fail, requeue
from peer.limits import LOAD_RETRY_S
from peer.state.model import LoadProfile, Replica, ReplicaState
from peer.state.order import (
    AlertRaised,
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    EngineStarted,
    ForgetAttempt,
    ReplicaLoaded,
    Report,
    StopAttempt,
    WorkerReported,
)
from peer.state.snapshot import Alive, Downtime, Foresee, Heard, Pace, Pause, Save, Snapshot
from peer.state.task import Happening, Status, Task, TaskResult, run_s, step
from peer.state.worker import Worker, WorkerReport

_LOAD_FORESEEN_S = 5.0  # an order to load shows in a report by then, or was lost
_UNLOAD_FORESEEN_S = 30.0
_RETRY_FORESEEN_S = 2.0  # the failure before it may still be reported for so long
# Ends of an attempt for which neither the task nor an engine is to blame.
_NOT_A_STRIKE = frozenset(
    {"worker_unavailable", "model_not_loaded", "unloaded", "engine_restarted", "peer_stopping"}
)
_WAS_LOADED = frozenset({ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.UNLOADING})


def report(snapshot: Snapshot, now: float, message: Report) -> Decision:
    match message:
        case WorkerReported(report=worker_report):
            return heard(snapshot, now, worker_report)
        case AttemptStarted():
            return _started(snapshot, now, message)
        case AttemptFinished():
            return _finished(snapshot, now, message)
        case AttemptFailed():
            return _failed(snapshot, now, message)
        case ReplicaLoaded():
            return _loaded(message)
        case AlertRaised():
            return _alert(message)
        case EngineStarted(worker_id=worker_id, downtime_s=downtime_s):  # pragma: no branch - the last kind
            return Decision(changes=[Downtime(worker_id, downtime_s)])


# ---------------------------------------------------------------- attempts


def _live(snapshot: Snapshot, message: AttemptStarted | AttemptFinished | AttemptFailed) -> Task | None:
    """The task, if this attempt is its current one and was given to this worker."""
    task = snapshot.tasks.get(message.task_id)
    if task is None or task.status is Status.QUEUED:
        return None
    if task.attempt != message.attempt or task.worker_id != message.worker_id:
        return None
    return task


def _started(snapshot: Snapshot, now: float, message: AttemptStarted) -> Decision:
    task = _live(snapshot, message)
    if task is None:
        return _refuse(snapshot, message)
    if task.status is Status.RUNNING:
        return Decision()
    started_at = min(now, max(message.at, task.assigned_at or now))  # another host's clock may be off
    running = changed(task, status=step(task.status, Happening.START), started_at=started_at)
    # Not durable on its own: a lost start is found again as a lost attempt, and each start would cost an fsync.
    return Decision(changes=[Save(running, durable=False)])


def _finished(snapshot: Snapshot, now: float, message: AttemptFinished) -> Decision:
    task = _live(snapshot, message)
    if task is None:
        return _refuse(snapshot, message)
    started_at = task.started_at if task.started_at is not None else task.assigned_at
    done = changed(
        task,
        status=step(task.status, Happening.COMPLETE),
        started_at=started_at,
        completed_at=now,
        error=None,
        result_bytes=message.nbytes,
    )
    result = TaskResult(
        task_id=task.task_id,
        attempt=message.attempt,
        worker_id=message.worker_id,
        generated_text=message.generated_text,
        tokens_generated=message.tokens_generated,
        prompt_tokens=message.prompt_tokens,
        finish_reason=message.finish_reason,
        processing_s=message.processing_s,
        first_token_s=message.first_token_s,
        cached_tokens=message.cached_tokens,
        stand_in=message.stand_in,
        logprobs=message.logprobs,
        arrays=message.arrays,
    )
    took_s = run_s(done) or 0.0
    decision = Decision(changes=[Save(done), Save(result), Pace(task.model_name, took_s)])
    decision.event(
        "task_completed",
        task_id=task.task_id,
        worker_id=message.worker_id,
        model_name=task.model_name,
        duration_s=took_s,
        success=True,
    )
    _forget(snapshot, message, decision)
    return decision


def _failed(snapshot: Snapshot, now: float, message: AttemptFailed) -> Decision:
    task = _live(snapshot, message)
    if task is None:
        return _refuse(snapshot, message)
    if message.retryable:
        strike = message.code not in _NOT_A_STRIKE
        decision = requeue(snapshot, now, task, message.code, message.message, strike=strike)
        decision.changes.append(Pause(message.worker_id))
    else:
        decision = fail(snapshot, now, task, message.code, message.message)
    _forget(snapshot, message, decision)
    return decision


def _forget(snapshot: Snapshot, message: AttemptFinished | AttemptFailed, decision: Decision) -> None:
    order = ForgetAttempt(
        epoch=snapshot.epoch, worker_id=message.worker_id, task_id=message.task_id, attempt=message.attempt
    )
    worker = snapshot.workers.get(message.worker_id)
    if worker is not None:
        decision.orders.append((worker.peer_id, order))


def _refuse(snapshot: Snapshot, message: AttemptStarted | AttemptFinished | AttemptFailed) -> Decision:
    """A dead attempt: whatever it still does is void; its slot is freed and its outcome forgotten."""
    decision = Decision(reasons=[f"attempt {message.attempt} of {message.task_id} is dead"])
    worker = snapshot.workers.get(message.worker_id)
    if worker is None:
        return decision
    kind = StopAttempt if isinstance(message, AttemptStarted) else ForgetAttempt
    order = kind(
        epoch=snapshot.epoch, worker_id=message.worker_id, task_id=message.task_id, attempt=message.attempt
    )
    decision.orders.append((worker.peer_id, order))
    return decision


# ---------------------------------------------------------------- workers


def heard(snapshot: Snapshot, now: float, worker_report: WorkerReport) -> Decision:
    """A worker's report: it is known, alive, and its replicas are these."""
    worker_id = worker_report.worker_id
    decision = Decision()
    known = snapshot.workers.get(worker_id)
    if known is None or known.device != worker_report.device or known.peer_id != worker_report.peer_id:
        first_seen = known.first_seen if known is not None else now
        decision.changes.append(
            Save(
                Worker(
                    worker_id=worker_id,
                    peer_id=worker_report.peer_id,
                    device=worker_report.device,
                    first_seen=first_seen,
                )
            )
        )
    before = snapshot.replicas.get(worker_id, {})
    merged = _merge(snapshot, now, worker_report, before)
    for replica in merged.values():
        _replica_events(before.get(replica.model_name), replica, decision)
    for model_name, replica in before.items():
        if model_name not in merged and replica.state in _WAS_LOADED:
            decision.event("model_unloaded", model_name=model_name, worker_id=worker_id)
    decision.changes.append(Heard(worker_report, tuple(merged.values()), now))
    _stop_dead(snapshot, worker_report, decision)
    return decision


def still_so(snapshot: Snapshot, now: float, peer_id: str) -> Decision:
    """A peer has nothing to add to its last reports: what was foreseen since has not come about yet, or never will."""
    decision = Decision(changes=[Alive(peer_id, now)])
    waiting = dict.fromkeys(worker_id for worker_id, _ in snapshot.foreseen)
    for worker_id in waiting:
        worker_report = snapshot.reports.get(worker_id)
        if worker_report is not None and worker_report.peer_id == peer_id:
            decision.add(heard(snapshot, now, worker_report))
    return decision


def _stop_dead(snapshot: Snapshot, worker_report: WorkerReport, decision: Decision) -> None:
    """Free the slots of dead attempts that a worker brings back: the order to stop them was lost with its peer.

    Named by two reports: what has just ended is named once more until its outcome is forgotten.
    """
    known = snapshot.index.named.get(worker_report.worker_id, frozenset())
    for key in worker_report.running:
        if key not in known:
            continue
        task_id, _, attempt = key.rpartition("/")
        task = snapshot.tasks.get(task_id)
        if (
            task is not None
            and task.status is not Status.QUEUED
            and (task.worker_id, str(task.attempt)) == (worker_report.worker_id, attempt)
        ):
            continue
        order = StopAttempt(
            epoch=snapshot.epoch,
            worker_id=worker_report.worker_id,
            task_id=task_id,
            attempt=int(attempt),
        )
        decision.orders.append((worker_report.peer_id, order))
        decision.reasons.append(f"{worker_report.worker_id} still has the dead attempt {key}")


def _merge(
    snapshot: Snapshot, now: float, worker_report: WorkerReport, before: dict[str, Replica]
) -> dict[str, Replica]:
    """Reported replicas, with what was ordered and cannot show in this report yet, and failures counted."""
    merged = {}
    for replica in worker_report.replicas:
        merged[replica.model_name] = _count_failure(now, before.get(replica.model_name), replica)
    for (worker_id, model_name), foreseen in snapshot.foreseen.items():
        if worker_id == worker_report.worker_id and _still_ahead(now, foreseen, merged.get(model_name)):
            merged[model_name] = foreseen.replica
    return merged


def _still_ahead(now: float, foreseen: Foresee, reported: Replica | None) -> bool:
    """Whether the order is newer than what the report says of this replica."""
    age = now - foreseen.at
    if foreseen.replica.state is ReplicaState.UNLOADING:
        return reported is not None and age < _UNLOAD_FORESEEN_S
    if reported is None:
        return age < _LOAD_FORESEEN_S
    return reported.state is ReplicaState.FAILED and age < _RETRY_FORESEEN_S


def _count_failure(now: float, before: Replica | None, replica: Replica) -> Replica:
    """The executor reports a failure; how often, and when to try again, is the leader's to know."""
    failures = before.failures if before is not None else 0
    if replica.state is not ReplicaState.FAILED:
        return changed(replica, failures=0 if replica.state is ReplicaState.READY else failures)
    if before is not None and before.state is ReplicaState.FAILED:
        return changed(replica, failures=failures, not_before=before.not_before)
    wait_s = LOAD_RETRY_S[min(failures, len(LOAD_RETRY_S) - 1)]
    return changed(replica, failures=failures + 1, not_before=now + wait_s)


def _replica_events(before: Replica | None, replica: Replica, decision: Decision) -> None:
    was = before.state if before is not None else None
    if replica.state is was:
        return
    if replica.state is ReplicaState.READY:
        decision.event(
            "model_loaded",
            model_name=replica.model_name,
            worker_id=replica.worker_id,
            load_s=replica.load_s,
            memory_bytes=replica.memory_bytes,
        )
    elif replica.state is ReplicaState.FAILED:
        decision.event(
            "model_load_failed",
            model_name=replica.model_name,
            worker_id=replica.worker_id,
            code=replica.error_code,
            message=replica.error,
        )


def _loaded(message: ReplicaLoaded) -> Decision:
    profile = LoadProfile(
        model_name=message.model_name,
        device_name=message.device_name,
        memory_bytes=message.memory_bytes,
        load_s=message.load_s,
    )
    return Decision(changes=[Save(profile)])


def _alert(message: AlertRaised) -> Decision:
    decision = Decision()
    decision.event(
        "gpu_alert",
        worker_id=message.worker_id,
        kind=message.kind,
        level=message.level,
        raised=message.raised,
        value=message.value,
        threshold=message.threshold,
        unit=message.unit,
        message=message.message,
    )
    return decision
