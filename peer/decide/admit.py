"""Whether a task enters the table, and how a client takes it out again."""

from __future__ import annotations

from difflib import get_close_matches

from msgspec.structs import replace as changed

from peer.decide.decision import Decision
from peer.errors import Conflict, NotFound, Overloaded
from peer.state.command import CancelTask, SubmitTask, Submitted, TaskView
from peer.state.order import StopAttempt
from peer.state.record import idempotency_key
from peer.state.snapshot import Save, Snapshot
from peer.state.task import Happening, Idempotency, Status, Task, TaskInput, step

QUOTA_PART = 4  # of the store's quota, for the prompts of tasks that are not finished

_RETRY_AFTER_S = 5.0
_ROOM_AFTER_S = 30.0


def nearest(name: str, names: list[str]) -> list[str]:
    """Up to three names that `name` may have been meant to be."""
    return get_close_matches(name, names, n=3, cutoff=0.5)


def unknown_model(snapshot: Snapshot, name: str) -> NotFound:
    near = nearest(name, list(snapshot.catalogue))
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return NotFound(
        f"there is no model `{name}` in the catalogue{hint}",
        code="model_not_found",
        details={"model_name": name, "nearest": near},
    )


def first_of(snapshot: Snapshot, command: SubmitTask, stored: Idempotency | None) -> str | None:
    """The id of the task that this idempotency key has already made. Raises Conflict if that had another body."""
    if not command.idempotency_key:
        return None
    first = snapshot.idempotency.get(idempotency_key(command.owner, command.idempotency_key), stored)
    if first is None:
        return None
    if first.body_digest != command.body_digest:
        raise Conflict(
            "this Idempotency-Key was used with another body; use a new key for a new task",
            code="idempotency_mismatch",
            details={"task_id": first.task_id},
        )
    return first.task_id


def submit(
    snapshot: Snapshot, now: float, command: SubmitTask, task_id: str, parameters_bytes: int
) -> Decision:
    """A new task. Raises NotFound for an unknown model, Conflict for one that serves tasks of other types, Overloaded;
    with code `store_full` while the store has no room. `first_of` was asked before."""
    if command.model_name not in snapshot.catalogue:
        raise unknown_model(snapshot, command.model_name)
    task_types = snapshot.catalogue[command.model_name].task_types
    if command.task_type not in task_types:
        raise Conflict(
            f"task_type: {command.model_name} serves {' and '.join(task_types)}, not {command.task_type}",
            code="wrong_task_type",
            details={"field": "task_type", "model_name": command.model_name, "task_types": list(task_types)},
        )
    policy = snapshot.policy
    if snapshot.room.level in ("critical", "full"):
        raise Overloaded(snapshot.room.message, code="store_full", retry_after_s=_ROOM_AFTER_S)
    if len(snapshot.tasks) >= policy.queue_tasks_max:
        raise Overloaded(
            f"the queue is full ({policy.queue_tasks_max} tasks); try again later",
            retry_after_s=_RETRY_AFTER_S,
        )
    bytes_max = policy.queue_bytes_max
    if snapshot.room.quota_bytes:  # nothing but the tasks' end makes room where these fill the store
        bytes_max = min(bytes_max, snapshot.room.quota_bytes // QUOTA_PART)
    if snapshot.inputs_bytes + parameters_bytes > bytes_max:
        raise Overloaded(
            f"the queued prompts fill their {bytes_max} bytes; try again later",
            retry_after_s=_RETRY_AFTER_S,
        )
    task = Task(
        task_id=task_id,
        task_type=command.task_type,
        model_name=command.model_name,
        priority=command.priority,
        timeout_s=command.timeout_s,
        created_at=now,
        deadline=now + command.timeout_s,
        owner=command.owner,
        key_id=command.key_id,
        request_id=command.request_id,
        idempotency_key=command.idempotency_key,
        parameters_bytes=parameters_bytes,
    )
    decision = Decision(reply=Submitted(view=TaskView(task=task)))
    decision.changes = [Save(task), Save(TaskInput(task_id=task_id, parameters=command.parameters))]
    if command.idempotency_key:
        decision.changes.append(
            Save(
                Idempotency(
                    owner=command.owner,
                    key=command.idempotency_key,
                    task_id=task_id,
                    body_digest=command.body_digest,
                )
            )
        )
    return decision


def cancel(snapshot: Snapshot, now: float, command: CancelTask, finished: Task | None) -> Decision:
    """A live task becomes cancelled and its slot is freed. `finished` is the stored task where it is not live."""
    task = snapshot.tasks.get(command.task_id)
    if task is None:
        if finished is None:
            raise no_task(command.task_id)
        raise Conflict(
            f"the task is already {finished.status.value}",
            code="task_finished",
            details={"task_id": command.task_id, "status": finished.status.value},
        )
    ended = changed(task, status=step(task.status, Happening.CANCEL), completed_at=now)
    decision = Decision(reply=TaskView(task=ended), changes=[Save(ended)])
    stop(snapshot, task, decision)
    decision.event("task_cancelled", task_id=task.task_id, worker_id=task.worker_id)
    return decision


def stop(snapshot: Snapshot, task: Task, decision: Decision) -> None:
    """Order the slot of a held task to be freed."""
    if task.status is Status.QUEUED or task.worker_id is None:
        return
    worker = snapshot.workers.get(task.worker_id)
    if worker is not None:
        decision.orders.append(
            (
                worker.peer_id,
                StopAttempt(
                    epoch=snapshot.epoch, worker_id=task.worker_id, task_id=task.task_id, attempt=task.attempt
                ),
            )
        )


def no_task(task_id: str) -> NotFound:
    return NotFound(f"there is no task `{task_id}`", code="task_not_found", details={"task_id": task_id})
