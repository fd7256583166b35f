"""Small clusters for tests of decisions: a snapshot, and beside it what the store would hold."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace as changed

from peer.decide import admit, lose, place, recover, schedule
from peer.decide.batch import Batch
from peer.decide.decision import Decision
from peer.decide.record import heard, report
from peer.state.command import SubmitTask
from peer.state.model import Model, Replica, ReplicaState
from peer.state.order import AttemptFailed, AttemptFinished, AttemptStarted, RunAttempt
from peer.state.record import task_id
from peer.state.snapshot import Drop, Policy, Save, Snapshot
from peer.state.task import Status, Task
from peer.state.worker import DeviceInfo, EngineState, HostInfo, Telemetry, Worker, WorkerReport

T0 = 1_700_000_040.0  # on a whole minute
GIB = 1 << 30
HOST = HostInfo(cpu="c", ram_total_bytes=1, ram_used_bytes=1, os="o")
POLICY = Policy(
    queue_tasks_max=100,
    queue_bytes_max=10_000,
    priority_step_s=600.0,
    retention_age_s=3_600.0,
    retention_count=1_000,
    events_kept=1_000,
    memory_reserve_bytes=0,
)
ECHO = Model(name="echo", source="builtin:echo", family="echo", slots=2, memory_bytes=GIB)
SMALL = Model(name="small", source="file:/small.gguf", family="llama", slots=2, memory_bytes=4 * GIB)
LARGE = Model(name="large", source="file:/large.gguf", family="llama", slots=2, memory_bytes=7 * GIB)
SIZED = Model(name="sized", source="file:/sized.gguf", family="llama", slots=2, size_bytes=GIB)
CATALOGUE = {model.name: model for model in (ECHO, SMALL, LARGE, SIZED)}


def snapshot(policy: Policy = POLICY, catalogue: dict[str, Model] | None = None) -> Snapshot:
    return Snapshot(
        cluster_id="c1",
        peer_id="p1",
        epoch=7,
        started_at=T0,
        policy=policy,
        catalogue=CATALOGUE if catalogue is None else catalogue,
    )


def replica(model: str, worker: str = "w1", **fields: Any) -> Replica:
    known = CATALOGUE.get(model)
    fields.setdefault("state", ReplicaState.READY)
    fields.setdefault("slots", 2)
    if fields["state"] not in (ReplicaState.FETCHING, ReplicaState.FAILED) and known is not None:
        fields.setdefault("memory_bytes", known.memory_bytes)
    return Replica(worker_id=worker, model_name=model, **fields)


def device(**fields: Any) -> DeviceInfo:
    return DeviceInfo(**{"device": "fake", "name": "card", "stand_in": True, **fields})


def worker_report(worker: str = "w1", *replicas: Replica, **fields: Any) -> WorkerReport:
    replicas = tuple(changed(r, worker_id=worker) for r in replicas)
    used = sum(r.memory_bytes for r in replicas)
    telemetry = Telemetry(memory_total_bytes=8 * GIB, memory_used_bytes=used, utilization_percent=50.0)
    return WorkerReport(
        **{
            "worker_id": worker,
            "peer_id": "p1",
            "state": EngineState.READY,
            "device": device(),
            "host": HOST,
            "telemetry": telemetry,
            "replicas": replicas,
            **fields,
        }
    )


class World:
    """A snapshot, the keys that its writes come to, and what was decided last."""

    def __init__(self, at: Snapshot | None = None, now: float = T0) -> None:
        self.s = at if at is not None else snapshot()
        self.now = now
        self.disk: dict[str, bytes] = {}
        self.batch = Batch(self.s, now)
        self._made = 0

    def take(self, decision: Decision, *, then_schedule: bool = False) -> Any:
        """As the leader does: apply, write; returns the reply."""
        self.batch = Batch(self.s, self.now)
        self.batch.take(decision)
        if then_schedule:
            self.batch.take(schedule.schedule(self.s, self.now))
        self.batch.count_ended()
        for key, value in self.batch.writes.items():
            if value is None:
                self.disk.pop(key, None)
            else:
                self.disk[key] = value
        return decision.reply

    def later(self, seconds: float) -> World:
        self.now += seconds
        return self

    @property
    def events(self) -> list[str]:
        return [event.event for event in self.batch.events]

    @property
    def orders(self) -> list[Any]:
        return [order for _, order in self.batch.orders]

    def data(self, name: str) -> dict[str, Any]:
        return next(event.data for event in self.batch.events if event.event == name)

    def submit(self, model: str = "echo", **fields: Any) -> Task:
        self._made += 1
        command = SubmitTask(
            **{
                "task_type": "text_generation",
                "model_name": model,
                "parameters": {"prompt": "x"},
                "priority": 5,
                "timeout_s": 300.0,
                "owner": "o",
                "key_id": "k",
                **fields,
            }
        )
        made = task_id(self.now, f"{self._made:010x}")
        self.take(admit.submit(self.s, self.now, command, made, 10))
        return self.s.tasks[made]

    def worker(self, worker: str = "w1", *replicas: Replica, **fields: Any) -> None:
        """It registers or reports."""
        said = worker_report(worker, *replicas, **fields)
        self.take(Decision(changes=[Save(Worker(
            worker_id=worker, peer_id=said.peer_id, device=said.device, first_seen=self.now
        ))]))  # fmt: skip
        self.hear(said)

    def known(self, worker: str, peer_id: str = "p1") -> None:
        """Registered once, not heard of since the leadership began."""
        self.take(Decision(changes=[Save(Worker(
            worker_id=worker, peer_id=peer_id, device=device(), first_seen=self.now
        ))]))  # fmt: skip

    def drain(self, model: str, worker: str = "w1", because: str = place.OWNER) -> None:
        self.take(Decision(changes=[place.drain(self.s, self.now, worker, model, because)]))

    def undrain(self, model: str, worker: str = "w1") -> None:
        self.take(Decision(changes=[Drop(self.s.draining[worker, model])]))

    def wake(self) -> None:
        """Whoever is silent by now is known to be; not by a leader that slept."""
        self.s.ticked_at = self.now
        self.take(lose.wake(self.s, self.now))

    def lost_attempts(self) -> None:
        """As in a tick: who is lost, then what was lost with them."""
        self.wake()
        self.take(lose.lose(self.s, self.now))
        self.take(recover.lost_attempts(self.s, self.now))

    def hear(self, said: WorkerReport) -> None:
        self.take(heard(self.s, self.now, said))

    def schedule(self) -> list[RunAttempt]:
        self.take(schedule.schedule(self.s, self.now))
        return self.orders

    def task(self, of: Task) -> Task:
        return self.s.tasks[of.task_id]

    def running(self, model: str = "echo", **fields: Any) -> Task:
        """A task that has started; there must be room for it."""
        task = self.submit(model, **fields)
        self.schedule()
        task = self.task(task)
        self.take(report(self.s, self.now, started(task, self.now)))
        return self.task(task)

    def held(self, model: str, worker: str, **fields: Any) -> Task:
        """A task that this worker holds, whatever there is room for."""
        task = self.submit(model, **fields)
        self.take(Decision(changes=[Save(assigned(task, worker, self.now))]))
        return self.task(task)


def assigned(task: Task, worker: str, now: float) -> Task:
    return changed(task, status=Status.ASSIGNED, attempt=task.attempt + 1, worker_id=worker, assigned_at=now)


def started(task: Task, at: float, **fields: Any) -> AttemptStarted:
    return AttemptStarted(
        **{
            "worker_id": task.worker_id or "",
            "task_id": task.task_id,
            "attempt": task.attempt,
            "at": at,
            "prompt_tokens": 1,
            **fields,
        }
    )


def finished(task: Task, at: float, **fields: Any) -> AttemptFinished:
    return AttemptFinished(
        **{
            "worker_id": task.worker_id or "",
            "task_id": task.task_id,
            "attempt": task.attempt,
            "at": at,
            "generated_text": "text",
            "tokens_generated": 8,
            "prompt_tokens": 1,
            "finish_reason": "stop",
            "processing_s": 1.0,
            "first_token_s": 0.1,
            **fields,
        }
    )


def failed(task: Task, at: float, code: str = "engine_died", **fields: Any) -> AttemptFailed:
    return AttemptFailed(
        **{
            "worker_id": task.worker_id or "",
            "task_id": task.task_id,
            "attempt": task.attempt,
            "at": at,
            "code": code,
            "message": "m",
            "retryable": True,
            **fields,
        }
    )
