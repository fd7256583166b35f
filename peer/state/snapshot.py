"""The leader's view of the cluster. Decisions read it; only `apply` changes it.

Live tasks are all in memory; finished ones are in the store alone. `apply` takes the changes that a decision
returned, one by one, and gives back what the store must write for them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, field

from peer.state.base import Record
from peer.state.event import Event
from peer.state.history import History
from peer.state.key import ApiKey
from peer.state.metric import Bucket
from peer.state.model import Assignment, LoadProfile, Model, Replica
from peer.state.plan import Plan
from peer.state.record import encode, idempotency_key, index_keys, key_of
from peer.state.task import TERMINAL, Idempotency, Status, Task, TaskInput
from peer.state.worker import Worker, WorkerReport


@dataclass(frozen=True, slots=True)
class Save:
    """Write a record; with `durable` False in memory only (it is saved with the record's next durable change)."""

    record: Record
    durable: bool = True


@dataclass(frozen=True, slots=True)
class Drop:
    """Delete a record."""

    record: Record


@dataclass(frozen=True, slots=True)
class Heard:
    """A worker's report, merged with what was foreseen; volatile."""

    report: WorkerReport
    replicas: tuple[Replica, ...]
    at: float


@dataclass(frozen=True, slots=True)
class Foresee:
    """What an order will make of a replica, until a report says it."""

    worker_id: str
    model_name: str
    replica: Replica
    at: float


@dataclass(frozen=True, slots=True)
class Drain:
    """Leader's wish that a replica takes no new task and goes when it is idle, or (False) no longer so."""

    worker_id: str
    model_name: str
    wanted: bool


@dataclass(frozen=True, slots=True)
class Pause:
    """This worker takes no new attempt until its next report: what was known of it no longer holds."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Downtime:
    """How long this worker's last start took, measured."""

    worker_id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Pace:
    """A task of this model has run for so long; the estimates of waits follow it slowly."""

    model_name: str
    run_s: float


@dataclass(frozen=True, slots=True)
class Shown:
    """The status that clients were last told of this worker."""

    worker_id: str
    status: str


Change = Save | Drop | Heard | Foresee | Drain | Pause | Downtime | Pace | Shown
_PACE_WEIGHT = 0.1  # of the newest task in the moving average of run times
StoreWrites = dict[str, bytes | None]  # key: value, or None to delete


@dataclass(frozen=True, slots=True)
class Policy:
    """What the owner may set and decisions depend on."""

    queue_tasks_max: int
    queue_bytes_max: int
    priority_step_s: float
    retention_age_s: float
    retention_count: int
    events_kept: int
    memory_reserve_bytes: int


@dataclass(slots=True)
class Snapshot:
    cluster_id: str
    peer_id: str
    epoch: int
    started_at: float
    policy: Policy
    catalogue: Mapping[str, Model]
    tasks: dict[str, Task] = field(default_factory=dict)
    inputs: dict[str, TaskInput] = field(default_factory=dict)
    inputs_bytes: int = 0
    queues: dict[str, list[tuple[float, str]]] = field(default_factory=dict)  # by model, in order of rank
    queued: int = 0
    deadlines: list[tuple[float, str]] = field(default_factory=list)  # of live tasks, the next first
    held: dict[str, dict[str, Task]] = field(default_factory=dict)  # by worker: assigned or running there
    idempotency: dict[str, Idempotency] = field(default_factory=dict)  # of live tasks
    workers: dict[str, Worker] = field(default_factory=dict)
    reports: dict[str, WorkerReport] = field(default_factory=dict)
    heard_at: dict[str, float] = field(default_factory=dict)
    replicas: dict[str, dict[str, Replica]] = field(default_factory=dict)  # by worker, by model
    foreseen: dict[tuple[str, str], Foresee] = field(default_factory=dict)
    draining: dict[tuple[str, str], None] = field(default_factory=dict)
    paused: dict[str, None] = field(default_factory=dict)  # workers, until they report
    downtime_s: dict[str, float] = field(default_factory=dict)
    run_s: dict[str, float] = field(default_factory=dict)  # by model, a moving average
    shown_status: dict[str, str] = field(default_factory=dict)  # by worker
    assignments: dict[tuple[str, str], Assignment] = field(default_factory=dict)
    profiles: dict[tuple[str, str], LoadProfile] = field(default_factory=dict)  # (device name, model)
    keys: dict[str, ApiKey] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    history: History = field(default_factory=History)
    events_from: int = 1  # oldest kept
    events_next: int = 1
    finished: int = 0

    def rank(self, task: Task) -> float:
        """Lower goes first: submission time, moved back by a step for each level of lower priority."""
        return task.created_at + task.priority * self.policy.priority_step_s

    def apply(self, change: Change) -> StoreWrites:
        """Take one change in; returns what the store must write. The only place where this object changes."""
        match change:
            case Save(record=record, durable=durable):
                writes = self._save(record)
                return writes if durable else {}
            case Drop(record=record):
                return self._drop(record)
            case Heard(report=report, replicas=replicas, at=at):
                self.reports[report.worker_id] = report
                self.heard_at[report.worker_id] = at
                self.paused.pop(report.worker_id, None)
                self.replicas[report.worker_id] = {replica.model_name: replica for replica in replicas}
                for model_name in [m for w, m in self.foreseen if w == report.worker_id]:
                    if not _still_foreseen(self, report.worker_id, model_name):
                        del self.foreseen[report.worker_id, model_name]
            case Foresee(worker_id=worker_id, model_name=model_name, replica=replica):
                self.foreseen[worker_id, model_name] = change
                self.replicas.setdefault(worker_id, {})[model_name] = replica
            case Drain(worker_id=worker_id, model_name=model_name, wanted=wanted):
                if wanted:
                    self.draining[worker_id, model_name] = None
                else:
                    self.draining.pop((worker_id, model_name), None)
            case Pause(worker_id=worker_id):
                self.paused[worker_id] = None
            case Downtime(worker_id=worker_id, seconds=seconds):
                self.downtime_s[worker_id] = seconds
            case Pace(model_name=model_name, run_s=run_s):
                known = self.run_s.get(model_name, run_s)
                self.run_s[model_name] = known + _PACE_WEIGHT * (run_s - known)
            case Shown(worker_id=worker_id, status=status):  # pragma: no branch - there is no other
                self.shown_status[worker_id] = status
        return {}

    # ------------------------------------------------------------------ durable records

    def _save(self, record: Record) -> StoreWrites:
        writes: StoreWrites = {key_of(record): encode(record)}
        match record:
            case Task():
                self._save_task(record, writes)
            case TaskInput():
                self.inputs[record.task_id] = record
            case Idempotency():
                self.idempotency[idempotency_key(record.owner, record.key)] = record
            case Worker():
                self.workers[record.worker_id] = record
            case Assignment():
                self.assignments[record.worker_id, record.model_name] = record
            case LoadProfile():
                self.profiles[record.device_name, record.model_name] = record
            case ApiKey():
                self.keys[record.key_id] = record
            case Plan():
                self.plans[record.rebalance_id] = record
            case Bucket():
                self.history.put(record)
            case Event():
                self.events_next = max(self.events_next, record.id + 1)
            case _:
                pass  # a TaskResult is in the store only
        return writes

    def _save_task(self, task: Task, writes: StoreWrites) -> None:
        old = self.tasks.get(task.task_id)
        new_keys = index_keys(task)
        for key in index_keys(old) - new_keys:
            writes[key] = None
        for key in new_keys:
            writes[key] = b""
        self._take_out(old)
        if task.status in TERMINAL:
            self.finished += 1
            self.inputs.pop(task.task_id, None)
            if task.idempotency_key:
                self.idempotency.pop(idempotency_key(task.owner, task.idempotency_key), None)
            return
        self.tasks[task.task_id] = task
        self.inputs_bytes += task.parameters_bytes
        insort(self.deadlines, (task.deadline, task.task_id))
        if task.status is Status.QUEUED:
            insort(self.queues.setdefault(task.model_name, []), (self.rank(task), task.task_id))
            self.queued += 1
        else:
            self.held.setdefault(task.worker_id or "", {})[task.task_id] = task

    def _take_out(self, task: Task | None) -> None:
        """Remove a live task from every structure that holds it."""
        if task is None:
            return
        del self.tasks[task.task_id]
        self.inputs_bytes -= task.parameters_bytes
        del self.deadlines[bisect_left(self.deadlines, (task.deadline, task.task_id))]
        if task.status is Status.QUEUED:
            queue = self.queues[task.model_name]
            del queue[bisect_left(queue, (self.rank(task), task.task_id))]
            self.queued -= 1
            if not queue:
                del self.queues[task.model_name]
        else:
            del self.held[task.worker_id or ""][task.task_id]

    def _drop(self, record: Record) -> StoreWrites:
        writes: StoreWrites = {key_of(record): None}
        match record:
            case Task():  # a finished one: live tasks are never dropped
                writes.update(dict.fromkeys(index_keys(record)))
                writes[f"input/{record.task_id}"] = None
                writes[f"result/{record.task_id}"] = None
                if record.idempotency_key:
                    writes[idempotency_key(record.owner, record.idempotency_key)] = None
                self.finished -= 1
            case Assignment():
                self.assignments.pop((record.worker_id, record.model_name), None)
            case ApiKey():
                self.keys.pop(record.key_id, None)
            case Plan():
                self.plans.pop(record.rebalance_id, None)
            case Bucket():
                self.history.drop(record)
            case Event():
                self.events_from = max(self.events_from, record.id + 1)
            case _:
                raise TypeError(f"a {type(record).__name__} is never dropped")
        return writes

    def load(self, record: Record) -> None:
        """Take in a record that the store already holds, when a leadership begins."""
        if isinstance(record, Task) and record.status in TERMINAL:
            raise TypeError("finished tasks stay in the store")
        self._save(record)


def _still_foreseen(snapshot: Snapshot, worker_id: str, model_name: str) -> bool:
    """Whether the merged replicas still show what was foreseen rather than what was reported."""
    foreseen = snapshot.foreseen[worker_id, model_name].replica
    return snapshot.replicas[worker_id].get(model_name) is foreseen
