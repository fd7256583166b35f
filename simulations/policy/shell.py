"""The leader's shell under virtual time: what `peer.leader` does around the decisions, with the same `Batch`.

The order of decisions is that of `peer.leader.Leader`; a test compares the two. Loading is `peer.establish`'s own code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, NoReturn, Protocol

from peer import limits
from peer.decide import admit, lose, meter, place, record, recover, replan, retain, schedule, space
from peer.decide import rebalance as moves
from peer.decide.batch import Batch
from peer.decide.decision import Decision
from peer.errors import BitinglipError, Unavailable
from peer.establish import load_snapshot
from peer.state import command as asks
from peer.state.order import Order, Report, WorkerReported
from peer.state.record import decode, ended_at, idempotency_key, prefix_end, task_id
from peer.state.snapshot import Linked, Policy, Rumoured, Snapshot, StoreWrites
from peer.state.task import Idempotency, Task, TaskResult
from simulations.errors import InvariantViolated
from simulations.policy.faults import FaultPlan
from simulations.policy.heap import WALL_BASE_S, Heap
from simulations.policy.inbox import Answered, Item, Pending, size_of
from simulations.policy.invariants import Checker
from simulations.policy.sometimes import Sometimes
from simulations.policy.store import SimStore, StandingClock, run_now

_ENTROPY_BYTES = 5
_FORGET_ROUNDS_MAX = 8
_IMPLIED_S = 3.0  # with the ticks' own delays well below WORKER_SILENT_S


class Peers(Protocol):
    def order(self, peer_id: str, order: Order) -> None: ...
    def leader_is_up(self) -> None: ...
    def quiet(self, worker_id: str) -> str: ...


@dataclass(slots=True)
class Decisions:
    """Every decision that the shell asks for. The bug bank replaces one of them."""

    first_of: Callable[..., str | None] = admit.first_of
    submit: Callable[..., Decision] = admit.submit
    cancel: Callable[..., Decision] = admit.cancel
    assign: Callable[..., Decision] = place.assign
    unload: Callable[..., Decision] = place.unload
    restart: Callable[..., Decision] = place.restart
    rebalance: Callable[..., Decision] = moves.rebalance
    report: Callable[..., Decision] = record.report
    wake: Callable[..., Decision] = lose.wake
    lose: Callable[..., Decision] = lose.lose
    still_so: Callable[..., Decision] = record.still_so
    time_out: Callable[..., Decision] = recover.time_out
    lost_attempts: Callable[..., Decision] = recover.lost_attempts
    hopeless: Callable[..., Decision] = recover.hopeless
    reconcile: Callable[..., Decision] = place.reconcile
    advance: Callable[..., Decision] = moves.advance
    announce: Callable[..., Decision] = recover.announce
    forget_plans: Callable[..., Decision] = retain.forget_plans
    tell_room: Callable[..., Decision] = space.tell_room
    sample_gauges: Callable[..., Decision] = meter.sample_gauges
    roll_up: Callable[..., Decision] = meter.roll_up
    drain_host: Callable[..., Decision] = replan.drain_host
    replan: Callable[..., Decision] = replan.replan
    forget_revoked: Callable[..., Decision] = retain.forget_revoked
    schedule: Callable[..., Decision] = schedule.schedule
    forget_events: Callable[..., Decision] = retain.forget_events
    forget_tasks: Callable[..., Decision] = retain.forget_tasks
    loaded: Callable[[Snapshot], None] = lambda snapshot: None
    acknowledge_early: bool = False


# The tick's decisions in order, with whether each takes the time; those of the meter come once a second.
TICK = (
    ("wake", True), ("lose", True), ("time_out", True), ("lost_attempts", True), ("hopeless", True),
    ("reconcile", True), ("advance", True), ("announce", True), ("forget_plans", False),
    ("tell_room", False),
)  # fmt: skip
TICK_EACH_SECOND = (("sample_gauges", True), ("roll_up", True))


class SimLeader:
    """One leadership after another over one store."""

    peers: Peers

    def __init__(
        self,
        heap: Heap,
        store: SimStore,
        checker: Checker,
        faults: FaultPlan,
        sometimes: Sometimes,
        decisions: Decisions,
        policy: Policy,
        catalogue: dict[str, Any],
    ) -> None:
        self.snapshot: Snapshot
        self.up = False
        self.store = store
        self.store_s = 0.002  # a commit's typical time
        self.life = 0
        self._heap = heap
        self._checker = checker
        self._faults = faults
        self._sometimes = sometimes
        self._decide = decisions
        self._policy = policy
        self._catalogue = catalogue
        self._rng = heap.random("store")
        self._entropy = heap.random("entropy")
        self._inbox: deque[Item] = deque()
        self._stalled_until = 0.0
        self._heard_quiet_at = 0.0
        self._deciding: list[Pending] = []
        self._in_flight: StoreWrites = {}
        self.busy = False
        self._tick_due = False
        self._sampled_at = 0
        self._offset_s = 0.0

    # ------------------------------------------------------------ leadership

    def wall(self) -> float:
        """Anchored when this leadership's process began; it never jumps while that runs."""
        return WALL_BASE_S + self._heap.now + self._offset_s

    def start(self) -> None:
        """Take the leadership and load what the store holds, by the product's own rules."""
        if self._faults.strikes("clock_step", self._rng):
            self._sometimes.fault("clock_step")
            self._offset_s = self._rng.uniform(-5.0, 5.0)
        self.life += 1
        epoch = self.store.next_epoch()
        self.snapshot = run_now(
            load_snapshot(
                self.store,  # type: ignore[arg-type]
                epoch,
                peer_id="host-0",
                cluster_id="simulated",
                policy=self._policy,
                catalogue=self._catalogue,
                clock=StandingClock(self.wall()),
            )
        )
        self._decide.loaded(self.snapshot)
        self.up, self.busy, self._tick_due = True, False, False
        self._checker.leader_started(self.snapshot, self.store)
        self._tick(self.life)
        self.peers.leader_is_up()

    def crash(self, down_s: float) -> None:
        """Whatever is in memory is gone, and so is what a commit in flight has not written."""
        if not self.up:
            return
        self.up = False
        self.life += 1
        if self._in_flight and self._rng.random() < 0.5:  # it had reached the disk, unknown to anybody
            self._write()
        self._in_flight = {}
        lost = [*self._deciding, *(item for item in self._inbox if isinstance(item, Pending))]
        self._deciding, self._inbox = [], deque()
        error = Unavailable("this peer has stopped leading", code="ambiguous", retry_after_s=1.0)
        for pending in lost:
            self._heap.after(0.001, pending.answered, None, error)
        self._heap.after(down_s, self.start)

    # ------------------------------------------------------------ what callers use

    def call(self, command: asks.Command, answered: Answered) -> None:
        """Answers come through the heap, once."""
        waiting = len(self._inbox)
        self._checker.bounded("commands waiting", waiting, limits.COMMANDS_WAITING_MAX)
        if not self.up or waiting >= limits.COMMANDS_WAITING_MAX:
            if self.up:
                self._sometimes.saw("leader behind")
            error = Unavailable("no leader", code="stopping", retry_after_s=1.0)
            self._heap.after(0.001, answered, None, error)
            return
        self._inbox.append(Pending(command, answered))
        self._pump()

    def take_report(self, life: int, report: Report) -> None:
        if self.up and life == self.life:  # else it was on its way to a leader that is no more
            self._checker.arrived(report)
            self._inbox.append(report)
            self._pump()

    def take_evidence(self, life: int, evidence: Linked | Rumoured) -> None:
        """As the leader's own wall clock has it."""
        if self.up and life == self.life:
            self._inbox.append(changed(evidence, at=self.wall()))
            self._pump()

    def stall(self, for_s: float) -> None:
        """It is given no processor for a while; the world goes on."""
        self._stalled_until = max(self._stalled_until, self._heap.now + for_s)
        self._heap.after(for_s, self._pump)

    def knows(self, worker_ids: Iterable[str]) -> bool:
        return self.up and all(worker_id in self.snapshot.reports for worker_id in worker_ids)

    def stalled(self, lately_s: float = 0.0) -> bool:
        return self._heap.now < self._stalled_until + lately_s

    @property
    def behind(self) -> bool:
        return len(self._inbox) >= limits.COMMANDS_WAITING_MAX // 2

    def read(self, wanted: str) -> asks.TaskView | None:
        """What a client sees; None while a commit is in flight or nobody leads. Raises NotFound."""
        if not self.up or self.busy or self.stalled():
            return None
        task = self.snapshot.tasks.get(wanted)
        if task is not None:
            return asks.TaskView(task=task)
        stored, result = self.store.value(f"task/{wanted}"), self.store.value(f"result/{wanted}")
        if stored is None:
            raise admit.no_task(wanted)
        return asks.TaskView(
            task=decode(Task, stored), result=decode(TaskResult, result) if result is not None else None
        )

    # ------------------------------------------------------------ batches

    def _tick(self, life: int) -> None:
        if life == self.life:
            self._tick_due = True
            self._pump()

    def _pump(self) -> None:
        while self.up and not self.busy and not self.stalled():
            if self._tick_due:
                self._tick_due = False
                self._batch([], self._after_tick)
            elif self._inbox:
                self._batch(self._gather(), None)
            else:
                return

    def _gather(self) -> list[Item]:
        batch: list[Item] = []
        nbytes = 0
        while self._inbox and len(batch) < limits.BATCH_COMMANDS_MAX and nbytes < limits.BODY_BYTES_MAX:
            item = self._inbox.popleft()
            batch.append(item)
            nbytes += size_of(item)
        return batch

    def _batch(self, batch: list[Item], then: Callable[[], None] | None) -> None:
        commands = [item for item in batch if isinstance(item, Pending)]
        self._deciding = commands
        for pending in commands:
            self._read_stored(pending)
        work = Batch(self.snapshot, self.wall())
        for item in batch:
            if isinstance(item, Pending):
                self._decide_command(item, work)
            elif isinstance(item, Linked | Rumoured):
                self._apply(work, "evidence", Decision(changes=[item]))
            else:
                self._take(work, "report", item)
                if isinstance(item, WorkerReported):
                    self._take(work, "announce", [item.report.worker_id])
        if not batch:
            self._decide_tick(work)
        self._take(work, "schedule")
        try:
            work.count_ended()
        except Exception as error:
            self._raised("count_ended", error)
        self._take(work, "forget_events", timed=False)
        self._checker.batch_decided(work, self.snapshot)
        if self._decide.acknowledge_early:
            self._answer(commands)
        self._commit(work, commands, then)

    def _hear_the_quiet(self, work: Batch) -> None:
        """The heartbeats of peers that have no news, as if the latest of each had just arrived.

        After the decisions: they must hold by what was heard before, as they do where heartbeats stand in line.
        """
        if work.now - self._heard_quiet_at < 1.0:
            return
        self._heard_quiet_at = work.now
        due = []
        for worker_id, heard_at in self.snapshot.listened.items():
            if work.now - heard_at < _IMPLIED_S:
                break
            due.append(worker_id)
        for peer_id in dict.fromkeys(filter(None, map(self.peers.quiet, due))):
            self._take(work, "still_so", peer_id)

    def _decide_tick(self, work: Batch) -> None:
        self._checker.ticked(work.now, self.snapshot)
        for name, timed in TICK:
            self._take(work, name, timed=timed)
        if int(work.now) != self._sampled_at:
            self._sampled_at = int(work.now)
            self._take(work, "replan", f"rebal-{self._token()}")
            self._take(work, "forget_revoked", timed=False)
            for name, timed in TICK_EACH_SECOND:
                self._take(work, name, timed=timed)
        self._hear_the_quiet(work)

    def _take(self, work: Batch, name: str, *args: Any, timed: bool = True) -> None:
        """Ask for a decision and apply it, under the checker's eyes."""
        try:
            if timed:
                decision = getattr(self._decide, name)(self.snapshot, work.now, *args)
            else:
                decision = getattr(self._decide, name)(self.snapshot, *args)
        except InvariantViolated:
            raise
        except Exception as error:
            self._raised(name, error)
        self._apply(work, name, decision)

    def _apply(self, work: Batch, name: str, decision: Decision) -> None:
        if not decision.changes and not decision.orders and not decision.events:
            return
        self._checker.decided(name, decision, self.snapshot, work.now)
        try:
            work.take(decision)
        except Exception as error:
            self._raised(f"applying {name}", error)

    def _raised(self, name: str, error: Exception) -> NoReturn:
        """Decisions raise `peer.errors` for commands only; anything else is the product's bug."""
        text = f"{name} raised {type(error).__name__}: {error}"
        raise InvariantViolated("a decision never raises", text, self._heap.now) from error

    # ------------------------------------------------------------ commands

    def _read_stored(self, pending: Pending) -> None:
        match pending.command:
            case asks.SubmitTask(owner=owner, idempotency_key=text) if text:
                value = self.store.value(idempotency_key(owner, text))
                pending.stored = decode(Idempotency, value) if value is not None else None
            case asks.CancelTask(task_id=wanted) if wanted not in self.snapshot.tasks:
                value = self.store.value(f"task/{wanted}")
                pending.stored = decode(Task, value) if value is not None else None

    def _decide_command(self, pending: Pending, work: Batch) -> None:
        name = type(pending.command).__name__
        try:
            decision = self._decided(pending, work)
        except BitinglipError as error:
            pending.error = error
            return
        except Exception as error:
            self._raised(name, error)
        self._apply(work, name, decision)
        pending.answer = decision.reply

    def _decided(self, pending: Pending, work: Batch) -> Decision:
        snapshot, now, decide = self.snapshot, work.now, self._decide
        match pending.command:
            case asks.SubmitTask() as command:
                stored_key = pending.stored if isinstance(pending.stored, Idempotency) else None
                first = decide.first_of(snapshot, command, stored_key)
                if first is not None:
                    live = "live" if first in snapshot.tasks else "finished"
                    self._sometimes.saw(f"idempotent replay of a {live} task")
                    return Decision(reply=first)
                return decide.submit(snapshot, now, command, task_id(now, self._token()), pending.size)
            case asks.CancelTask() as command:
                stored = pending.stored if isinstance(pending.stored, Task) else None
                if command.task_id in work.ended:
                    stored, _ = work.ended[command.task_id]
                return decide.cancel(snapshot, now, command, stored)
            case asks.AssignModel() as command:
                return decide.assign(snapshot, now, command, f"assign-{self._token()}")
            case asks.UnloadModel() as command:
                return decide.unload(snapshot, now, command)
            case asks.RestartWorker() as command:
                return decide.restart(snapshot, now, command)
            case asks.Rebalance() as command:
                return decide.rebalance(snapshot, now, command, f"rebal-{self._token()}")
            case asks.DrainHost() as command:
                return decide.drain_host(snapshot, now, command)
            case _:
                raise NotImplementedError(type(pending.command).__name__)

    def _token(self) -> str:
        return f"{self._entropy.getrandbits(8 * _ENTROPY_BYTES):0{2 * _ENTROPY_BYTES}x}"

    # ------------------------------------------------------------ commit and after

    def _commit(self, work: Batch, commands: list[Pending], then: Callable[[], None] | None) -> None:
        if not work.writes:
            self._carry_out(work, commands, then)
            return
        self.busy = True
        self._in_flight = work.writes
        took_s = self.store_s * self._rng.uniform(0.5, 2.0)
        self._heap.after(took_s, self._committed, self.life, work, commands, then)

    def _committed(
        self, life: int, work: Batch, commands: list[Pending], then: Callable[[], None] | None
    ) -> None:
        if life != self.life:
            return  # `crash` has settled what became of it
        if self.stalled():
            self._heap.at(self._stalled_until, self._committed, life, work, commands, then)
            return
        outcome = self._outcome()
        if outcome == "fails":
            self._in_flight = {}
            self.crash(self._rng.uniform(0.5, 8.0))
            return
        self._write()
        if outcome == "lost":
            self.crash(self._rng.uniform(0.5, 8.0))
            return
        self.busy = False
        self._checker.committed(work.writes, self.store, self.snapshot)
        self._carry_out(work, commands, then)
        self._pump()

    def _outcome(self) -> str:
        """ "done", "fails" (nothing was written) or "lost": written, but this leader does not live to act on it."""
        if self._faults.strikes("commit_fails", self._rng):
            self._sometimes.fault("commit_fails")
            return "fails"
        if self._faults.strikes("commit_ambiguous", self._rng):
            self._sometimes.fault("commit_ambiguous")
            was_done = self._rng.random() < 0.5
            self._sometimes.saw(f"ambiguous commit was {'' if was_done else 'not '}done")
            return "lost" if was_done else "fails"
        if self._faults.strikes("crash_after_commit", self._rng):
            self._sometimes.fault("crash_after_commit")
            return "lost"
        return "done"

    def _write(self) -> None:
        writes, self._in_flight = self._in_flight, {}
        self.store.apply(writes)
        for key in sorted(writes):
            self._heap.trace(key)
            self._heap.trace_bytes(writes[key] or b"-")

    def _carry_out(self, work: Batch, commands: list[Pending], then: Callable[[], None] | None) -> None:
        self._checker.carried_out(work)
        if not self._decide.acknowledge_early:
            self._answer(commands)
        self._deciding = []
        for peer_id, order in work.orders:
            self.peers.order(peer_id, order)
        if then is not None:
            then()

    def _answer(self, commands: list[Pending]) -> None:
        for pending in commands:
            self._heap.after(0.0005, pending.answered, pending.answer, pending.error)

    # ------------------------------------------------------------ retention

    def _after_tick(self) -> None:
        self._forget(0)

    def _forget(self, rounds: int) -> None:
        first = self.store.keys("ended/", prefix_end("ended/"), 1)
        if not retain.due(self.snapshot, self.wall(), [ended_at(key) for key in first]):
            self._heap.after(limits.TICK_S, self._tick, self.life)
            return  # the later ones are not due either
        keys = self.store.keys("ended/", prefix_end("ended/"), limits.RETENTION_BATCH)
        names = retain.due(self.snapshot, self.wall(), [ended_at(key) for key in keys])
        if not names or rounds >= _FORGET_ROUNDS_MAX:
            self._heap.after(limits.TICK_S, self._tick, self.life)
            return
        values = [self.store.value(f"task/{name}") for name in names]
        tasks = [decode(Task, value) for value in values if value is not None]
        work = Batch(self.snapshot, self.wall())
        self._sometimes.saw("retention forgot tasks")
        self._apply(work, "forget_tasks", self._decide.forget_tasks(tasks))
        again = rounds + 1 if len(names) == limits.RETENTION_BATCH else _FORGET_ROUNDS_MAX
        self._commit(work, [], lambda: self._forget(again))
