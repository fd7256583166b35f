"""One run: a cluster drawn from a seed, a time of faults, and a time without them in which all must settle."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from dataclasses import replace as changed

from peer.decide.rebalance import plan_moves
from peer.state import command as asks
from peer.state.model import Model, ReplicaState
from peer.state.order import LoadReplica, Order, UnloadReplica
from peer.state.plan import Move
from peer.state.snapshot import Policy
from peer.state.worker import EngineState
from simulations.errors import InvariantViolated, SimulatorError
from simulations.policy import faults
from simulations.policy.engines import Device, SimWorker
from simulations.policy.heap import Heap
from simulations.policy.hosts import SimPeer, World
from simulations.policy.invariants import Checker
from simulations.policy.leavings import still_there
from simulations.policy.shell import Decisions, SimLeader
from simulations.policy.sometimes import Sometimes
from simulations.policy.store import SimStore
from simulations.policy.workload import Clients, Load, Operators, Owners

_WHOLE_S = 20.0  # how often everything is compared
_TIMELY_S = 1.0
_SETTLE_S_MAX = (
    2_400.0  # tasks time out in 300 s, quarantine ends in 600 s, a stuck move is given up in 600 s
)
_QUIET_S = 30.0  # nothing is loaded or unloaded for so long: it has settled
_PLANS_MAX = 5  # until one has nothing to move
_AUTOMATIC = ("", "load_balanced", "load_balanced", "memory_optimized")
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a run is; whatever else there is, the seed draws."""

    hosts: int = 4
    fault_s: float = 240.0


@dataclass(slots=True)
class Outcome:
    """What a run came to. `failure` is the product's, None if all held."""

    seed: int
    shape: Shape
    failure: InvariantViolated | None = None
    virtual_s: float = 0.0
    real_s: float = 0.0
    events: int = 0
    tasks: int = 0
    trace_hash: str = ""
    checks: Counter[str] = field(default_factory=Counter)
    sometimes: Counter[str] = field(default_factory=Counter)


def run(seed: int, shape: Shape, decisions: Decisions | None = None) -> Outcome:
    """Raises SimulatorError for the simulator's own faults; the product's are in the outcome."""
    began = time.perf_counter()
    outcome = Outcome(seed, shape)
    cluster = SimCluster(seed, shape, decisions or Decisions())
    try:
        cluster.run()
    except InvariantViolated as violated:
        outcome.failure = violated
    except Exception as error:
        raise SimulatorError(
            f"seed {seed} at {cluster.heap.now:.3f} s: {type(error).__name__}: {error}"
        ) from error
    outcome.real_s = time.perf_counter() - began
    outcome.virtual_s = cluster.heap.now
    outcome.events = cluster.heap.events
    outcome.tasks = cluster.clients.submitted
    outcome.trace_hash = cluster.heap.trace_hash
    outcome.checks = cluster.checker.counts
    outcome.sometimes = cluster.sometimes.counts
    return outcome


class SimCluster:
    def __init__(self, seed: int, shape: Shape, decisions: Decisions) -> None:
        self.heap = Heap(seed)
        self.sometimes = Sometimes()
        self.checker = Checker(self.heap, self.sometimes)
        self._shape = shape
        self._rng = self.heap.random("cluster")
        self._inject_rng = self.heap.random("injector")
        self._operators_rng = self.heap.random("what operators want")  # its own: all else stays as it was
        self.faults = faults.draw(self.heap.random("faults"), shape.hosts)
        self.models = _models(self._rng, self.faults.knows("memory_surprise"))
        self.store = SimStore(self.checker.stored)
        self.leader = SimLeader(
            self.heap,
            self.store,
            self.checker,
            self.faults,
            self.sometimes,
            decisions,
            changed(_policy(self._rng), auto_rebalance=self._operators_rng.choice(_AUTOMATIC)),
            {model.name: model for model in self.models},
        )
        self.leader.peers = self
        self.world = world = World(self.heap, self.faults, self.sometimes, self.leader)
        world.sessions = self._rng.random() < 0.75
        self.peers = {f"host-{i}": SimPeer(world, f"host-{i}", self._devices()) for i in range(shape.hosts)}
        self._workers = {w: worker for peer in self.peers.values() for w, worker in peer.workers.items()}
        self._peer_of = {w: peer for peer in self.peers.values() for w in peer.workers}
        self.checker.really_there = self._really_there
        devices = [worker.device for peer in self.peers.values() for worker in peer.workers.values()]
        if len({device.memory_bytes for device in devices}) > 1:
            self.sometimes.saw("device sizes differ")
        load = _load(self._rng, len(devices), len(self.models))
        self.clients = Clients(self.heap, self.leader, self.checker, self.sometimes, self.models, load)
        per_hour = self._rng.choice((12.0, 120.0, 600.0))
        self.owners = Owners(self.heap, self.leader, self.checker, self.sometimes, self.models, per_hour)
        per_hour = self._operators_rng.choice((0.0, 30.0, 120.0))
        self.operators = Operators(self.heap, self.leader, self.checker, list(self.peers), per_hour)
        self._placed_at = 0.0

    def _devices(self) -> list[Device]:
        rng = self._rng
        devices = []
        for _ in range(rng.choice((1, 1, 2) if self._shape.hosts > 8 else (1, 2, 3))):
            size = rng.choice((8, 16, 24))
            factor = 1.0
            if self.faults.knows("memory_surprise"):
                factor = {8: 1.3, 16: 0.8, 24: 1.15}[size]
            devices.append(Device(f"card-{size}", size * _GIB, rng.choice((0.5, 1.0, 2.0)), 8, factor))
        return devices

    # ------------------------------------------------------------ what the leader's shell uses

    def order(self, peer_id: str, order: Order) -> None:
        if isinstance(order, LoadReplica | UnloadReplica):
            self._placed_at = self.heap.now
        self.peers[peer_id].send(order)

    def quiet(self, worker_id: str) -> str:
        """The peer of a worker whose heartbeats are implied; "" if they are not."""
        peer = self._peer_of[worker_id]
        return peer.peer_id if peer.quiet and peer.connected else ""

    def _really_there(self, worker_id: str, model_name: str) -> object | None:
        return self._workers[worker_id].really_there(model_name)

    def leader_is_up(self) -> None:
        for peer in self.peers.values():
            peer.leader_is_up()
        for peer_id, status in self.world.opinions.items():
            self.world.rumour(peer_id, status, 0.5)

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        heap = self.heap
        self.leader.start()
        for peer in self.peers.values():
            peer.start()
        self.clients.start()
        self.owners.start()
        self.operators.start()
        self._inject()
        heap.after(_TIMELY_S, self._timely)
        heap.after(_WHOLE_S, self._whole)
        while heap.now < self._shape.fault_s and heap.step():
            pass
        self.clients.over = self.owners.over = self.operators.over = self.faults.over = True
        for name in sorted(self.faults.rates):
            if name == "foreign_memory":
                self._foreign_memory_ends()
        self._settle()
        self._stays()
        self.checker.whole(self.leader.snapshot, self.store)

    def _settle(self) -> None:
        heap = self.heap
        calm_since = heap.now
        while heap.now - calm_since < _SETTLE_S_MAX and heap.step():
            if heap.events % 64 == 0 and next(self._unsettled(), None) is None:
                break
        left = list(still_there(self.leader.snapshot, self.leader.wall()))
        self.checker.check("a drained host ends empty", not left, "; ".join(left[:5]))
        if self.leader.snapshot.leaving:
            self.sometimes.saw("drained host ended empty")
        why = list(self._unsettled())
        self.checker.check("all settles when the faults are over", not why, "; ".join(why[:5]))

    def _stays(self) -> None:
        """Plan after plan, a placement comes to rest."""
        strategy = self.leader.snapshot.policy.auto_rebalance
        if strategy != "memory_optimized":  # an idle cluster costs nothing by the others
            return
        moves: tuple[Move, ...] = ()
        for _ in range(_PLANS_MAX):
            moves, _why = plan_moves(self.leader.snapshot, self.leader.wall(), strategy, force=False)
            if not moves:
                break
            wish = asks.Rebalance(strategy=strategy, force=False, dry_run=False)
            self._placed_at = self.heap.now
            self.leader.call(wish, lambda answer, error: None)
            self._settle()
        self.checker.check("a placement comes to rest", not moves, f"still to move: {moves[:2]}")

    def _unsettled(self) -> Iterator[str]:
        """What is not as it must be some time after the last fault."""
        if not self.leader.up:
            yield "nobody leads"
            return
        if self.leader.busy:
            yield "a commit is in flight"
        if self.clients.unanswered:
            yield f"{self.clients.unanswered} submissions are unanswered"
        snapshot = self.leader.snapshot
        yield from (f"{task.task_id} is {task.status.value}" for task in snapshot.tasks.values())
        yield from (f"{w}/{m} drains" for w, m in snapshot.draining if m in snapshot.replicas.get(w, {}))
        yield from (f"{w}/{m} is foreseen" for w, m in snapshot.foreseen)
        yield from (f"{w} is paused" for w in snapshot.paused)
        yield from (f"rebalance {rebalance_id} runs" for rebalance_id in snapshot.under_way)
        yield from (f"{peer_id} is lost" for peer_id in snapshot.lost)
        yield from still_there(snapshot, self.leader.wall())
        if self.heap.now - self._placed_at < _QUIET_S:
            yield f"models still move: {self.heap.now - self._placed_at:.1f} s ago"
        for peer in self.peers.values():
            for worker in peer.workers.values():
                if worker.state is not EngineState.READY:
                    yield f"{worker.worker_id} is {worker.state.value}"
                if worker.attempts or worker.outcomes:
                    yield f"{worker.worker_id} still has {[*worker.attempts, *worker.outcomes][:2]}"
        for worker_id, of in snapshot.replicas.items():
            for name, replica in of.items():
                if replica.state not in (ReplicaState.READY, ReplicaState.FAILED):
                    yield f"{name} is {replica.state.value} on {worker_id}"

    # ------------------------------------------------------------ periodic checks

    def _timely(self) -> None:
        if self.leader.up and not self.leader.stalled(_TIMELY_S):
            stalled_s = 10.0 if self.faults.knows("slow_store") else 2.0
            self.checker.timely(self.leader.snapshot, self.leader.wall(), stalled_s)
        self.heap.after(_TIMELY_S, self._timely)

    def _whole(self) -> None:
        if self.leader.up and not self.leader.busy:
            self.checker.whole(self.leader.snapshot, self.store)
        self.heap.after(_WHOLE_S, self._whole)

    # ------------------------------------------------------------ faults

    def _inject(self) -> None:
        strike: dict[str, Callable[[random.Random], None]] = {
            "engine_death": lambda rng: self._worker(rng).die("a simulated death"),
            "engine_hang": lambda rng: self._worker(rng).hang(),
            "foreign_memory": self._foreign_memory,
            "peer_crash": lambda rng: self._peer(rng).crash(rng.choice((0.5, 5.0, 30.0))),
            "peer_freeze": lambda rng: self._peer(rng).freeze(rng.choice((1.0, 8.0, 40.0))),
            "leader_crash": lambda rng: self.leader.crash(rng.uniform(0.2, 10.0)),
            "slow_store": self._slow_store,
            "burst": lambda rng: self.clients.burst(rng.randrange(20, 400)),
            "worker_flap": self._flap,
            "session_drop": lambda rng: self._peer(rng).drop_session(rng.choice((0.3, 2.0, 15.0))),
            "sessions_drop": self._sessions_drop,
            "wrong_gossip": self._wrong_gossip,
            "leader_stall": lambda rng: self.leader.stall(rng.choice((1.0, 4.0, 15.0))),
        }
        for name, per_hour in self.faults.rates.items():
            self._next_fault(name, per_hour / 3600, strike[name])
        if self.faults.knows("memory_surprise"):
            self.sometimes.fault("memory_surprise")

    def _next_fault(self, name: str, per_s: float, strike: Callable[[random.Random], None]) -> None:
        def occur() -> None:
            if self.faults.over:
                return
            self.sometimes.fault(name)
            self.heap.trace(name)
            strike(self._inject_rng)
            self._next_fault(name, per_s, strike)

        self.heap.after(self._inject_rng.expovariate(per_s), occur)

    def _peer(self, rng: random.Random) -> SimPeer:
        return self.peers[f"host-{rng.randrange(len(self.peers))}"]

    def _worker(self, rng: random.Random) -> SimWorker:
        return rng.choice(list(self._peer(rng).workers.values()))

    def _flap(self, rng: random.Random) -> None:
        worker = self._worker(rng)
        worker.flapping_until = self.heap.now + rng.uniform(10.0, 120.0)
        worker.die("it begins to flap")

    def _sessions_drop(self, rng: random.Random) -> None:
        """Many at once, as when the leader's own network is at fault."""
        for_s = rng.choice((0.5, 5.0, 20.0, 60.0))
        for peer in self.peers.values():
            if rng.random() < 0.8:
                peer.drop_session(for_s)

    def _wrong_gossip(self, rng: random.Random) -> None:
        peer = self._peer(rng)
        self.world.rumour(peer.peer_id, "failed" if peer.up else "alive", 0.0)
        self.world.rumour(peer.peer_id, "alive" if peer.up else "failed", rng.uniform(2.0, 30.0))

    def _slow_store(self, rng: random.Random) -> None:
        self.leader.store_s = rng.choice((0.05, 0.3, 1.5))
        self.heap.after(rng.uniform(2.0, 15.0), self._store_recovers)

    def _store_recovers(self) -> None:
        self.leader.store_s = 0.002

    def _foreign_memory(self, rng: random.Random) -> None:
        worker = self._worker(rng)
        worker.foreign_bytes = int(worker.device.memory_bytes * rng.uniform(0.1, 0.9))
        self.peers[worker.worker_id.rpartition("-")[0]].wake()

    def _foreign_memory_ends(self) -> None:
        for peer in self.peers.values():
            peer.wake()
            for worker in peer.workers.values():
                worker.foreign_bytes = 0


# ---------------------------------------------------------------- what a seed draws of a cluster


def _models(rng: random.Random, sizes_only: bool) -> list[Model]:
    models = []
    for i in range(rng.randrange(2, 7)):
        size = int(rng.choice((1, 3, 5, 7, 11, 18)) * _GIB * rng.uniform(0.7, 1.1))
        models.append(
            Model(
                name=f"model-{i}",
                source=f"file:/model-{i}",
                family="llama",
                size_bytes=size,
                memory_bytes=0 if sizes_only and rng.random() < 0.5 else int(size * 1.2),
                slots=rng.choice((1, 2, 4, 8)),
            )
        )
    return models


def _policy(rng: random.Random) -> Policy:
    return Policy(
        queue_tasks_max=rng.choice((50, 300, 100_000)),
        queue_bytes_max=rng.choice((20_000, 256 << 20)),
        priority_step_s=600.0,
        retention_age_s=rng.choice((30.0, 3600.0)),
        retention_count=rng.choice((20, 200, 10_000)),
        events_kept=rng.choice((50, 10_000)),
        memory_reserve_bytes=512 << 20,
    )


def _load(rng: random.Random, devices: int, models: int) -> Load:
    run_s = rng.choice((0.3, 2.0, 8.0))
    share = rng.choice((0.1, 0.4, 0.8, 1.3))
    return Load(
        tasks_per_s=min(20.0, share * devices * 2.0 / run_s),
        weights=tuple(1.0 / (i + 1) ** rng.choice((0.0, 1.0, 2.0)) for i in range(models)),
        run_s=run_s,
        cancels=rng.choice((0.0, 0.05, 0.3)),
        with_key=rng.choice((0.0, 0.3, 0.9)),
        short_timeout=rng.choice((0.0, 0.1, 0.5)),
    )
