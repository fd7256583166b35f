"""What must hold of every transaction that the store applies, whoever wrote it: the cluster's whole truth is there.

Reads the writes as records and compares each with what was there before. Knows nothing of how leaders decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import msgspec

from peer.limits import ATTEMPTS_MAX
from peer.ports import LEADER_KEY, Delete, Put, Write
from peer.state.record import decode
from peer.state.task import TERMINAL, TRANSITIONS, Idempotency, Status, Task, TaskResult
from simulations.errors import InvariantViolated

_REACHABLE: dict[Status, frozenset[Status]] = {}


def _reachable(status: Status) -> frozenset[Status]:
    """Every state that some sequence of happenings leads to: one transaction may hold several."""
    known = _REACHABLE.get(status)
    if known is None:
        found, new = set[Status](), {status}
        while new:
            found |= new
            new = {after for each in new for after in TRANSITIONS[each].values()} - found
        known = _REACHABLE[status] = frozenset(found)
    return known


@dataclass(slots=True)
class Durable:
    """The tasks as the store has them. `now` is virtual time."""

    now: Callable[[], float]
    checks: Counter[str] = field(default_factory=Counter)
    sometimes: Counter[str] = field(default_factory=Counter)
    tasks: dict[str, Task] = field(default_factory=dict)
    results: dict[str, TaskResult] = field(default_factory=dict)
    keys: dict[str, Idempotency] = field(default_factory=dict)
    given: dict[tuple[str, int], str] = field(default_factory=dict)  # (task, attempt): worker
    ended: list[tuple[float, str, str]] = field(default_factory=list)  # when, task, how: for the timeline
    last_event: int = 0
    first_event: int = 1
    epoch: int = 0
    writers: dict[int, str] = field(default_factory=dict)  # by epoch
    leaving: dict[str, float] = field(default_factory=dict)  # hosts that are to be emptied, since
    on_requeue: Callable[[Task, Task], None] = lambda before, after: None

    def applied(self, revision: int, writes: Sequence[Write], epoch: int | None, peer_id: str) -> None:
        """Called by the store's model for each transaction, in order. Raises InvariantViolated."""
        deposes = any(write.key == LEADER_KEY and isinstance(write, Delete) for write in writes)
        if epoch is not None and not deposes:
            self._writer(epoch, peer_id)
        wrote = {write.key: write for write in writes}
        for write in writes:
            if write.key == LEADER_KEY and isinstance(write, Put):
                self._elected(revision)
        dropped = [
            self.keys[write.key] for write in writes if isinstance(write, Delete) and write.key in self.keys
        ]
        for write in writes:
            kind = write.key.partition("/")[0]
            value = write.value if isinstance(write, Put) else None
            match kind:
                case "task":
                    self._task(write.key, value, wrote)
                case "result":
                    self._result(write.key, value)
                case "idempotency":
                    self._key(write.key, value)
                case "event":
                    self._event(write.key, value)
                case "leaving" if value is None:
                    self.leaving.pop(write.key[8:], None)
                case "leaving":
                    self.leaving[write.key[8:]] = self.now()
        for key in dropped:
            if key.task_id in self.tasks:
                self._violated("idempotency_keys_hold", f"the key of {key.task_id} went before its task")

    def acknowledged(self, task_id: str) -> None:
        """A client was told that this task was accepted."""
        self.checks["acknowledged_is_durable"] += 1
        if task_id not in self.tasks:
            self._violated("acknowledged_is_durable", f"{task_id} was acknowledged, and is not in the store")

    def live(self) -> list[Task]:
        return [task for task in self.tasks.values() if task.status not in TERMINAL]

    # ---------------------------------------------------------------- leadership

    def _elected(self, revision: int) -> None:
        self.checks["epochs_grow"] += 1
        if revision <= self.epoch:
            self._violated("epochs_grow", f"epoch {revision} after {self.epoch}")
        self.epoch = revision
        self.sometimes["leader_elected"] += 1

    def _writer(self, epoch: int, peer_id: str) -> None:
        self.checks["one_writer_per_epoch"] += 1
        known = self.writers.setdefault(epoch, peer_id)
        if known != peer_id:
            self._violated("one_writer_per_epoch", f"{known} and {peer_id} committed under epoch {epoch}")
        if epoch != self.epoch:
            self._violated("fenced", f"{peer_id} committed under epoch {epoch} after {self.epoch} began")

    # ---------------------------------------------------------------- tasks

    def _task(self, key: str, value: bytes | None, wrote: dict[str, Write]) -> None:
        task_id = key.removeprefix("task/")
        before = self.tasks.get(task_id)
        if value is None:
            self.checks["only_finished_tasks_go"] += 1
            if before is not None and before.status not in TERMINAL:
                self._violated("only_finished_tasks_go", f"{task_id} was deleted while {before.status}")
            self.tasks.pop(task_id, None)
            self.results.pop(task_id, None)
            self.sometimes["task_forgotten"] += 1
            return
        try:
            task = decode(Task, value)
        except msgspec.DecodeError as error:
            self._violated("records_are_readable", f"{key}: {error}")
        if before is not None:
            self._step(before, task)
        elif task.status is not Status.QUEUED and task.attempt == 0 and task.status not in TERMINAL:
            self._violated("transition_table", f"{task_id} begins as {task.status}")
        if task.status in (Status.ASSIGNED, Status.RUNNING):
            self._give(task)
        if task.status is Status.COMPLETED and (before is None or before.status not in TERMINAL):
            self.checks["completed_has_result"] += 1
            if f"result/{task_id}" not in wrote:
                self._violated("completed_has_result", f"{task_id} is completed without a result")
        if task.status in TERMINAL and (before is None or before.status not in TERMINAL):
            self.ended.append((self.now(), task_id, task.status.value))
            self.sometimes[f"task_{task.status.value}"] += 1
            if task.error is not None:
                self.sometimes[f"failed:{task.error.code}"] += 1
        self.tasks[task_id] = task

    def _step(self, before: Task, after: Task) -> None:
        self.checks["transition_table"] += 1
        if before.status in TERMINAL:
            if after != before:
                self._violated(
                    "terminal_is_final", f"{before.task_id} was {before.status}, now {after.status}"
                )
            return
        if after.status not in _reachable(before.status):
            self._violated("transition_table", f"{before.task_id}: {before.status} -> {after.status}")
        if after.status is not before.status:
            self.sometimes[f"{before.status.value}->{after.status.value}"] += 1
        if after.attempt == 3 and before.attempt < 3:
            self.sometimes["given_a_third_time"] += 1
        self.checks["attempts_grow"] += 1
        if after.attempt < before.attempt:
            self._violated("attempts_grow", f"{before.task_id}: attempt {before.attempt} -> {after.attempt}")
        if after.status is Status.QUEUED and before.status is not Status.QUEUED:
            self.sometimes["task_requeued"] += 1
            self.on_requeue(before, after)
        self.checks["strikes_within_limit"] += 1
        if after.strikes > ATTEMPTS_MAX:
            self._violated("strikes_within_limit", f"{before.task_id} has {after.strikes} strikes")

    def _give(self, task: Task) -> None:
        self.checks["one_worker_per_attempt"] += 1
        known = self.given.setdefault((task.task_id, task.attempt), task.worker_id or "")
        if known != task.worker_id:
            self._violated(
                "one_worker_per_attempt",
                f"attempt {task.attempt} of {task.task_id} was given to {known} and to {task.worker_id}",
            )

    def _result(self, key: str, value: bytes | None) -> None:
        task_id = key.removeprefix("result/")
        if value is None:
            return
        result = decode(TaskResult, value)
        self.checks["one_result"] += 1
        known = self.results.get(task_id)
        if known is not None and known != result:
            self._violated("one_result", f"the result of {task_id} was changed")
        self.results[task_id] = result
        self.checks["result_of_given_attempt"] += 1
        worker = self.given.get((task_id, result.attempt))
        if worker != result.worker_id:
            self._violated(
                "result_of_given_attempt",
                f"{result.worker_id} gave the result of attempt {result.attempt} of {task_id}, which had {worker}",
            )

    def _key(self, key: str, value: bytes | None) -> None:
        self.checks["idempotency_keys_hold"] += 1
        known = self.keys.get(key)
        if value is None:
            self.keys.pop(key, None)
            return
        record = decode(Idempotency, value)
        if known is not None and known.task_id != record.task_id:
            self._violated("idempotency_keys_hold", f"{known.task_id} and {record.task_id} have one key")
        self.keys[key] = record

    # ---------------------------------------------------------------- events

    def _event(self, key: str, value: bytes | None) -> None:
        number = int(key.removeprefix("event/"))
        self.checks["events_in_order"] += 1
        if value is None:
            if number != self.first_event:
                self._violated("events_in_order", f"event {number} went before {self.first_event}")
            self.first_event = number + 1
            return
        if number != self.last_event + 1:
            self._violated("events_in_order", f"event {number} follows {self.last_event}")
        self.last_event = number

    def _violated(self, check: str, message: str) -> NoReturn:
        raise InvariantViolated(check, message, self.now())
