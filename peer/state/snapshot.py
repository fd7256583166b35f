"""The leader's view of the cluster. Decisions read it; only `apply` changes it.

Live tasks are all in memory; finished ones are in the store alone. `apply` takes the changes that a decision
returned, one by one, and gives back what the store must write for them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peer.state.base import Record
from peer.state.enrol import Host, JoinToken, Registry, Revocation
from peer.state.event import Event
from peer.state.history import History
from peer.state.index import Index
from peer.state.key import ApiKey
from peer.state.metric import Bucket
from peer.state.model import Assignment, Draining, LoadProfile, Model, Replica
from peer.state.plan import Leaving, Plan
from peer.state.record import encode, idempotency_key, index_keys, index_value, key_of
from peer.state.task import TERMINAL, Idempotency, Status, Task, TaskInput
from peer.state.voter import Room, RoomLevel, RoomTold, VoterView
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
class Alive:
    """This peer has nothing to add to what its workers last reported; volatile."""

    peer_id: str
    at: float


@dataclass(frozen=True, slots=True)
class Foresee:
    """What an order will make of a replica, until a report says it."""

    worker_id: str
    model_name: str
    replica: Replica
    at: float


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


@dataclass(frozen=True, slots=True)
class Linked:
    """The leader's session with this peer's process came up, or ended. `dead`: its host says that there is no such
    process any more, by refusing a new connection to it."""

    peer_id: str
    up: bool
    at: float
    dead: bool = False


@dataclass(frozen=True, slots=True)
class Rumoured:
    """What gossip says of a peer: an opinion, not a fact."""

    peer_id: str
    status: Literal["alive", "leaving", "left", "failed"]
    at: float


@dataclass(frozen=True, slots=True)
class Ticked:
    """The leader is awake. With `slept` it was not for long: every silence counts from now."""

    at: float
    slept: bool = False


@dataclass(frozen=True, slots=True)
class Silent:
    """These workers have not been heard of for too long."""

    worker_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lose:
    """This peer is lost, until one of its workers reports. `confirmed`: by more than the evidence itself."""

    peer_id: str
    at: float
    because: str
    confirmed: bool


@dataclass(frozen=True, slots=True)
class Told:
    """Clients know the status of every worker."""


@dataclass(frozen=True, slots=True)
class Peopled:
    """Which hosts are there, since when, and for whom was planned last; volatile."""

    seen: frozenset[str]
    since: float
    planned_for: frozenset[str]
    planned_at: float


Change = (
    Save | Drop | Heard | Alive | Foresee | Pause | Downtime | Pace | Shown | Told | Linked | Rumoured | Ticked
    | Silent | Lose | Peopled | RoomTold
)  # fmt: skip
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
    lost_share_max: float = 0.34  # of the peers; more are not lost at once without confirmation
    retention_bytes: int = 1024**3  # of finished tasks: a store has room for so much only
    auto_rebalance: str = ""  # the strategy to plan by when hosts came or went; "": none


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
    listened: dict[str, float] = field(
        default_factory=dict
    )  # workers that are not silent, since; the longest first
    silent: dict[str, float] = field(default_factory=dict)  # those that are, since; without those of lost peers
    ticked_at: float = 0.0  # 0: not yet
    peers: dict[str, dict[str, None]] = field(default_factory=dict)  # workers by peer
    unlinked: dict[str, Linked] = field(default_factory=dict)  # by peer: whose session ended, and when
    rumours: dict[str, Rumoured] = field(default_factory=dict)  # by peer
    lost: dict[str, Lose] = field(default_factory=dict)  # by peer
    losses: dict[str, Lose] = field(default_factory=dict)  # the latest ones, also of peers that came back
    replicas: dict[str, dict[str, Replica]] = field(default_factory=dict)  # by worker, by model
    foreseen: dict[tuple[str, str], Foresee] = field(default_factory=dict)
    leaving: dict[str, Leaving] = field(default_factory=dict)  # by peer
    peopled: Peopled | None = None
    draining: dict[tuple[str, str], Draining] = field(default_factory=dict)
    paused: dict[str, None] = field(default_factory=dict)  # workers, until they report
    downtime_s: dict[str, float] = field(default_factory=dict)
    run_s: dict[str, float] = field(default_factory=dict)  # by model, a moving average
    shown_status: dict[str, str] = field(default_factory=dict)  # by worker
    assignments: dict[tuple[str, str], Assignment] = field(default_factory=dict)
    wishes: dict[str, dict[str, Assignment]] = field(default_factory=dict)  # the same, by worker, by model
    profiles: dict[tuple[str, str], LoadProfile] = field(default_factory=dict)  # (device name, model)
    keys: dict[str, ApiKey] = field(default_factory=dict)
    registry: Registry = field(default_factory=Registry)  # of hosts
    plans: dict[str, Plan] = field(default_factory=dict)
    under_way: dict[str, Plan] = field(default_factory=dict)  # plans that are not finished
    history: History = field(default_factory=History)
    index: Index = field(default_factory=Index)
    voters: tuple[VoterView, ...] = ()  # as the leader saw them last
    outlook: str = ""  # what a loss would mean; "" where there is one node
    room: Room = field(default_factory=Room)  # in the store, likewise
    room_told: RoomLevel = ""
    events_from: int = 1  # oldest kept
    events_next: int = 1
    finished: int = 0
    finished_bytes: int = 0  # about what the store holds of them

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
            case Heard():
                self._heard(change)
            case Alive(peer_id=peer_id, at=at):
                for worker_id in self.peers.get(peer_id, ()):
                    if worker_id in self.reports:
                        self._seen(worker_id, at)
                self._back(peer_id)
            case Foresee(worker_id=worker_id, model_name=model_name, replica=replica):
                self.foreseen[worker_id, model_name] = change
                of = self.replicas.setdefault(worker_id, {})
                of[model_name] = replica
                self.index.place(worker_id, {}, {model_name: replica})
                self.index.touch(self, worker_id)
            case Pause(worker_id=worker_id):
                self.paused[worker_id] = None
                self.index.touch(self, worker_id)
            case Downtime(worker_id=worker_id, seconds=seconds):
                self.downtime_s[worker_id] = seconds
            case Pace(model_name=model_name, run_s=run_s):
                known = self.run_s.get(model_name, run_s)
                self.run_s[model_name] = known + _PACE_WEIGHT * (run_s - known)
            case Shown(worker_id=worker_id, status=status):
                self.shown_status[worker_id] = status
            case Told():
                self.index.touched.clear()
            case Linked(peer_id=peer_id, up=up):
                if up:
                    self.unlinked.pop(peer_id, None)
                else:
                    self.unlinked[peer_id] = change
            case Peopled():
                self.peopled = change
            case RoomTold(level=level):
                self.room_told = level
            case Rumoured(peer_id=peer_id):
                self.rumours[peer_id] = change
            case Ticked(at=at, slept=slept):
                self.ticked_at = at
                if slept:
                    self.listened = dict.fromkeys(self.listened, at)
                    self.silent = dict.fromkeys(self.silent, at)
            case Silent(worker_ids=worker_ids):
                for worker_id in worker_ids:
                    self.silent[worker_id] = self.listened.pop(worker_id)
                    self.index.touch(self, worker_id)
            case Lose(peer_id=peer_id):  # pragma: no branch - there is no other
                self.lost[peer_id] = self.losses[peer_id] = change
                for worker_id in self.peers.get(peer_id, ()):
                    self.silent.pop(worker_id, None)
                    self.listened.pop(worker_id, None)
                    self.index.touch(self, worker_id)
        return {}

    # ------------------------------------------------------------------ who is there

    def _heard(self, change: Heard) -> None:
        report, worker_id = change.report, change.report.worker_id
        before, known = self.reports.get(worker_id), self.replicas.setdefault(worker_id, {})
        self.reports[worker_id] = report
        self._seen(worker_id, change.at)
        self._back(report.peer_id)
        if (
            before is not None
            and worker_id not in self.paused
            and not any(w == worker_id for w, _ in self.foreseen)
            and tuple(known.values()) == change.replicas
            and (report.state, report.slots_max, report.running, report.peer_id)
            == (before.state, before.slots_max, before.running, before.peer_id)
        ):
            return  # nothing but measurements
        self.paused.pop(worker_id, None)
        now = {replica.model_name: replica for replica in change.replicas}
        self.replicas[worker_id] = now
        self.index.place(worker_id, known, now)
        if before is None or before.running != report.running:
            self.index.named[worker_id] = frozenset(report.running)
        for model_name in [m for w, m in self.foreseen if w == worker_id]:
            if now.get(model_name) is not self.foreseen[worker_id, model_name].replica:
                del self.foreseen[worker_id, model_name]
        self.index.touch(self, worker_id)

    def _seen(self, worker_id: str, at: float) -> None:
        self.heard_at[worker_id] = at
        self.listened.pop(worker_id, None)  # the newest comes last
        self.listened[worker_id] = at
        if worker_id in self.silent:
            del self.silent[worker_id]
            self.index.touch(self, worker_id)

    def _back(self, peer_id: str) -> None:
        """Whoever reports is there, whatever was said of it."""
        self.unlinked.pop(peer_id, None)
        if self.lost.pop(peer_id, None) is not None:
            for worker_id in self.peers.get(peer_id, ()):
                if worker_id not in self.listened:  # another one of its workers reports
                    self.silent[worker_id] = self.heard_at.get(worker_id, self.started_at)
                self.index.touch(self, worker_id)

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
                before = self.workers.get(record.worker_id)
                if before is not None:
                    self.peers[before.peer_id].pop(record.worker_id)
                self.peers.setdefault(record.peer_id, {})[record.worker_id] = None
                self.workers[record.worker_id] = record
                if before is None:
                    self.listened[record.worker_id] = self.started_at
                self.index.touch(self, record.worker_id)
            case Assignment():
                self.assignments[record.worker_id, record.model_name] = record
                self.wishes.setdefault(record.worker_id, {})[record.model_name] = record
                self.index.touch(self, record.worker_id)
            case Leaving():
                self.leaving[record.peer_id] = record
            case Draining():
                self.draining[record.worker_id, record.model_name] = record
                self.index.touch(self, record.worker_id)
            case LoadProfile():
                self.profiles[record.device_name, record.model_name] = record
            case ApiKey():
                self.keys[record.key_id] = record
            case JoinToken() | Host() | Revocation():
                self.registry.save(record)
            case Plan():
                self.plans[record.rebalance_id] = record
                if record.status == "initiated":
                    self.under_way[record.rebalance_id] = record
                else:
                    self.under_way.pop(record.rebalance_id, None)
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
            writes[key] = index_value(key, task)
        self._take_out(old)
        if task.status in TERMINAL:
            self.finished += 1
            self.finished_bytes += task.kept_bytes
            self.inputs.pop(task.task_id, None)
            writes[f"input/{task.task_id}"] = None  # nobody asks for it any more
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
            worker_id = task.worker_id or ""
            self.held.setdefault(worker_id, {})[task.task_id] = task
            self.index.touch(self, worker_id)

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
            worker_id = task.worker_id or ""
            del self.held[worker_id][task.task_id]
            self.index.touch(self, worker_id)

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
                self.finished_bytes -= record.kept_bytes
            case Assignment():
                self.assignments.pop((record.worker_id, record.model_name), None)
                self.wishes.get(record.worker_id, {}).pop(record.model_name, None)
                self.index.unmet.pop((record.worker_id, record.model_name), None)
            case Worker():
                self._forget(record)
            case Leaving():
                self.leaving.pop(record.peer_id, None)
            case Draining():
                self.draining.pop((record.worker_id, record.model_name), None)
                self.index.touch(self, record.worker_id)
            case ApiKey():
                self.keys.pop(record.key_id, None)
            case JoinToken() | Host() | Revocation():
                self.registry.drop(record)
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

    def _forget(self, worker: Worker) -> None:
        """One that holds nothing and has no wishes any more."""
        worker_id = worker.worker_id
        del self.workers[worker_id], self.peers[worker.peer_id][worker_id]
        self.index.forget(worker_id, self.replicas.get(worker_id, {}))
        of_workers: tuple[dict[str, Any], ...] = (
            self.reports, self.replicas, self.heard_at, self.listened, self.silent, self.held, self.paused,
            self.downtime_s, self.shown_status, self.wishes,
        )  # fmt: skip
        for facts in of_workers:
            facts.pop(worker_id, None)
        self.foreseen = {key: each for key, each in self.foreseen.items() if key[0] != worker_id}
