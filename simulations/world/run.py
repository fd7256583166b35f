"""One run at world level: full peers, drawn or given faults and requests, then a time without faults to settle in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import trio

from peer.state.order import LoadReplica, Order, UnloadReplica
from peer.state.task import Task
from simulations.bugs.world import switched_on
from simulations.errors import InvariantViolated
from simulations.outcome import CLUSTER, Mark, Outcome
from simulations.policy.leavings import still_there
from simulations.scenario import Scenario
from simulations.world.clients import Clients
from simulations.world.durable import Durable
from simulations.world.electorate import BOUNDS, Electorate
from simulations.world.faults import Injector
from simulations.world.fleet import Fleet
from simulations.world.host import SimHost
from simulations.world.kernel import World, run_world

_LOOK_S = 0.2  # how often what can be seen from outside is checked
_LEADER_S_MAX = 60.0  # after the faults: until one leads and all follow
_TASKS_S_MAX = 900.0  # until every task has ended: quarantines last 600 s, time-outs 60 s
_QUIET_S = 20.0  # without a load or unload: the placement has settled
_QUIET_S_MAX = 900.0
_EMPTY_S_MAX = 60.0  # until nothing of what has ended is left anywhere
_ROOM_S_MAX = 1_500.0  # the leader's member waits 600 s for the others'
_VOTERS_S_MAX = 600.0  # until the voters are as many as can be
_ON_ITS_WAY_S = 30.0  # an order, or what follows from a loss
_REPORTS_MAX = 20_000  # waiting in one executor


def run(scenario: Scenario, *, bug: str = "") -> Outcome:
    """Raises SimulatorError for the simulator's own faults; the product's are in the outcome."""
    began = time.perf_counter()
    outcome = Outcome(scenario, bug=bug)
    cluster: list[Cluster] = []

    async def main(world: World) -> None:
        cluster.append(Cluster(world, scenario))
        await cluster[0].run()

    with switched_on(bug):
        try:
            run_world(main, scenario.seed, blame_livelock=True)
        except InvariantViolated as violated:
            outcome.failure = violated
    if cluster:
        cluster[0].tell(outcome)
    outcome.real_s = time.perf_counter() - began
    return outcome


class Cluster:
    """The hosts of one world, and all that is checked of them."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world = world
        self.scenario = scenario
        self.checks: Counter[str] = Counter()
        self.sometimes: Counter[str] = Counter()
        self.fleet = Fleet(world, scenario, self._ordered, grows=BOUNDS if scenario.grows else None)
        self.electorate = Electorate(world, self.fleet)
        self.hosts, self.store = self.fleet.hosts, self.fleet.store
        self.durable = Durable(world.now, on_requeue=self._requeued)
        self.store.on_applied.append(self._applied)
        fleet = self.fleet
        self.injector = Injector(
            world, fleet.hosts, fleet.network, fleet.gossip, fleet.store, fleet.key_holder, fleet.roster
        )
        self.clients = Clients(
            world,
            fleet.cluster_of,
            scenario,
            self.durable.acknowledged,
            process_of=lambda peer_id: fleet.hosts[peer_id].incarnation,
            oldest_event=lambda: self.durable.first_event,
        )
        self._epochs_obeyed: dict[tuple[str, int], int] = {}
        self._away_at: dict[str, float] = {}  # when a peer's process was last not to be reached
        self._moved_at = 0.0  # the last load or unload
        self._leading: dict[tuple[str, int], float] = {}  # (peer, epoch): since
        self._led: list[Mark] = []
        self._ended_s = 0.0

    # ---------------------------------------------------------------- the run

    async def run(self) -> None:
        self.fleet.start(self.injector.absent_at_first(self.scenario.faults))
        self.world.spawn(self._look)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.injector.run, self.scenario.faults, self.scenario.fault_s)
            nursery.start_soon(self.clients.run)
        for name, host in self.hosts.items():
            if host.gone:
                self.clients.leave_out(name)
        await self._until("one_leader", _LEADER_S_MAX, self._not_led)
        with trio.move_on_after(_TASKS_S_MAX) as patience:
            await self.clients.finish()
        if patience.cancelled_caught:
            live = [f"{task.task_id} ({task.status}, {task.model_name})" for task in self.durable.live()[:5]]
            self.world.violated("tasks_end", f"{len(self.durable.live())} live tasks: {', '.join(live)}")
        await self._until("tasks_end", _TASKS_S_MAX, self._live_tasks)
        await self._until("placement_settles", _QUIET_S_MAX, self._moving)
        await self._until("drained_hosts_end_empty", _QUIET_S_MAX, self._undrained)
        await self._until("nothing_leaks", _EMPTY_S_MAX, self._left_over)
        if self.scenario.grows:
            await self._until("voters_settle", _VOTERS_S_MAX, self.electorate.unsettled)
            self.sometimes["voters_grown"] += 1
        await self._until("store_has_room", _ROOM_S_MAX, self._short_of_room)
        self.clients.check()
        self._ended_s = self.world.now()

    async def _until(self, check: str, limit_s: float, wrong: Callable[[], str]) -> None:
        """Poll until nothing is wrong; it is the product's fault if that takes too long."""
        give_up_at = self.world.now() + limit_s
        self.checks[check] += 1
        while why := wrong():
            if self.world.now() >= give_up_at:
                self.world.violated(check, f"{limit_s:g} s after the faults: {why}")
            await trio.sleep(0.5)

    # ---------------------------------------------------------------- after the faults

    def _not_led(self) -> str:
        leaders = self.fleet.leaders()
        if len(leaders) != 1:
            return f"leaders: {', '.join(leaders) or 'none'}"
        lost = [
            name
            for name, host in self.hosts.items()
            if name != leaders[0]
            and not host.gone
            and (host.peer is None or host.peer.follower.leader != leaders[0])
        ]
        return f"{', '.join(lost)} do not follow {leaders[0]}" if lost else ""

    def _live_tasks(self) -> str:
        live = self.durable.live()
        return f"{len(live)} tasks live, {live[0].task_id} is {live[0].status}" if live else ""

    def _moving(self) -> str:
        quiet = self.world.now() - self._moved_at
        return "" if quiet >= _QUIET_S else f"a replica was loaded or unloaded {quiet:.1f} s ago"

    def _undrained(self) -> str:
        for name in self.fleet.leaders():
            peer = self.hosts[name].peer
            leader = peer.leader if peer is not None else None
            if leader is not None:
                return next(still_there(leader._snapshot, leader._clock.wall()), "")
        return "nobody leads"

    def _left_over(self) -> str:
        for name, host in self.hosts.items():
            if host.gone:
                continue
            if host.peer is None:
                return f"{name} is not up"
            held = host.peer.executor.held()
            if held:
                return f"{name} still answers for {', '.join(held[:3])}"
            if host.peer.leader is not None and host.peer.leader.held_tasks():
                return f"the leader still counts {host.peer.leader.held_tasks()} tasks as running"
        return ""

    def _short_of_room(self) -> str:
        roster = self.fleet.roster
        return roster.rooms.short({name for name, host in self.hosts.items() if host.gone}) if roster else ""

    # ---------------------------------------------------------------- at every moment

    def _applied(self, revision: int, writes: object, epoch: int | None, peer_id: str) -> None:
        try:
            self.durable.applied(revision, writes, epoch, peer_id)  # type: ignore[arg-type]
        except InvariantViolated as violated:
            self.world.fail(violated)

    def _ordered(self, host: SimHost, order: Order, *, obeyed: bool) -> None:
        """An executor was given an order."""
        self.checks["no_older_epoch_is_obeyed"] += 1
        disk = (host.peer_id, host.disks_lost)  # a new disk remembers nothing
        known = self._epochs_obeyed.get(disk, 0)
        if obeyed and order.epoch < known:
            self.world.violated(
                "no_older_epoch_is_obeyed",
                f"{host.peer_id} obeyed a {type(order).__name__} of epoch {order.epoch} after one of {known}",
            )
        if not obeyed:
            self.sometimes["older_order_refused"] += 1
            return
        self._epochs_obeyed[disk] = max(known, order.epoch)
        if isinstance(order, LoadReplica | UnloadReplica):
            self._moved_at = self.world.now()
        if isinstance(order, LoadReplica):
            since = self.durable.leaving.get(host.peer_id, self.world.now())
            self.checks["a_drained_host_gets_no_load"] += 1
            if self.world.now() - since > _ON_ITS_WAY_S:
                self.world.violated(
                    "a_drained_host_gets_no_load",
                    f"{host.peer_id} loads {order.model.name}: it leaves since {since:.1f}",
                )

    def _requeued(self, before: Task, after: Task) -> None:
        """A peer is called dead at once only by its host: its port is closed, or something answers so for it."""
        self.checks["called_dead_with_reason"] += 1
        if not (after.requeued_because or "").endswith("its process has ended"):
            return
        self.sometimes["lost_at_once"] += 1
        peer_id = (before.worker_id or "").rpartition("-")[0]
        lately = self.world.now() - self._away_at.get(peer_id, -_ON_ITS_WAY_S) < _ON_ITS_WAY_S
        if not lately and not self._is_closed(peer_id):
            self.world.violated(
                "called_dead_with_reason", f"{peer_id} lives, and {after.task_id} is queued again"
            )

    def _is_closed(self, peer_id: str) -> bool:
        """Whether its port refuses connections."""
        host = self.hosts[peer_id]
        return host.peer is None or not host.up or self.fleet.network.rejects(peer_id)

    async def _look(self) -> None:
        """What nobody inside can see: whether two peers are sure to lead, and how long the lines are."""
        while True:
            sure = []
            leading: dict[tuple[str, int], float] = {}
            for name, host in self.hosts.items():
                peer = host.peer
                if self._is_closed(name):
                    self._away_at[name] = self.world.now()
                if peer is None or not host.up:
                    continue
                self._check_bounds(name, host)
                self._check_cards(name, host)
                if peer.leader is None or peer.election is None or peer.election.leadership is None:
                    continue
                leadership = peer.election.leadership
                key = (name, leadership.epoch)
                leading[key] = self._leading.get(key, self.world.now())
                if leadership.fresh():
                    sure.append(f"{name} (epoch {leadership.epoch})")
            self.checks["one_leader_is_sure"] += 1
            if len(sure) > 1:
                self.world.violated(
                    "one_leader_is_sure", f"{' and '.join(sure)} both vouch for what they read"
                )
            if len(leading) > 1:
                self.sometimes["two_believe_they_lead"] += 1
            self._mark_leaders(leading)
            self.electorate.look()
            self._ended_s = self.world.now()
            await trio.sleep(_LOOK_S)

    def _check_bounds(self, name: str, host: SimHost) -> None:
        self.checks["lines_are_bounded"] += 1
        waiting = host.peer.executor.reports_waiting if host.peer is not None else 0
        if waiting > _REPORTS_MAX:
            self.world.violated("lines_are_bounded", f"{waiting} reports wait at {name}")

    def _check_cards(self, name: str, host: SimHost) -> None:
        """A load that the device had no room for is the leader's mistake, unless another program took the memory."""
        for label, card in host.cards.items():
            self.checks["device_memory_is_planned"] += 1
            for refusal in list(card.refusals):
                card.refusals.popleft()
                if not refusal.forced and not refusal.foreign_bytes:
                    self.world.violated(
                        "device_memory_is_planned",
                        f"{name}-{label} has no room for {refusal.model} ({refusal.need_bytes} bytes): "
                        f"{refusal.held_bytes} of {card.total_bytes} are held",
                    )

    def _mark_leaders(self, leading: dict[tuple[str, int], float]) -> None:
        new = [name for name, epoch in leading if (name, epoch) not in self._leading]
        if self._led and new and new[0] != self._led[-1].row:
            self.sometimes["led_by_another_after_a_fault"] += 1
        for (name, epoch), since in self._leading.items():
            if (name, epoch) not in leading:
                self._led.append(Mark(since, self.world.now(), name, "leader", f"epoch {epoch}"))
        self._leading = leading

    # ---------------------------------------------------------------- what it came to

    def tell(self, outcome: Outcome) -> None:
        world = self.world
        end_s = self._ended_s
        outcome.virtual_s = end_s
        outcome.steps = world.steps
        outcome.trace_hash = world.trace.hexdigest()
        outcome.trace_tail = tuple(world.trace.tail)
        outcome.faults = self.injector.injected
        outcome.checks = self.checks + self.durable.checks + self.clients.checks
        outcome.checks["quorum_is_not_given_away"] += self.electorate.asked
        if self.fleet.roster is not None:
            self.sometimes["store_alarm_taken_back"] = self.fleet.roster.rooms.disarmed
            self.sometimes["store_defragmented"] = self.fleet.roster.rooms.defragmented
        outcome.sometimes = self.sometimes + self.durable.sometimes + self.clients.sometimes + world.counts
        marks = [*self.injector.marks, *self._led, *self.clients.marks]
        marks += [
            Mark(since, end_s, name, "leader", f"epoch {epoch}")
            for (name, epoch), since in self._leading.items()
        ]
        marks += [Mark(at_s, None, CLUSTER, "task", how) for at_s, _, how in self.durable.ended]
        outcome.timeline = sorted(marks, key=lambda mark: mark.at_s)
