"""What must hold after every step, whatever fails. Written from the product's contract, not from its decisions' code.

The checker keeps its own ledgers: `_seen` follows memory decision by decision, `_durable` follows the store write by
write. Each check counts how often it was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from peer.decide import rewind
from peer.decide.batch import Batch
from peer.decide.decision import Decision
from peer.decide.place import ROOM
from peer.errors import BitinglipError, Conflict, Overloaded
from peer.limits import ATTEMPTS_MAX, WORKER_SILENT_S
from peer.state import command as asks
from peer.state.model import Draining, ReplicaState
from peer.state.order import ForgetAttempt, LoadReplica, Report, RunAttempt, UnloadReplica, WorkerReported
from peer.state.record import decode, encode, key_of
from peer.state.snapshot import (
    Alive,
    Drop,
    Foresee,
    Heard,
    Linked,
    Lose,
    Rumoured,
    Save,
    Snapshot,
    StoreWrites,
)
from peer.state.task import TERMINAL, TRANSITIONS, Status, Task, TaskResult
from simulations.errors import InvariantViolated
from simulations.policy import agreement
from simulations.policy.heap import Heap
from simulations.policy.leavings import Leavings
from simulations.policy.losses import Losses
from simulations.policy.slots import Slots
from simulations.policy.sometimes import Sometimes, transition_name
from simulations.policy.store import SimStore
from simulations.policy.turns import Turns

_LATE_S = 3.0  # how long after its time a tick may act, with a slow store
_NO_STRIKE = frozenset(
    {
        "worker_unavailable", "model_not_loaded", "unloaded", "engine_restarted", "peer_stopping",
        "worker_restarted",
    }
)  # fmt: skip


class Checker:
    def __init__(self, heap: Heap, sometimes: Sometimes) -> None:
        self.counts: Counter[str] = Counter()
        self._heap = heap
        self._sometimes = sometimes
        self._seen: dict[str, Task] = {}
        self._durable: dict[str, Task] = {}
        self._results: dict[str, bytes] = {}
        self._given: dict[tuple[str, int], str] = {}
        self._acknowledged: dict[str, None] = {}
        self._cancelled: dict[str, None] = {}
        self._by_key: dict[tuple[str, str], str] = {}
        self._read: dict[str, bytes] = {}
        self.really_there: Callable[[str, str], object | None] = lambda worker_id, model_name: None
        self._owner_drains: dict[tuple[str, str], None] = {}  # in memory
        self._owed: dict[tuple[str, str], object | None] = {}  # durable: what is to go
        self._drains_decided: list[tuple[tuple[str, str], str]] = []  # and not yet durable
        self.losses = Losses(self)
        self._slots = Slots(self, self.losses)
        self.leavings = Leavings(self)
        self._turns = Turns(self)
        self._events_last = 0
        self._published_last = 0
        self._leader_since = 0.0

    # ------------------------------------------------------------ how a check is made

    def check(self, name: str, holds: bool, message: str = "") -> None:
        self.counts[name] += 1
        if not holds:
            raise InvariantViolated(name, message, self._heap.now)

    def bounded(self, what: str, size: int, limit: int) -> None:
        self.check("queues within bounds", size <= limit, f"{what}: {size} of at most {limit}")

    # ------------------------------------------------------------ decisions, before they are applied

    def decided(self, name: str, decision: Decision, snapshot: Snapshot, now: float) -> None:
        codes = {
            event.data["task_id"]: event.data.get("code", "")
            for event in decision.events
            if event.event == "task_requeued"
        }
        self.leavings.decided(name, decision, snapshot, now)
        for change in decision.changes:
            match change:
                case Save(record=Task() as task):
                    self._task_saved(task, codes.get(task.task_id), decision)
                case Drop(record=Draining() as draining):
                    self._drain_ends(name, draining, snapshot)
                case Save(record=Draining(worker_id=worker_id, model_name=model_name)):
                    if name == "UnloadModel":
                        self._owner_drains[worker_id, model_name] = None
                        self._drains_decided.append(((worker_id, model_name), name))
                    elif name == "advance":
                        self._not_the_last(snapshot, worker_id, model_name)
                    elif name == "reconcile":
                        self._sometimes.saw("eviction for room")
                        self._turns.gives_way(snapshot, worker_id, model_name)
                case Heard(report=report):
                    self._slots.touch(report.worker_id)
                    self.losses.heard(report, now, snapshot)
                case Alive(peer_id=peer_id):
                    self.losses.alive(peer_id, now, snapshot)
                case Linked():
                    self.losses.linked(change)
                    self._slots.touch(*snapshot.peers.get(change.peer_id, {}))
                case Rumoured():
                    self.losses.rumoured(change)
                case Lose():
                    self.losses.lost(change, snapshot, now)
                case Foresee(worker_id=worker_id, replica=replica):
                    if name in ("reconcile", "advance") and replica.state is ReplicaState.LOADING:
                        self._slots.fits(snapshot, worker_id, replica.model_name, replica.memory_bytes)
        for event in decision.events:
            if event.event == "cluster_rebalance_finished":
                self._sometimes.saw(f"rebalance {event.data['status']}")
        for reason in decision.reasons:
            if reason.startswith("attempt ") and reason.endswith(" is dead"):
                is_result = any(isinstance(order, ForgetAttempt) for _, order in decision.orders)
                self._sometimes.saw(f"late {'result' if is_result else 'start'} refused")
        if name == "forget_events":
            self._sometimes.saw("retention forgot events")
        if name == "reconcile" and any(snapshot.held.get(w) for w, _ in snapshot.draining):
            self._sometimes.saw("drain waited for a task")
        for _, order in decision.orders:
            if isinstance(order, UnloadReplica):
                self._unloads(snapshot, order)

    def _drain_ends(self, name: str, draining: Draining, snapshot: Snapshot) -> None:
        """By an owner who wants it after all, by a rebalance that gives its own up, or since the replica is gone."""
        place = draining.worker_id, draining.model_name
        self._slots.touch(draining.worker_id)
        is_owners = place in self._owner_drains
        self._owner_drains.pop(place, None)
        self._drains_decided.append((place, name))
        if name == "AssignModel":
            return
        if name == "reconcile":
            report = snapshot.reports.get(draining.worker_id)
            gone = report is not None and all(r.model_name != draining.model_name for r in report.replicas)
            self.check("a drain ends when the replica is gone", gone, f"{place} may still be there")
        else:
            self.check("an owner's unload is not taken back", not is_owners, f"{name} keeps {place}")

    def _task_saved(self, task: Task, code: str | None, decision: Decision) -> None:
        old = self._seen.get(task.task_id)
        self._seen[task.task_id] = task
        if task.worker_id is not None:
            self._slots.touch(task.worker_id)
        if old is None:
            fresh = task.status is Status.QUEUED and task.attempt == 0 and task.strikes == 0
            self.check("a task begins queued", fresh, f"{task.task_id} begins {task.status.value}")
            self._first_of_key(task)
            return
        legal = task.status in TRANSITIONS[old.status].values()
        name = transition_name(old.status.value, task.status.value)
        self.check("states follow the table", legal, f"{task.task_id}: {name}")
        self._sometimes.saw(name)
        expected = old.attempt + (task.status is Status.ASSIGNED)
        self.check(
            "attempts are numbered one by one",
            task.attempt == expected,
            f"{task.task_id} is at attempt {task.attempt}, {expected} was next",
        )
        self._strikes(old, task, code)
        if task.status is Status.FAILED and task.error is not None:
            self._failed(old, task.error.code)
        if task.status is Status.COMPLETED:
            results = [c.record for c in decision.changes if isinstance(c, Save)]
            has = any(isinstance(r, TaskResult) and r.task_id == task.task_id for r in results)
            self.check("completed with its result", has, f"{task.task_id} completed without a result")

    def _strikes(self, old: Task, task: Task, code: str | None) -> None:
        added = task.strikes - old.strikes
        if task.status is Status.QUEUED:
            expected = int(code not in _NO_STRIKE)
            self.check("every strike counts", added == expected, f"{task.task_id}: {added} for {code}")
            if not expected:
                self._sometimes.saw("task re-queued without strike")
        else:
            self.check(
                "every strike counts", added == 0, f"{task.task_id}: {added} while {task.status.value}"
            )
        within = task.strikes < ATTEMPTS_MAX or task.status in TERMINAL
        self.check("strikes within the limit", within, f"{task.task_id} has {task.strikes}")

    def _failed(self, old: Task, code: str) -> None:
        match code:
            case "attempts_exhausted":
                self._sometimes.saw("attempts exhausted")
            case "model_unavailable":
                self._sometimes.saw("model unavailable")
            case "timeout":
                self._sometimes.saw(f"timeout while {'queued' if old.status is Status.QUEUED else 'held'}")

    def _first_of_key(self, task: Task) -> None:
        if task.idempotency_key:
            first = self._by_key.get((task.owner, task.idempotency_key))
            self.check(
                "an idempotency key makes one task",
                first is None or first not in self._durable,
                f"{task.owner}/{task.idempotency_key} made {first} and then {task.task_id}",
            )

    def _not_the_last(self, snapshot: Snapshot, worker_id: str, model_name: str) -> None:
        """A rebalance takes a replica away only while another one can serve what waits."""
        if model_name not in snapshot.queues:
            return
        others = [
            w
            for w, of in snapshot.replicas.items()
            if w != worker_id
            and model_name in of
            and of[model_name].state is ReplicaState.READY
            and (w, model_name) not in snapshot.draining
        ]
        waiting = len(snapshot.queues[model_name])
        self.check(
            "a rebalance leaves a ready replica",
            bool(others),
            f"{model_name} leaves {worker_id}, where its last ready replica is, while {waiting} tasks wait",
        )

    def _unloads(self, snapshot: Snapshot, order: UnloadReplica) -> None:
        held = snapshot.held.get(order.worker_id, {}).values()
        uses = [task.task_id for task in held if task.model_name == order.model_name]
        text = f"{order.model_name} leaves {order.worker_id} under {uses}"
        self.check("nothing is unloaded under a task", not uses, text)
        for plan in snapshot.plans.values():
            for move in plan.moves if plan.status == "initiated" else ():
                if (
                    move.state in ("loading", "draining")
                    and (move.from_worker, move.model) == (order.worker_id, order.model_name)
                    and (order.worker_id, order.model_name) not in self._owner_drains
                    and not self._makes_room(snapshot, order)  # decided while nothing waited for it
                ):
                    self._not_the_last(snapshot, order.worker_id, order.model_name)

    @staticmethod
    def _makes_room(snapshot: Snapshot, order: UnloadReplica) -> bool:
        draining = snapshot.draining.get((order.worker_id, order.model_name))
        return draining is not None and draining.because == ROOM

    # ------------------------------------------------------------ who is there

    def ticked(self, now: float, snapshot: Snapshot) -> None:
        self.losses.ticked(now, snapshot)

    def arrived(self, report: Report) -> None:
        """At the leader's process; whether it looks is another matter."""
        if isinstance(report, WorkerReported):
            self.losses.arrived(report.report.peer_id, self.now)

    @property
    def now(self) -> float:
        return self._heap.now

    def saw(self, name: str) -> None:
        self._sometimes.saw(name)

    # ------------------------------------------------------------ batches

    def batch_decided(self, work: Batch, snapshot: Snapshot) -> None:
        """All decided and in memory, nothing durable yet."""
        policy = snapshot.policy
        self.bounded("tasks", len(snapshot.tasks), policy.queue_tasks_max)
        self.bounded("bytes of inputs", snapshot.inputs_bytes, policy.queue_bytes_max)
        for _, order in work.orders:
            if isinstance(order, RunAttempt):
                self._slots.assigned(snapshot, order)
        self._slots.none_idle(snapshot)

    def _drains_durable(self) -> None:
        """An owner's unload is owed from when it is durable until that very replica has gone."""
        decided, self._drains_decided = self._drains_decided, []
        for place, name in decided:
            if name == "UnloadModel":
                self._owed.setdefault(place, self.really_there(*place))
                continue
            owed = self._owed.pop(place, None)
            if owed is not None and name == "reconcile":
                gone = self.really_there(*place) is not owed
                self.check("an acknowledged unload happens", gone, f"{place} is still there")
                self._sometimes.saw("owner's unload happened")

    # ------------------------------------------------------------ the store

    def stored(self, writes: StoreWrites) -> None:
        """A transaction is about to become durable, known to the leader or not."""
        self._drains_durable()
        self.leavings.stored(writes)
        tasks = {key[5:]: value for key, value in writes.items() if key.startswith("task/")}
        for task_id, value in tasks.items():
            self._task_stored(task_id, decode(Task, value) if value is not None else None)
        for key, value in writes.items():
            if key.startswith("result/"):
                self._result_stored(key[7:], value)
        # One that is made and forgotten in the same transaction is numbered all the same.
        numbers = [int(key[6:]) for key in writes if key.startswith("event/")]
        for number in sorted(number for number in numbers if number > self._events_last):
            text = f"event {number} comes after {self._events_last}"
            self.check("events are numbered without gap", number == self._events_last + 1, text)
            self._events_last = number

    def _task_stored(self, task_id: str, task: Task | None) -> None:
        old = self._durable.get(task_id)
        if task is None:
            forgets_live = old is not None and old.status not in TERMINAL
            self.check("only finished tasks are forgotten", not forgets_live, f"{task_id} was live")
            self._durable.pop(task_id, None)
            self._seen.pop(task_id, None)
            self._acknowledged.pop(task_id, None)
            self._cancelled.pop(task_id, None)
            self._read.pop(task_id, None)
            return
        if old is not None:
            self.check("terminal is final", old.status not in TERMINAL, f"{task_id} was {old.status.value}")
            self.check("attempts only grow", task.attempt >= old.attempt, f"{task_id}: {task.attempt}")
        gone = task.status is Status.COMPLETED and task_id in self._cancelled
        self.check("a cancelled task never completes", not gone, task_id)
        self._durable[task_id] = task
        if task.idempotency_key:
            self._by_key[task.owner, task.idempotency_key] = task_id

    def _result_stored(self, task_id: str, value: bytes | None) -> None:
        if value is None:
            self._results.pop(task_id, None)
            return
        result = decode(TaskResult, value)
        self.check("one result per task", task_id not in self._results, f"{task_id} has one already")
        self._results[task_id] = value
        given = self._given.get((task_id, result.attempt))
        self.check(
            "a result comes from where its attempt was given",
            given == result.worker_id and result.generated_text == f"{given}:{task_id}/{result.attempt}",
            f"{task_id}: attempt {result.attempt} was given to {given}; {result.worker_id} recorded",
        )

    def committed(self, writes: StoreWrites, store: SimStore, snapshot: Snapshot) -> None:
        """Memory and store agree about every task that this commit touched."""
        for key in writes:
            if not key.startswith("task/"):
                continue
            task = snapshot.tasks.get(key[5:])
            value = store.value(key)
            if task is None:
                ended = value is None or decode(Task, value).status in TERMINAL
                self.check("memory equals store", ended, f"{key} is live in the store only")
            else:
                self.check("memory equals store", encode(task) == value, f"{key} differs")

    def carried_out(self, work: Batch) -> None:
        """The commit is done: orders go out, events are published."""
        self._drains_durable()
        for _, order in work.orders:
            if isinstance(order, RunAttempt):
                key = (order.task_id, order.attempt)
                text = f"attempt {order.attempt} of {order.task_id} went to {self._given.get(key)} before"
                self.check("an attempt is given once", key not in self._given, text)
                self._given[key] = order.worker_id
                durable = self._durable.get(order.task_id)
                text = f"{order.task_id}/{order.attempt} is ordered before it is durable"
                is_durable = durable is not None and durable.attempt == order.attempt
                self.check("nothing is ordered before it is durable", is_durable, text)
            elif isinstance(order, LoadReplica):
                self.counts["loads ordered"] += 1
        for event in work.events:
            text = f"event {event.id} after {self._published_last}"
            self.check("events are published in order", event.id > self._published_last, text)
            self._published_last = event.id

    # ------------------------------------------------------------ leaderships

    def leader_started(self, snapshot: Snapshot, store: SimStore) -> None:
        self._seen = dict(self._durable)
        self.losses.begin(snapshot.started_at)
        self.leavings.begin(snapshot)
        self._drains_decided = []
        self._owner_drains = dict.fromkeys(self._owed)
        forgotten = [place for place in self._owed if place not in snapshot.draining]
        if self._owed:
            self._sometimes.saw("unload lived through a new leader")
        self.check("an acknowledged unload is not forgotten", not forgotten, f"{forgotten[:3]}")
        self._leader_since = self._heap.now
        self.whole(snapshot, store)
        if any(plan.status == "initiated" for plan in snapshot.plans.values()):
            self._sometimes.saw("rebalance lived through a new leader")

    def whole(self, snapshot: Snapshot, store: SimStore) -> None:
        """The snapshot beside the store, and its own structures beside each other."""
        live = {i: t for i, t in self._durable.items() if t.status not in TERMINAL}
        missing = [i for i in live if i not in snapshot.tasks]
        self.check("an acknowledged task is never lost", not missing, f"memory lacks {missing[:3]}")
        extra = [i for i in snapshot.tasks if i not in live]
        self.check("memory equals store", not extra, f"only memory has {extra[:3]}")
        lost = [i for i in self._acknowledged if i not in self._durable]
        self.check("an acknowledged task is never lost", not lost, f"the store lacks {lost[:3]}")
        self.check("events are numbered without gap", snapshot.events_next == self._events_last + 1)
        ended = len(self._durable) - len(live)
        self.check(
            "finished tasks are counted", snapshot.finished == ended, f"{snapshot.finished} of {ended}"
        )
        agreement.queues(self, snapshot)
        agreement.index(self, snapshot)
        groups: tuple[Any, ...] = (
            snapshot.workers.values(), snapshot.assignments.values(), snapshot.profiles.values(),
            snapshot.plans.values(), snapshot.draining.values(), snapshot.inputs.values(),
            snapshot.idempotency.values(), snapshot.leaving.values(),
        )  # fmt: skip
        for group in groups:
            for record in group:
                stored = store.value(key_of(record))
                same = stored == encode(record)
                if not same and stored is not None:
                    # Loaded with times that lay ahead, and not changed since.
                    loaded = rewind.record(decode(type(record), stored), snapshot.started_at)
                    same = encode(loaded) == encode(record)
                self.check("memory equals store", same, key_of(record))

    def timely(self, snapshot: Snapshot, now: float, stalled_s: float) -> None:
        """What a tick must have done by now. `stalled_s`: how long the leader may have been kept from it."""
        late = _LATE_S + stalled_s
        since = self._heap.now - self._leader_since
        if since <= WORKER_SILENT_S + late:
            return
        over = [i for deadline, i in snapshot.deadlines[:1] if deadline < now - late]
        self.check("deadlines are kept", not over, f"{over} should have timed out")
        self.losses.timely(snapshot, now, late)
        self._turns.timely(snapshot, now, late)

    # ------------------------------------------------------------ clients

    def submitted(self, command: asks.SubmitTask, answer: str | asks.Submitted) -> str:
        """An acknowledgement; returns the task's id."""
        task_id = answer if isinstance(answer, str) else answer.view.task.task_id
        # By the time that an answer arrives, retention may have forgotten a task that ended in between.
        if isinstance(answer, asks.Submitted):
            self._acknowledged[task_id] = None
            self.check("an acknowledged task is never lost", task_id in self._durable, task_id)
        if command.idempotency_key:
            known = self._by_key.get((command.owner, command.idempotency_key))
            same = known == task_id or known is None or known not in self._durable
            self.check("an idempotency key makes one task", same, f"{known} and {task_id}")
        return task_id

    def refused(self, error: BitinglipError) -> None:
        if isinstance(error, Overloaded):
            self._sometimes.saw("queue full")
        elif isinstance(error, Conflict):
            match error.code:
                case "idempotency_mismatch":
                    self._sometimes.saw("idempotency mismatch")
                case "task_finished":
                    self._sometimes.saw("cancel of a finished task")
                case "does_not_fit":
                    self._sometimes.saw("does not fit")
                case "no_other_host":
                    self._sometimes.saw("no other host to drain to")

    def cancelled(self, view: asks.TaskView) -> None:
        task = view.task
        self._sometimes.saw(f"cancel of a {'held' if task.assigned_at is not None else 'queued'} task")
        if task.task_id in self._durable:
            self._cancelled[task.task_id] = None

    def read(self, view: asks.TaskView) -> None:
        """What a client has read of a finished task never changes."""
        task = view.task
        if task.status not in TERMINAL:
            return
        now = encode(task) + (encode(view.result) if view.result is not None else b"")
        before = self._read.setdefault(task.task_id, now)
        self.check("what was read never changes", before == now, task.task_id)
        complete = (view.result is not None) == (task.status is Status.COMPLETED)
        self.check("completed with its result", complete, task.task_id)

    def never_found(self, task_id: str) -> None:
        lost = task_id in self._acknowledged
        self.check("an acknowledged task is never lost", not lost, f"a client cannot find {task_id}")
