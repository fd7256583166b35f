"""Any order of commands, reports and ticks: what must hold after every one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from peer.decide import admit, lose, meter, place, rebalance, recover, retain
from peer.decide.decision import Decision
from peer.decide.record import report
from peer.decide.workers import memory
from peer.errors import BitinglipError
from peer.state.command import AssignModel, CancelTask, Rebalance, RestartWorker, UnloadModel
from peer.state.index import Index
from peer.state.model import HOLDS_MEMORY, Replica, ReplicaState
from peer.state.order import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    LoadReplica,
    RunAttempt,
    StopAttempt,
    UnloadReplica,
)
from peer.state.record import decode, index_keys
from peer.state.task import TERMINAL, Idempotency, Status, Task, TaskResult
from peer.state.worker import EngineState
from tests.decide.build import (
    CATALOGUE,
    GIB,
    POLICY,
    World,
    failed,
    finished,
    replica,
    snapshot,
    started,
    worker_report,
)

WORKERS = ("w1", "w2")
MODELS = ("echo", "small", "large", "sized")
CODES = ("engine_died", "worker_unavailable", "model_not_loaded", "out_of_memory")
ENDS = {"start": started, "finish": finished, "fail": failed}
STATES = (EngineState.READY, *EngineState)
ANY = st.integers(0, 1_000_000)


def ready(model: str, worker: str) -> Replica:
    return replica(model, worker, slots=CATALOGUE[model].slots)


class Cluster(RuleBasedStateMachine):
    """Workers obey their orders; their reports are late, repeated, lost and of dead attempts."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(snapshot(replace(POLICY, events_kept=20, retention_count=5, queue_tasks_max=12)))
        self.loaded: dict[str, dict[str, Replica]] = {worker: {} for worker in WORKERS}
        self.runs: list[RunAttempt] = []  # every attempt ever ordered
        self.stopped: set[tuple[str, int]] = set()
        self.finals: dict[str, bytes] = {}
        self.results: dict[str, bytes] = {}
        self.attempts: dict[str, int] = {}
        self.forgotten: set[str] = set()
        self.events_seen = 0
        for worker in WORKERS:
            self.loaded[worker] = {"echo": ready("echo", worker)}
            self.hear(worker, True, EngineState.READY)

    # ------------------------------------------------------------ what happens

    def decide(self, decision: Any) -> None:
        world = self.world
        world.take(decision, then_schedule=True)
        for order in world.orders:
            held = self.loaded.get(getattr(order, "worker_id", ""), {})
            if isinstance(order, RunAttempt):
                self.runs.append(order)
            elif isinstance(order, StopAttempt):
                self.stopped.add((order.task_id, order.attempt))
            elif isinstance(order, LoadReplica):
                size = place.memory_needed(world.s, order.model, order.worker_id)
                held[order.model.name] = Replica(
                    worker_id=order.worker_id, model_name=order.model.name, state=ReplicaState.LOADING,
                    memory_bytes=size,
                )  # fmt: skip
            elif isinstance(order, UnloadReplica):
                held.pop(order.model_name, None)
        self.numbered()

    def command(self, decide: Any, *args: Any) -> None:
        try:
            decision = decide(self.world.s, self.world.now, *args)
        except BitinglipError:
            return
        self.decide(decision)

    @rule(
        model=st.sampled_from(("echo", "echo", *MODELS)),
        priority=st.integers(1, 10),
        timeout_s=st.integers(1, 60),
        key=ANY,
    )
    def submit(self, model: str, priority: int, timeout_s: int, key: int) -> None:
        text = f"i{key % 5}" if key % 2 else ""
        if text and any(
            decode(Idempotency, value).key == text
            for name, value in self.world.disk.items()
            if name.startswith("idempotency/")
        ):
            return  # replayed by the shell
        try:
            self.world.submit(model, priority=priority, timeout_s=float(timeout_s), idempotency_key=text)
        except BitinglipError:
            return
        self.numbered()
        self.decide(Decision())

    @rule(pick=ANY)
    def cancel(self, pick: int) -> None:
        ids = sorted(self.world.s.tasks) or ["none"]
        self.command(admit.cancel, CancelTask(task_id=ids[pick % len(ids)]), None)

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 31.0]), silent=st.booleans(), calm=st.booleans())
    def tick(self, seconds: float, silent: bool, calm: bool) -> None:
        world = self.world.later(0.25 if calm else seconds)
        s = world.s
        for worker in WORKERS:
            if not silent or calm:
                self.hear(worker, True, EngineState.READY)
        for decide in (lose.wake, lose.lose, recover.time_out, recover.lost_attempts):
            self.decide(decide(s, world.now))
        for decide in (recover.hopeless, place.reconcile):
            self.decide(decide(s, world.now))
        for decide in (rebalance.advance, recover.announce, meter.sample_gauges, meter.roll_up):
            self.decide(decide(s, world.now))
        self.decide(retain.forget_events(s))
        self.decide(retain.forget_plans(s))
        ended = sorted(self.finals.keys() - self.forgotten)
        tasks = [decode(Task, world.disk[f"task/{task_id}"]) for task_id in ended]
        tasks.sort(key=lambda task: (task.completed_at or 0, task.task_id))
        oldest = [(task.completed_at or 0.0, task.task_id) for task in tasks]
        due = retain.due(s, world.now, oldest)
        self.decide(retain.forget_tasks([task for task in tasks if task.task_id in due]))
        self.forgotten.update(due)

    @rule(
        worker=st.sampled_from(WORKERS),
        knows=st.booleans(),
        state=st.sampled_from(STATES),
    )
    def hear(self, worker: str, knows: bool, state: EngineState) -> None:
        running = [f"{run.task_id}/{run.attempt}" for run in self.runs if run.worker_id == worker]
        if state is not EngineState.READY and state is not EngineState.ERROR:
            self.loaded[worker] = {}
        said = worker_report(
            worker, *self.loaded[worker].values(), state=state, running=tuple(running) if knows else ()
        )
        self.world.hear(said)
        self.numbered()

    @rule(worker=st.sampled_from(WORKERS))
    def well(self, worker: str) -> None:
        self.hear(worker, True, EngineState.READY)
        self.decide(place.reconcile(self.world.s, self.world.now))

    @rule(worker=st.sampled_from(WORKERS), fails=st.booleans())
    def load_ends(self, worker: str, fails: bool) -> None:
        for name, held in self.loaded[worker].items():
            if held.state is ReplicaState.LOADING:
                self.loaded[worker][name] = Replica(
                    worker_id=worker, model_name=name, slots=2,
                    state=ReplicaState.FAILED if fails else ReplicaState.READY,
                    memory_bytes=0 if fails else held.memory_bytes,
                )  # fmt: skip
        self.hear(worker, True, EngineState.READY)

    @rule(
        pick=ANY,
        kind=st.sampled_from(sorted(ENDS)),
        code=st.sampled_from(CODES),
        retryable=st.booleans(),
        newest=st.booleans(),
    )
    def attempt_reports(self, pick: int, kind: str, code: str, retryable: bool, newest: bool) -> None:
        """Of any attempt that ever was, most often one of the newest."""
        if not self.runs:
            return
        run = self.runs[-1 - pick % min(3, len(self.runs))] if newest else self.runs[pick % len(self.runs)]
        at: Any = Task(
            task_id=run.task_id, task_type="", model_name=run.model_name, priority=1, timeout_s=1,
            created_at=0, deadline=1, attempt=run.attempt, worker_id=run.worker_id,
        )  # fmt: skip
        more = {"code": code, "retryable": retryable} if kind == "fail" else {}
        message: AttemptStarted | AttemptFinished | AttemptFailed
        message = ENDS[kind](at, self.world.now, **more)  # type: ignore[operator]
        self.decide(report(self.world.s, self.world.now, message))

    @rule(pick=ANY, ends=st.sampled_from(("finish", "finish", "start", "fail")))
    def held_attempt_reports(self, pick: int, ends: str) -> None:
        held = [task for tasks in self.world.s.held.values() for task in tasks.values()]
        if held:
            message: Any = ENDS[ends](held[pick % len(held)], self.world.now)
            self.decide(report(self.world.s, self.world.now, message))

    @rule(pick=ANY, model=st.sampled_from(MODELS), worker=st.sampled_from(("", *WORKERS)), sure=st.booleans())
    def operate(self, pick: int, model: str, worker: str, sure: bool) -> None:
        """What owners do now and then."""
        names = (worker,) if worker else ()
        match pick % 4:
            case 0:
                ask = AssignModel(model_name=model, worker_ids=names, preload=sure, priority=5)
                self.command(place.assign, ask, "a")
            case 1:
                self.command(place.unload, UnloadModel(model_name=model, worker_ids=names, force=sure))
            case 2:
                self.command(place.restart, RestartWorker(worker_id=worker or "w1"))
            case 3:
                strategy = sorted(rebalance.COSTS)[pick % len(rebalance.COSTS)]
                plan = Rebalance(strategy=strategy, force=sure, dry_run=False)
                self.command(rebalance.rebalance, plan, f"r{pick}")

    # ------------------------------------------------------------ what must hold

    def numbered(self) -> None:
        """Events have no gap, in the journal and in what is kept of it."""
        for event in self.world.batch.events:
            assert event.id == self.events_seen + 1
            self.events_seen = event.id
        s = self.world.s
        kept = sorted(int(key[6:]) for key in self.world.disk if key.startswith("event/"))
        assert kept == list(range(s.events_from, s.events_next))

    @invariant()
    def every_live_task_is_in_one_place(self) -> None:
        s = self.world.s
        queued = [task_id for queue in s.queues.values() for _, task_id in queue]
        held = [task_id for tasks in s.held.values() for task_id in tasks]
        assert sorted(queued + held) == sorted(s.tasks)
        assert s.queued == len(queued)
        for task_id, task in s.tasks.items():
            assert (task.status is Status.QUEUED) == (task_id in queued)
            assert task.status not in TERMINAL
            if task_id in held:
                assert s.held[task.worker_id or ""][task_id] == task
        for queue in s.queues.values():
            assert queue
            assert queue == sorted((s.rank(s.tasks[task_id]), task_id) for _, task_id in queue)
        assert s.inputs_bytes == sum(task.parameters_bytes for task in s.tasks.values())
        assert s.deadlines == sorted((task.deadline, task_id) for task_id, task in s.tasks.items())
        assert set(s.inputs) == set(s.tasks)
        assert len(s.tasks) <= s.policy.queue_tasks_max

    @invariant()
    def the_index_follows_from_the_facts(self) -> None:
        s, fresh = self.world.s, Index()
        for worker_id in s.workers:
            fresh.place(worker_id, {}, s.replicas.get(worker_id, {}))
            fresh.named[worker_id] = frozenset(s.reports[worker_id].running)
        for worker_id in s.workers:
            fresh.touch(s, worker_id)
        for name in ("placed", "room", "unmet", "unused", "doubtful", "named"):
            assert getattr(s.index, name) == getattr(fresh, name), name
        assert s.wishes == {
            w: {m: wish for (x, m), wish in s.assignments.items() if x == w} for w in s.wishes
        }
        assert list(s.listened.values()) == sorted(s.listened.values())
        lost = {w for peer_id in s.lost for w in s.peers[peer_id]}
        assert sorted([*s.listened, *s.silent, *lost]) == sorted(s.workers)
        assert s.under_way == {i: p for i, p in s.plans.items() if p.status == "initiated"}

    @invariant()
    def the_store_agrees(self) -> None:
        disk, s = self.world.disk, self.world.s
        tasks = {k[5:]: decode(Task, v) for k, v in disk.items() if k.startswith("task/")}
        indexes = {key for key in disk if key.startswith(("by/", "ended/"))}
        assert indexes == {key for task in tasks.values() for key in index_keys(task)}
        assert {i for i, task in tasks.items() if task.status not in TERMINAL} == set(s.tasks)
        assert s.finished == sum(task.status in TERMINAL for task in tasks.values())
        done = {i for i, task in tasks.items() if task.status is Status.COMPLETED}
        assert {k[7:] for k in disk if k.startswith("result/")} == done
        assert {k[6:] for k in disk if k.startswith("input/")} == set(s.tasks)
        drains = {k for k in disk if k.startswith("draining/")}
        assert drains == {f"draining/{worker}/{model}" for worker, model in s.draining}
        for task_id, task in tasks.items():
            encoded = disk[f"task/{task_id}"]
            if task.status in TERMINAL:
                assert self.finals.setdefault(task_id, encoded) == encoded
            assert task.attempt >= self.attempts.get(task_id, 0)
            self.attempts[task_id] = task.attempt
            if task_id in done:
                found = disk[f"result/{task_id}"]
                assert self.results.setdefault(task_id, found) == found
                assert decode(TaskResult, found).attempt == task.attempt
        assert not self.forgotten & tasks.keys()

    @invariant()
    def an_attempt_is_ordered_once(self) -> None:
        made = [(run.task_id, run.attempt) for run in self.runs]
        assert len(made) == len(set(made))
        for worker_id, tasks in self.world.s.held.items():
            for task in tasks.values():
                assert (task.task_id, task.attempt) not in self.stopped
                assert (task.task_id, task.attempt, worker_id) in {
                    (run.task_id, run.attempt, run.worker_id) for run in self.runs[-200:]
                }

    @invariant()
    def no_replica_has_more_than_its_slots(self) -> None:
        s = self.world.s
        for tasks in s.held.values():
            for model in MODELS:
                assert sum(task.model_name == model for task in tasks.values()) <= CATALOGUE[model].slots

    @invariant()
    def memory_is_never_promised_twice(self) -> None:
        s = self.world.s
        for worker_id, replicas in s.replicas.items():
            if worker_id in s.reports:
                promised = sum(r.memory_bytes for r in replicas.values() if r.state in HOLDS_MEMORY)
                assert promised <= 8 * GIB, (worker_id, replicas)
                assert memory(s, worker_id).free >= 0


Cluster.TestCase.settings = settings(
    derandomize=True, deadline=None, max_examples=100, stateful_step_count=80
)
TestCluster = Cluster.TestCase
