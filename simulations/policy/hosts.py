"""Peers, workers and engines as the leader meets them: a model of `peer.executor`, `peer.hosted`, `peer.replicas`.

What the product promises is kept: a peer's reports come in the order in which they arose, a worker's state is made
when its turn comes, an outcome is repeated until it is forgotten, orders of an older epoch are refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from peer import limits
from peer.state.order import (
    ForgetAttempt,
    LoadReplica,
    Order,
    Report,
    RestartEngine,
    RunAttempt,
    StopAttempt,
    UnloadReplica,
    WorkerReported,
)
from peer.state.snapshot import Linked, Rumoured
from peer.state.worker import EngineState, HostInfo
from simulations.policy.engines import Device, SimWorker
from simulations.policy.faults import FaultPlan
from simulations.policy.heap import WALL_BASE_S, Heap
from simulations.policy.sometimes import Sometimes

COALESCE_S = 0.05
_STILL_BEATS = 3
OUTCOME_AGAIN_S = 3.0
_LINK_S = (0.0005, 0.01)
_HOST = HostInfo(cpu="simulated", ram_total_bytes=64 << 30, ram_used_bytes=8 << 30, os="none")


class TakesReports(Protocol):
    up: bool
    life: int

    def take_evidence(self, life: int, evidence: Linked | Rumoured) -> None: ...

    @property
    def behind(self) -> bool: ...
    def knows(self, worker_ids: Iterable[str]) -> bool: ...
    def take_report(self, life: int, report: Report) -> None: ...


@dataclass(slots=True)
class World:
    """What every simulated part shares."""

    heap: Heap
    faults: FaultPlan
    sometimes: Sometimes
    leader: TakesReports
    sessions: bool = True  # False: one node, whose parts need no session and hear no gossip
    opinions: dict[str, str] = field(default_factory=dict)  # gossip's, of each peer

    def rumour(self, peer_id: str, status: Any, after_s: float) -> None:
        self.heap.after(after_s, self._rumour, peer_id, status)

    def _rumour(self, peer_id: str, status: Any) -> None:
        self.opinions[peer_id] = status
        if self.sessions and self.leader.up:
            self.leader.take_evidence(self.leader.life, Rumoured(peer_id, status, 0.0))


class SimPeer:
    """One host. `up` is False while it is down; while frozen it does nothing, and everything later."""

    def __init__(self, world: World, peer_id: str, devices: list[Device]) -> None:
        self.peer_id = peer_id
        self.world = world
        self.rng = world.heap.random(f"peer/{peer_id}")
        self.up = False
        self.frozen = False
        self.life = 0
        self.skew_s = self.rng.uniform(-2.0, 2.0)  # of this host's wall clock
        self._epoch = 0
        self._orders: list[Order] = []  # that came while it was frozen
        self._outbox: deque[Report | SimWorker] = deque()
        self._in_line: dict[str, None] = {}
        self._touched: dict[str, None] = {}
        self._pumping = False
        self.quiet = False  # its heartbeats say nothing new: they are implied, not simulated
        self._still_beats = 0
        self._session = 0  # the leadership that it has a session with
        self._reports_until = 0.0  # no report arrives before the one sent before it
        self._orders_until = 0.0
        self.workers = {
            f"{peer_id}-gpu{i}": SimWorker(self, f"{peer_id}-gpu{i}", device)
            for i, device in enumerate(devices)
        }

    # ------------------------------------------------------------ life

    def start(self) -> None:
        self.up, self.frozen = True, False
        self.life += 1
        for worker in self.workers.values():
            worker.start()
        self._heartbeat(self.life)
        self._connect_soon()
        self.world.rumour(self.peer_id, "alive", self.rng.uniform(1.0, 2.0))

    def crash(self, down_s: float) -> None:
        """With all its engines, what they held and what was still to be reported."""
        if not self.up:
            return
        self.up = self.quiet = False
        self.life += 1
        power = self.rng.random() < 0.3  # nobody says goodbye
        self.world.heap.after(limits.LINK_SILENT_S if power else 0.05, self._session_ends, self._session)
        self._session = 0
        if down_s > 7.0:
            self.world.rumour(self.peer_id, "failed", self.rng.uniform(6.5, 7.0))
        self._orders, self._touched, self._in_line = [], {}, {}
        self._outbox.clear()
        self._pumping = False
        for worker in self.workers.values():
            worker.vanish()
        self.world.heap.after(down_s, self.start)

    def freeze(self, for_s: float) -> None:
        if self.up and not self.frozen:
            self.wake()
            self.frozen = True
            self.world.heap.after(for_s, self._thaw, self.life)
            if for_s > limits.LINK_SILENT_S:
                self.world.heap.after(limits.LINK_SILENT_S, self._drop, self.life)
            if for_s > 10.0:
                self.world.rumour(self.peer_id, "failed", self.rng.uniform(7.0, 10.0))
                self.world.rumour(self.peer_id, "alive", for_s + self.rng.uniform(1.0, 2.0))

    def _thaw(self, life: int) -> None:
        if life != self.life:
            return
        self.frozen = False
        for worker in self.workers.values():
            worker.thaw()
        orders, self._orders = self._orders, []
        for order in orders:
            self._obey(order)
        self._connect_soon()
        self._pump()

    # ------------------------------------------------------------ the session with the leader

    @property
    def connected(self) -> bool:
        return not self.world.sessions or self._session == self.world.leader.life

    def drop_session(self, for_s: float) -> None:
        if self.up:
            self._drop(self.life)
            self.world.heap.after(for_s, self._connect, self.life)

    def _drop(self, life: int) -> None:
        if life == self.life:
            self.wake()
            session, self._session = self._session, 0
            self._session_ends(session)

    def _session_ends(self, session: int) -> None:
        """The leader's side notices, if it is still the leader that it was with, and has no newer one."""
        if self.world.sessions and session and not self._session:
            self.world.leader.take_evidence(session, Linked(self.peer_id, False, 0.0))

    def _connect_soon(self) -> None:
        self.world.heap.after(self.rng.uniform(0.02, 0.5), self._connect, self.life)

    def _connect(self, life: int) -> None:
        leader = self.world.leader
        if life != self.life or self.frozen or not leader.up or self._session == leader.life:
            return
        self._session = leader.life
        if self.world.sessions:
            leader.take_evidence(leader.life, Linked(self.peer_id, True, 0.0))
        self._pump_soon()

    def wall(self) -> float:
        return WALL_BASE_S + self.world.heap.now + self.skew_s

    # ------------------------------------------------------------ quiet times

    def wake(self) -> None:
        """Something happens here: heartbeats are sent again, one by one."""
        self._still_beats = 0
        if self.quiet:
            self.quiet = False
            self.world.heap.after(self.rng.uniform(0.0, limits.REPORT_INTERVAL_S), self._heartbeat, self.life)

    def _falls_quiet(self) -> bool:
        """After three heartbeats without news, all of which have arrived, none is simulated until there is some."""
        if (
            self._outbox
            or self._touched
            or not self.connected
            or self.world.heap.now < self._reports_until
            or any(w.outcomes or w.state is not EngineState.READY for w in self.workers.values())
        ):
            self._still_beats = 0
        self._still_beats += 1
        self.quiet = self._still_beats > _STILL_BEATS and self.world.leader.knows(self.workers)
        return self.quiet

    # ------------------------------------------------------------ orders

    def send(self, order: Order) -> None:
        """By the leader's link: in order, or lost when the peer cannot be reached."""
        world = self.world
        if not self.up or not self.connected:
            return
        self.wake()
        if world.faults.strikes("order_lost", self.rng):
            world.sometimes.fault("order_lost")
            return
        delay = self.rng.uniform(*_LINK_S)
        if world.faults.strikes("order_late", self.rng):
            world.sometimes.fault("order_late")
            delay += self.rng.expovariate(1.0)
        self._orders_until = max(self._orders_until, world.heap.now + delay)
        world.heap.at(self._orders_until, self._arrived, self.life, order)

    def _arrived(self, life: int, order: Order) -> None:
        if life != self.life:
            return
        if self.frozen:
            self._orders.append(order)
        else:
            self._obey(order)

    def _obey(self, order: Order) -> None:
        if order.epoch < self._epoch:
            return
        self._epoch = order.epoch
        self.wake()
        worker = self.workers[order.worker_id]
        match order:
            case RunAttempt():
                worker.start_attempt(order)
            case StopAttempt():
                worker.stop_attempt(f"{order.task_id}/{order.attempt}")
            case ForgetAttempt():
                worker.forget_attempt(f"{order.task_id}/{order.attempt}")
            case LoadReplica():
                worker.load(order.model)
            case UnloadReplica():
                worker.unload(order.model_name)
            case RestartEngine():
                worker.restart()

    # ------------------------------------------------------------ reports

    def report(self, report: Report) -> None:
        self.wake()
        self._outbox.append(report)
        self._pump_soon()

    def report_state(self, worker: SimWorker) -> None:
        """Its state as it is when its turn comes; a heartbeat, or news that `wake` was told of."""
        if worker.worker_id not in self._in_line:
            self._in_line[worker.worker_id] = None
            self._outbox.append(worker)
            self._pump_soon()

    def touch(self, worker: SimWorker) -> None:
        self.wake()
        if not self._touched:
            self.world.heap.after(COALESCE_S, self._report_touched, self.life)
        self._touched[worker.worker_id] = None

    def _report_touched(self, life: int) -> None:
        if life != self.life:
            return
        touched, self._touched = self._touched, {}
        for worker_id in sorted(touched):
            self.report_state(self.workers[worker_id])

    def _heartbeat(self, life: int) -> None:
        if life != self.life or self.quiet or (not self.frozen and self._falls_quiet()):
            return
        if not self.frozen:
            is_behind = bool(self._outbox)
            for worker in self.workers.values():
                worker.measure()
                if not is_behind:
                    worker.report_outcomes_again(OUTCOME_AGAIN_S)
                self.report_state(worker)
        self.world.heap.after(limits.REPORT_INTERVAL_S, self._heartbeat, life)

    def leader_is_up(self) -> None:
        if self.up:
            self.wake()
            self._connect_soon()
        self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._pumping and self._outbox:
            self._pumping = True
            self.world.heap.after(0.0, self._pump_now, self.life)

    def _pump_now(self, life: int) -> None:
        if life == self.life:
            self._pumping = False
            self._pump()

    def _pump(self) -> None:
        if not self.up or self.frozen:
            return
        while self._outbox:
            if not self.world.leader.up or not self.connected:
                return  # it waits for the next leader
            if self.world.leader.behind:
                self._pumping = True
                self.world.heap.after(0.05, self._pump_now, self.life)
                return
            item = self._outbox.popleft()
            if isinstance(item, SimWorker):
                self._in_line.pop(item.worker_id, None)
                item = WorkerReported(report=item.report(_HOST))
            self._send(item)

    def _send(self, report: Report) -> None:
        world, rng = self.world, self.rng
        if world.faults.strikes("report_lost", rng):
            world.sometimes.fault("report_lost")
            return
        delay = rng.uniform(*_LINK_S)
        if world.faults.strikes("report_late", rng):
            world.sometimes.fault("report_late")
            delay += rng.expovariate(0.7)
        self._reports_until = max(self._reports_until, world.heap.now + delay)
        world.heap.at(self._reports_until, world.leader.take_report, world.leader.life, report)
        if world.faults.strikes("report_duplicated", rng):
            world.sometimes.fault("report_duplicated")
            later = 0.0 if isinstance(report, WorkerReported) else rng.expovariate(0.3)
            world.heap.at(self._reports_until + later, world.leader.take_report, world.leader.life, report)
