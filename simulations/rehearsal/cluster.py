"""The planned hosts under the real decisions, with the events or without them."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from peer.errors import BitinglipError, ConfigError, Unavailable
from peer.state import command as asks
from peer.state.event import Event as ClusterEvent
from peer.state.order import Order
from peer.state.record import decode, prefix_end
from peer.state.snapshot import Policy
from peer.state.task import Task
from simulations.errors import InvariantViolated, SimulatorError
from simulations.policy.faults import FaultPlan
from simulations.policy.heap import WALL_BASE_S, Heap
from simulations.policy.hosts import SimPeer, World
from simulations.policy.invariants import Checker
from simulations.policy.shell import Decisions, SimLeader
from simulations.policy.sometimes import Sometimes
from simulations.policy.store import SimStore
from simulations.rehearsal.engines import START_S, Engine
from simulations.rehearsal.plan import Event, Plan, Stream, pieces

WARM_S = 120.0  # before the time that counts, beside the longest load: engines start, models are loaded
AFTER_S_MAX = 3_600.0  # after it, for the tasks that are still there
FOR_GOOD_S = 10 * 86_400.0
_REPEAT_S = 0.5  # a client whose request found no leader asks again
_REPEATS_MAX = 600
_EVENTS_KEPT = 2_000_000


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What became of every task. Times are seconds since the plan's `from`; negative ones lie before it."""

    tasks: tuple[Task, ...]
    events: tuple[ClusterEvent, ...]
    start_wall: float  # the wall clock's `from`
    busy_s: float  # of all devices, within the plan's time
    device_s: float  # all devices, all of that time
    unanswered: int  # submissions that no leader took
    virtual_s: float
    real_s: float


def rehearse(plan: Plan, *, with_events: bool) -> Rehearsed:
    """Raises InvariantViolated for the product's faults, SimulatorError for the rehearsal's own, ConfigError for
    what the cluster refuses.
    """
    cluster = _Cluster(plan, plan.events if with_events else ())
    try:
        return cluster.run()
    except (InvariantViolated, SimulatorError, ConfigError):
        raise
    except Exception as error:  # whatever else is raised here, no decision of the product did
        raise SimulatorError(f"at {cluster.heap.now:.3f} s: {type(error).__name__}: {error}") from error


class _NoGoodbye(random.Random):
    """A host that loses power says nothing to anybody: the least likely end of a process, and the only one here."""

    def random(self) -> float:
        return 0.0


class _Cluster:
    def __init__(self, plan: Plan, events: tuple[Event, ...]) -> None:
        self.heap = Heap(plan.seed)
        self._plan = plan
        self._events = events
        sometimes = Sometimes()
        self._checker = checker = Checker(self.heap, sometimes)
        self._store = SimStore(checker.stored)
        faults = FaultPlan()
        self._leader = SimLeader(
            self.heap, self._store, checker, faults, sometimes, Decisions(), _policy(), dict(plan.catalogue)
        )
        self._leader.peers = self
        self._world = World(self.heap, faults, sometimes, self._leader)
        self._peers: dict[str, SimPeer] = {}
        self._engines: dict[str, Engine] = {}
        for host in plan.hosts:
            peer = self._peers[host.peer_id] = SimPeer(self._world, host.peer_id, [])
            peer.skew_s = 0.0  # clocks agree: what is measured here is waiting
            engines: dict[str, Engine] = {
                f"{host.peer_id}-gpu{n}": Engine(peer, f"{host.peer_id}-gpu{n}", host, plan.speeds)
                for n in range(host.gpus)
            }
            peer.workers = dict(engines)
            self._engines.update(engines)
        checker.really_there = lambda worker_id, model: self._engines[worker_id].really_there(model)
        self._begin_s = WARM_S + max((speed.load_s for speed in plan.speeds.values()), default=0.0)
        self._leads = plan.leader
        self._unanswered = 0
        self._waiting = 0
        self._submitted = 0

    # ------------------------------------------------------------ what the leader's shell uses

    def order(self, peer_id: str, order: Order) -> None:
        self._peers[peer_id].send(order)

    def quiet(self, worker_id: str) -> str:
        peer = self._peers[worker_id.rpartition("-")[0]]
        return peer.peer_id if peer.quiet and peer.connected else ""

    def leader_is_up(self) -> None:
        for peer in self._peers.values():
            peer.leader_is_up()
        for peer_id, status in self._world.opinions.items():
            self._world.rumour(peer_id, status, 0.5)

    # ------------------------------------------------------------ the run

    def run(self) -> Rehearsed:
        began = time.perf_counter()
        heap, plan = self.heap, self._plan
        self._leader.start()
        for peer in self._peers.values():
            peer.start()
        heap.at(START_S + 5.0, self._place)
        for n, stream in enumerate(plan.load):
            self._arrivals(n, stream)
        for event in self._events:
            heap.at(self._at(event.at_s), self._power_loss, event)
        self._until(self._begin_s)
        busy = sum(engine.worked_s() for engine in self._engines.values())
        self._until(self._at(plan.until_s))
        busy = sum(engine.worked_s() for engine in self._engines.values()) - busy
        give_up = heap.now + AFTER_S_MAX
        while heap.now < give_up and self._unsettled() and heap.step():
            pass
        return Rehearsed(
            tasks=tuple(sorted(self._tasks(), key=lambda task: (task.created_at, task.task_id))),
            events=tuple(self._stored("event/", ClusterEvent)),
            start_wall=WALL_BASE_S + self._begin_s,
            busy_s=busy,
            device_s=len(self._engines) * (plan.until_s - plan.from_s),
            unanswered=self._unanswered,
            virtual_s=heap.now,
            real_s=time.perf_counter() - began,
        )

    def _until(self, when: float) -> None:
        """Step to that moment; a mark of our own is the last event before it."""
        passed: list[bool] = []
        self.heap.at(when, passed.append, True)
        while not passed and self.heap.step():
            pass

    def _at(self, of_day_s: float) -> float:
        """Virtual time of a time of day."""
        return self._begin_s + of_day_s - self._plan.from_s

    def _unsettled(self) -> bool:
        return (
            self._waiting > 0 or not self._leader.up or self._leader.busy or bool(self._leader.snapshot.tasks)
        )

    def _tasks(self) -> list[Task]:
        return [
            task for task in self._stored("task/", Task) if task.created_at >= WALL_BASE_S + self._begin_s
        ]

    def _stored(self, prefix: str, kind: Any) -> list[Any]:
        keys = self._store.keys(prefix, prefix_end(prefix))
        return [decode(kind, value) for key in keys if (value := self._store.value(key)) is not None]

    # ------------------------------------------------------------ owner, clients, events

    def _place(self) -> None:
        """Models side by side: each begins on the device after the last one of the model before."""
        devices = deque(self._engines)
        for placement in self._plan.placement:
            chosen = tuple(list(devices)[: placement.replicas])
            devices.rotate(-placement.replicas)
            command = asks.AssignModel(
                model_name=placement.model, worker_ids=chosen, preload=True, priority=5
            )
            self._leader.call(command, self._placed)

    def _placed(self, answer: Any, error: BitinglipError | None) -> None:
        if error is not None:
            raise ConfigError(f"the placement is refused: {error}")

    def _arrivals(self, number: int, stream: Stream) -> None:
        """The same with and without the events: only the seed and the plan decide."""
        rng = self.heap.random(f"load/{number}")
        for a, b, per_hour in pieces(stream, self._plan):
            at = a + rng.expovariate(per_hour / 3600)
            while at < b:
                self.heap.at(self._at(at), self._submit, stream)
                at += rng.expovariate(per_hour / 3600)

    def _submit(self, stream: Stream) -> None:
        self._submitted += 1
        self._waiting += 1
        key = f"rehearsed-{self._submitted}"  # a repeated request makes no second task
        command = asks.SubmitTask(
            task_type="text_generation",
            model_name=stream.model,
            parameters={"prompt": "", "max_tokens": stream.tokens},
            priority=stream.priority,
            timeout_s=stream.timeout_s,
            owner="rehearsal",
            key_id="rehearsal",
            idempotency_key=key,
            body_digest=key,
        )
        self._ask(command, 0)

    def _ask(self, command: asks.SubmitTask, tries: int) -> None:
        self._leader.call(command, lambda answer, error: self._answered(command, tries, answer, error))

    def _answered(
        self, command: asks.SubmitTask, tries: int, answer: Any, error: BitinglipError | None
    ) -> None:
        if isinstance(error, Unavailable) and tries < _REPEATS_MAX:
            self.heap.after(_REPEAT_S, self._ask, command, tries + 1)
            return
        self._waiting -= 1
        self._unanswered += error is not None

    def _power_loss(self, event: Event) -> None:
        down_s = event.for_s or FOR_GOOD_S
        for peer_id in event.hosts:
            peer = self._peers[peer_id]
            usual, peer.rng = peer.rng, _NoGoodbye(0)
            peer.crash(down_s)
            peer.rng = usual
        if self._leads in event.hosts:
            standing = [peer_id for peer_id, peer in self._peers.items() if peer.up]
            if standing:
                self._leads = standing[0]
                self._leader.crash(self._plan.failover_s)
            else:
                self._leader.crash(down_s + self._plan.failover_s)


def _policy() -> Policy:
    """The defaults; nothing is forgotten before it is counted."""
    from peer.config import Config

    config = Config()
    return Policy(
        queue_tasks_max=config.limits.queue_tasks_max,
        queue_bytes_max=256 << 20,
        priority_step_s=600.0,
        retention_age_s=FOR_GOOD_S,
        retention_count=10_000_000,
        retention_bytes=1 << 50,
        events_kept=_EVENTS_KEPT,
        memory_reserve_bytes=config.engine.memory_reserve_bytes,
    )
