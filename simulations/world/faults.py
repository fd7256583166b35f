"""The faults of the world: what each kind does to which model, and how long it lasts.

A scenario lists them with their moment, targets, time and strength; `Injector` carries them out and mends everything
at the end. What a kind's strength means stands with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, get_args

import trio

from simulations.errors import SimulatorError
from simulations.outcome import CLUSTER, Mark, MarkKind
from simulations.scenario import Fault
from simulations.world.cards import GIB
from simulations.world.engine_work import Wrong
from simulations.world.engines import SimEngine
from simulations.world.gossip import SimGossip
from simulations.world.host import SimHost
from simulations.world.kernel import World
from simulations.world.network import SimNetwork
from simulations.world.store import EtcdModel
from simulations.world.voting import SimRoster

RESTART_S_MIN: Final = 1.0
VOTERS: Final = 3  # as many as are made by themselves
WRONG: Final = get_args(Wrong)


@dataclass(frozen=True, slots=True)
class Kind:
    """`targets`: peer, worker (no voter), voter, engine, pair, group, leader (who holds the key then) or none.

    `for_s` and `strength` are drawn between their two bounds.
    """

    says: str
    targets: str
    for_s: tuple[float, float] = (0.0, 0.0)
    strength: tuple[float, float] = (0.0, 0.0)
    mark: MarkKind = "fault"


_DETAILS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "crash": Kind("kill -9 of the peer's process; it is back after the time", "peer", (1, 20), mark="down"),
        "crash_leader": Kind("the same to whoever leads then", "leader", (1, 20), mark="down"),
        "power_loss": Kind("the whole host is gone, its store member too", "peer", (5, 40), mark="down"),
        "lost_disk": Kind("power loss, and a new disk: epoch and model files are gone", "peer", (5, 30), mark="down"),
        "freeze": Kind(
            "SIGSTOP of the process; strength from 0.5: of the whole host", "peer", (0.5, 12), (0, 1), "frozen"
        ),
        "freeze_leader": Kind("the same to whoever leads then", "leader", (1, 12), (0, 1), "frozen"),
        "stop": Kind("a polite stop (drain, leave), and a start after the time", "peer", (1, 20), mark="down"),
        "stop_leader": Kind("the same to whoever leads then", "leader", (1, 20), mark="down"),
        "upgrade": Kind("a polite stop and a start that speaks one wire version more", "peer", (1, 5), mark="down"),
        "join": Kind("this peer is not there before the moment", "worker", mark="down"),
        "partition": Kind("the targets are cut off from all others", "group", (1, 40), mark="partition"),
        "partition_flapping": Kind("the same, on and off", "group", (5, 40), mark="partition"),
        "isolate_leader": Kind("whoever leads then hears nobody (1), is not heard (2), or both", "leader", (1, 30),
                               (0, 3), "partition"),
        "one_way": Kind("nothing passes from the first to the second", "pair", (2, 40), mark="partition"),
        "link_cut": Kind("one link only is cut", "pair", (2, 40), mark="partition"),
        "leader_link_cut": Kind(
            "the link of whoever leads then to one other voter", "leader", (2, 40), mark="partition"
        ),
        "link_flapping": Kind("one link is cut on and off", "pair", (5, 40), mark="partition"),
        "connections_reset": Kind("every connection of the two breaks", "pair"),
        "loss": Kind("strength: the share of packets lost everywhere", "none", (5, 40), (0.02, 0.3)),
        "delay": Kind("strength: latencies are so many times as long everywhere", "none", (5, 40), (10, 400)),
        "clock_drift": Kind("strength: so much faster (negative: slower)", "peer", (10, 60), (-0.009, 0.009)),
        "wall_jump": Kind("strength: the wall clock is set by so many seconds", "peer", (0, 0), (-3600, 3600)),
        "disk_full": Kind("nothing can be written on the peer's disk", "peer", (5, 30)),
        "fsync_error": Kind("the next durable write of the peer fails", "peer"),
        "torn_write": Kind("the next write is torn by a kill", "peer"),
        "slow_disk": Kind("strength: a durable write blocks for so many seconds", "peer", (5, 30), (0.2, 3)),
        "store_quorum_lost": Kind("no store member reaches a majority", "none", (1, 20)),
        "store_leader_moves": Kind("the store elects another leader", "none"),
        "store_member_down": Kind("one member ends; its host goes on", "voter", (5, 40)),
        "store_fsync_error": Kind("one member's disk fails", "voter", (5, 40)),
        "store_member_frozen": Kind("one member answers nothing", "voter", (2, 20)),
        "store_time_outs": Kind("strength: the chance of a write to time out: done, lost or done later", "none",
                                (2, 30), (0.02, 0.3)),
        "store_late_writes": Kind("strength: the chance of a write to time out and be applied later", "none",
                                  (2, 30), (0.05, 0.5)),
        "store_slow": Kind("strength: calls take so many times as long", "none", (2, 30), (5, 150)),
        "store_compaction": Kind("all history is compacted", "none"),
        "store_no_space": Kind("the store refuses what puts; strength from 0.5: and may have done it. Where voters are "
                               "made, below 0.25: until it is cured; below 0.5: members' files are near their quota",
                               "none", (1, 10), (0, 1)),
        "lease_keepalives_lost": Kind("strength: the chance of each", "none", (5, 30), (0.3, 1)),
        "gossip_late": Kind("strength: news takes so many seconds more to reach the peer", "peer", (5, 40), (2, 20)),
        "gossip_says_dead": Kind("a living peer is called failed", "peer", (3, 30)),
        "gossip_says_alive": Kind("a dead peer is called alive", "peer", (5, 60)),
        "gossip_flapping": Kind("a peer is called failed and alive in turn", "peer", (5, 40)),
        "gossip_agent_dies": Kind("the agent ends; the peer goes on without it", "peer", (3, 30)),
        "engine_dies": Kind("an engine's process ends", "engine"),
        "engine_hangs": Kind("an engine reads and says nothing", "engine", (2, 60)),
        "engine_slow": Kind("strength: so many times as slow", "engine", (5, 60), (2, 20)),
        "engine_wrong": Kind("results come twice, late, after a cancel, or for unknown runs", "engine"),
        "engine_garbage": Kind("bytes that are not the protocol", "engine"),
        "engine_ignores_cancel": Kind("cancelled runs go on", "engine", (5, 30)),
        "engine_out_of_memory": Kind("the next load, or run, finds no memory", "engine"),
        "engine_self_test_fails": Kind("at its next start the device computes wrongly", "engine"),
        "load_fails": Kind("the next load finds a bad file", "engine"),
        "fetch_fails": Kind("the next download fails", "peer"),
        "device_overheats": Kind("strength: degrees Celsius", "engine", (5, 60), (85, 115)),
        "foreign_memory": Kind("strength: GiB that another program takes", "engine", (5, 60), (1, 14)),
        "port_rejects": Kind("a firewall refuses connections to a living peer, and breaks open ones", "peer", (1, 20)),
        "store_leader_dies": Kind("the store's own leader ends; what was sent to it is lost", "none", (2, 20)),
        "voter_lost_for_ever": Kind("a voter's host never comes back; only where voters are made, and a spare is there",
                                    "none", mark="down"),
    }
)  # fmt: skip
LATER: Final = ("port_rejects", "store_leader_dies", "voter_lost_for_ever")  # drawn apart from the others
KINDS: Final[Mapping[str, str]] = MappingProxyType({name: kind.says for name, kind in _DETAILS.items()})


def kind(name: str) -> Kind:
    """Raises SimulatorError where there is none."""
    found = _DETAILS.get(name)
    if found is None:
        raise SimulatorError(f"there is no fault `{name}`")
    return found


class Injector:
    """Carries the faults of a scenario out, each at its moment. `marks` are for the timeline."""

    def __init__(
        self,
        world: World,
        hosts: Mapping[str, SimHost],
        network: SimNetwork,
        gossip: SimGossip,
        store: EtcdModel,
        leader: Callable[[], str],
        roster: SimRoster | None = None,
    ) -> None:
        self._world = world
        self._hosts = hosts
        self._network = network
        self._gossip = gossip
        self._store = store
        self._leader = leader
        self._roster = roster
        self._rng = world.rng("faults")
        self._down: dict[str, int] = {}  # how many faults hold it down
        self.injected: Counter[str] = Counter()
        self.marks: list[Mark] = []
        self.over = False

    async def run(self, faults: tuple[Fault, ...], end_s: float) -> None:
        """All of them, to the end of the last one or `end_s`; then everything is mended and every host started."""
        with trio.move_on_at(end_s):
            async with trio.open_nursery() as nursery:
                for fault in sorted(faults, key=lambda fault: fault.at_s):
                    nursery.start_soon(self._at, fault)
        self.mend()

    def absent_at_first(self, faults: tuple[Fault, ...]) -> frozenset[str]:
        """Who joins later."""
        return frozenset(fault.targets[0] for fault in faults if fault.kind == "join" and fault.targets)

    def mend(self) -> None:
        """Nothing is broken from here on."""
        self.over = True
        self._world.trace.note("mended", CLUSTER)
        self._network.mend()
        self._gossip.mend()
        self._store.mend()
        for host in self._hosts.values():
            host.clock.mend()
            host.disk.mend()
            host.files.mend()
            for card in host.cards.values():
                card.mend()
            for engine in host.engines:
                engine.mend()
            if host.incarnation is not None:
                host.incarnation.thaw()
            host.start()
            if host.gone:
                self._store.member_down(host.peer_id)

    async def _at(self, fault: Fault) -> None:
        await trio.sleep_until(fault.at_s)
        known = kind(fault.kind)
        targets = fault.targets
        if known.targets == "leader":
            leader = self._leader()
            if not leader:
                return
            targets = (leader,)
        missing = [each for each in targets if each not in self._hosts]
        if missing:
            raise SimulatorError(f"{fault.kind}: there is no peer {', '.join(missing)}")
        self.injected[fault.kind] += 1
        self._world.trace.note("fault", "+".join(targets) or CLUSTER, f"{fault.kind} {fault.for_s:.3f}")
        until = fault.at_s + fault.for_s if fault.for_s else None
        for row in targets or (CLUSTER,):
            self.marks.append(Mark(fault.at_s, until, row, known.mark, fault.kind))
        name = fault.kind.removesuffix("_leader")
        act = getattr(self, f"_{name}", None)
        if act is not None:
            await act(fault, targets)
        elif known.targets == "engine":
            self._engine(name, fault, self._hosts[targets[0]])
        else:
            raise SimulatorError(f"fault `{fault.kind}` is listed and does nothing")

    # ---------------------------------------------------------------- processes and hosts

    async def _kept_down(self, fault: Fault, host: SimHost) -> None:
        """It stays down until the last fault that holds it is over."""
        self._down[host.peer_id] = self._down.get(host.peer_id, 0) + 1
        await trio.sleep(max(RESTART_S_MIN, fault.for_s))
        self._down[host.peer_id] -= 1
        if not self._down[host.peer_id]:
            host.start()

    async def _crash(self, fault: Fault, targets: tuple[str, ...]) -> None:
        host = self._hosts[targets[0]]
        host.kill()
        await self._kept_down(fault, host)

    async def _power_loss(self, fault: Fault, targets: tuple[str, ...]) -> None:
        host = self._hosts[targets[0]]
        host.kill(power=True)
        if host.voter:
            self._store.member_down(host.peer_id)
        await self._kept_down(fault, host)
        if host.voter:
            self._store.member_up(host.peer_id)

    async def _lost_disk(self, fault: Fault, targets: tuple[str, ...]) -> None:
        host = self._hosts[targets[0]]
        if self._roster is not None and not self._can_spare(host.peer_id, self._roster):
            return
        host.kill(power=True)
        host.lose_disk()
        if host.voter:
            self._store.member_down(host.peer_id)
        await self._kept_down(fault, host)
        if host.voter:
            self._store.member_up(host.peer_id)

    async def _freeze(self, fault: Fault, targets: tuple[str, ...]) -> None:
        host = self._hosts[targets[0]]
        incarnation = host.incarnation
        if incarnation is None or not incarnation.alive:
            return
        incarnation.freeze_for(fault.for_s, "stopped")
        if fault.strength < 0.5:
            return
        self._network.isolate(host.peer_id, for_s=fault.for_s)
        if host.voter or self._roster is not None:
            self._store.member_frozen(host.peer_id, True)
            await trio.sleep(fault.for_s)
            self._store.member_frozen(host.peer_id, False)

    async def _stop(self, fault: Fault, targets: tuple[str, ...]) -> None:
        host = self._hosts[targets[0]]
        await host.stop()
        await self._kept_down(fault, host)

    async def _upgrade(self, fault: Fault, targets: tuple[str, ...]) -> None:
        host = self._hosts[targets[0]]
        await host.stop()
        host.upgrade()
        await self._kept_down(fault, host)

    async def _join(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._hosts[targets[0]].start()

    # ---------------------------------------------------------------- voters that are made

    async def _voter_lost_for_ever(self, fault: Fault, targets: tuple[str, ...]) -> None:
        roster = self._roster
        there = [name for name, host in self._hosts.items() if not host.gone]
        if roster is None or len(there) <= len(roster.voters) or len(roster.voters) < VOTERS:
            return
        name = self._rng.choice(roster.voters)
        if self._can_spare(name, roster):
            self._hosts[name].gone = True
            self._hosts[name].kill(power=True)
            self._world.count("a voter is lost for ever")

    def _can_spare(self, name: str, roster: SimRoster) -> bool:
        """Whether the voters that still have their data are a majority without this one: else all is lost by rights."""
        if name not in roster.voters:
            return True
        rest = [each for each in roster.with_data(self._hosts) if each != name]
        return 2 * len(rest) > len(roster.voters)

    def _member_back(self, name: str) -> None:
        """Where voters are made, etcd runs as long as its peer does."""
        if self._roster is None or self._hosts[name].up:
            self._store.member_up(name)

    # ---------------------------------------------------------------- links

    async def _port_rejects(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._network.reject(targets[0], True)
        await trio.sleep(fault.for_s)
        self._network.reject(targets[0], False)

    async def _partition(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._network.partition([targets], for_s=fault.for_s)

    async def _partition_flapping(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._network.partition([targets], for_s=fault.for_s, flapping=True)

    async def _isolate(self, fault: Fault, targets: tuple[str, ...]) -> None:
        only = {1: "in", 2: "out"}.get(int(fault.strength), "")
        self._network.isolate(targets[0], only=only, for_s=fault.for_s)

    async def _one_way(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._network.cut(*_pair(targets), one_way=True, for_s=fault.for_s)

    async def _link_cut(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._network.cut(*_pair(targets), for_s=fault.for_s)

    async def _leader_link_cut(self, fault: Fault, targets: tuple[str, ...]) -> None:
        others = [name for name in self._store.voting if name != targets[0]]
        if others:
            self._network.cut(targets[0], self._rng.choice(others), for_s=fault.for_s)

    async def _link_flapping(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._network.cut(*_pair(targets), for_s=fault.for_s, flapping=True)

    async def _connections_reset(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._network.reset(*_pair(targets))

    async def _loss(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._network.lossy(fault.strength, for_s=fault.for_s)

    async def _delay(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._network.slow(fault.strength, for_s=fault.for_s)

    # ---------------------------------------------------------------- clocks and disks

    async def _clock_drift(self, fault: Fault, targets: tuple[str, ...]) -> None:
        clock = self._hosts[targets[0]].clock
        clock.set_drift(fault.strength)
        await trio.sleep(fault.for_s)
        clock.set_drift(0.0)

    async def _wall_jump(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._hosts[targets[0]].clock.jump_wall(fault.strength)

    async def _disk_full(self, fault: Fault, targets: tuple[str, ...]) -> None:
        disk = self._hosts[targets[0]].disk
        disk.fill(True)
        await trio.sleep(fault.for_s)
        disk.fill(False)

    async def _fsync_error(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._hosts[targets[0]].disk.fsync_fails(1)

    async def _torn_write(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._hosts[targets[0]].disk.tear(1)

    async def _slow_disk(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._hosts[targets[0]].disk.slow(fault.strength, fault.for_s)

    # ---------------------------------------------------------------- store

    async def _store_quorum_lost(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.quorum_lost(True)
        await trio.sleep(fault.for_s)
        self._store.quorum_lost(False)

    async def _store_leader_moves(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.move_leader()

    async def _store_member_down(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.member_down(targets[0])
        await trio.sleep(fault.for_s)
        self._member_back(targets[0])

    async def _store_leader_dies(self, fault: Fault, targets: tuple[str, ...]) -> None:
        leader = self._store.leader
        if leader:
            self._store.member_down(leader)
            await trio.sleep(fault.for_s)
            self._member_back(leader)

    async def _store_fsync_error(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.fsync_error(targets[0])
        await trio.sleep(fault.for_s)
        self._member_back(targets[0])

    async def _store_member_frozen(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.member_frozen(targets[0], True)
        await trio.sleep(fault.for_s)
        self._store.member_frozen(targets[0], False)

    async def _store_time_outs(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.time_outs(fault.strength)
        await trio.sleep(fault.for_s)
        self._store.time_outs(0.0)

    async def _store_late_writes(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.time_outs(fault.strength, ("late",))
        await trio.sleep(fault.for_s)
        self._store.time_outs(0.0)

    async def _store_slow(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.slow(fault.strength)
        await trio.sleep(fault.for_s)
        self._store.slow(1.0)

    async def _store_compaction(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.compact_all()

    async def _store_no_space(self, fault: Fault, targets: tuple[str, ...]) -> None:
        if self._roster is not None and fault.strength < 0.5:
            self._roster.lose_room(fault.strength / 0.5)
            return
        self._store.no_space(True, 0.5 if fault.strength >= 0.5 else 0.0)
        await trio.sleep(fault.for_s)
        self._store.no_space(False)

    async def _lease_keepalives_lost(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._store.lose_keepalives(fault.strength)
        await trio.sleep(fault.for_s)
        self._store.lose_keepalives(0.0)

    # ---------------------------------------------------------------- gossip

    async def _gossip_late(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._gossip.late(fault.strength, for_s=fault.for_s, observers=targets)

    async def _gossip_says_dead(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._gossip.says_dead(targets[0], for_s=fault.for_s)

    async def _gossip_says_alive(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._gossip.says_alive(targets[0], for_s=fault.for_s)

    async def _gossip_flapping(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._gossip.flapping(targets[0], for_s=fault.for_s)

    async def _gossip_agent_dies(self, fault: Fault, targets: tuple[str, ...]) -> None:
        if self._hosts[targets[0]].up:
            self._gossip.agent_dies(targets[0], for_s=fault.for_s)

    # ---------------------------------------------------------------- engines and devices

    async def _fetch_fails(self, fault: Fault, targets: tuple[str, ...]) -> None:
        self._hosts[targets[0]].files.fetch_fails(1)

    def _engine(self, name: str, fault: Fault, host: SimHost) -> None:
        if not host.engines:
            return
        engine = self._rng.choice(host.engines)
        match name:
            case "device_overheats":
                engine.card.overheats(fault.strength, fault.for_s)
            case "foreign_memory":
                engine.card.foreign_memory(int(fault.strength * GIB), fault.for_s)
            case _:
                self._of_process(name, fault, engine)

    def _of_process(self, name: str, fault: Fault, engine: SimEngine) -> None:
        match name:
            case "engine_dies":
                engine.die()
            case "engine_hangs":
                engine.hang(fault.for_s)
            case "engine_slow":
                engine.slow(fault.strength, fault.for_s)
            case "engine_wrong":
                engine.answers_wrong(self._rng.choice(WRONG))
            case "engine_garbage":
                engine.babbles("garbage")
            case "engine_ignores_cancel":
                engine.ignore_cancel(fault.for_s)
            case "engine_out_of_memory":
                engine.out_of_memory_next_load() if self._rng.random() < 0.5 else engine.runs_fail()
            case "engine_self_test_fails":
                engine.self_test_fails()
                engine.die()
            case "load_fails":
                engine.load_fails()
            case _:
                raise SimulatorError(f"fault `{name}` is listed and does nothing")


def _pair(targets: tuple[str, ...]) -> tuple[str, str]:
    if len(targets) != 2:
        raise SimulatorError(f"a link has two ends, not {targets}")
    return targets[0], targets[1]
