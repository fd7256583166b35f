"""A simulated host: what outlives its peer's process (clock, disk, devices, model files), and that process's lives.

Everything of the peer is the product's own code, above simulated ports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import trio

from peer.cluster_peer import ClusterPeer, Identity
from peer.config import Alerts
from peer.decide.voters import Bounds
from peer.engines import Device
from peer.errors import Fenced, StoreBroken, Unavailable
from peer.executor import Executor
from peer.limits import (
    EVENTS_KEPT_MAX,
    PRIORITY_STEP_S,
    QUEUE_BYTES_MAX,
    QUEUE_TASKS_MAX,
)
from peer.link import wire
from peer.ports import Authority, ReportSink
from peer.state.model import Model
from peer.state.order import Order
from peer.state.snapshot import Policy
from peer.state.worker import HostInfo
from peer.streams import StreamHub
from simulations.world.cards import Profile, SimCard, SimTelemetry, devices
from simulations.world.clocks import HostClock, SimEntropy
from simulations.world.disk import SimDisk
from simulations.world.engines import SimEngine
from simulations.world.files import SimFiles
from simulations.world.gossip import SimGossip
from simulations.world.kernel import Incarnation, World
from simulations.world.network import SimNetwork
from simulations.world.store import EtcdModel, SimStore
from simulations.world.voting import SimRoster, SimVoting

RESTART_S: Final = 1.0  # systemd's, after a process that ended by itself
DRAIN_S: Final = 10.0
EPOCH_FILE: Final = "epoch"

POLICY: Final = Policy(
    queue_tasks_max=QUEUE_TASKS_MAX,
    queue_bytes_max=QUEUE_BYTES_MAX,
    priority_step_s=PRIORITY_STEP_S,
    retention_age_s=86_400.0,
    retention_count=10_000,
    events_kept=EVENTS_KEPT_MAX,
    memory_reserve_bytes=0,
)


class Shared:
    """What all hosts of a world have in common."""

    def __init__(
        self,
        world: World,
        store: EtcdModel,
        network: SimNetwork,
        gossip: SimGossip,
        catalogue: tuple[Model, ...],
        profile: Profile,
        roster: SimRoster | None = None,
        bounds: Bounds | None = None,
        policy: Policy = POLICY,
    ) -> None:
        """With a `roster` the leader makes voters of hosts, by these bounds; without one they are fixed."""
        self.roster = roster
        self.bounds = bounds or Bounds()
        self.policy = policy
        self.world = world
        self.store = store
        self.network = network
        self.gossip = gossip
        self.catalogue = {model.name: model for model in catalogue}
        self.profile = profile


class SimHost:
    """`voter`: its store member is one of the model's, for ever."""

    def __init__(
        self, shared: Shared, peer_id: str, *, voter: bool, gpus: int, on_order: Callable[..., None]
    ) -> None:
        world = shared.world
        self.shared = shared
        self.peer_id = peer_id
        self.voter = voter
        self.address = f"{peer_id}.example:8302"
        self.clock = HostClock(world.rng(f"{peer_id}/clock"))
        self.disk = SimDisk(world, peer_id)
        self.files = SimFiles()
        self.cards = {device.label: SimCard(device) for device in devices(gpus)}
        self.engines: list[SimEngine] = []
        self.wire = (wire.WIRE, wire.WIRE_MIN)
        self.authority: Authority | None = None  # of the next life; without one no host joins
        self.lives = 0
        self.disks_lost = 0
        self.gone = False  # for ever: nobody starts it again
        self.incarnation: Incarnation | None = None
        self.peer: ClusterPeer | None = None
        self._on_order = on_order
        self._wanted = False

    @property
    def up(self) -> bool:
        return self.incarnation is not None and self.incarnation.alive

    def upgrade(self) -> None:
        """From the next life on it speaks one wire version more, and still the one before."""
        self.wire = (wire.WIRE + 1, wire.WIRE_MIN)

    def lose_disk(self) -> None:
        self.disks_lost += 1
        self.disk.lose()
        self.files.lose_disk()

    # ---------------------------------------------------------------- lives

    def start(self) -> None:
        """Begin a life if there is none."""
        self._wanted = not self.gone
        if self._wanted and not self.up:
            self._begin()

    def kill(self, *, power: bool = False) -> None:
        """kill -9, or the host's loss. It stays down until `start`."""
        self._wanted = False
        if self.incarnation is not None and self.incarnation.alive:
            self.incarnation.crash(power=power)

    async def stop(self) -> None:
        """Politely, as systemd does: what is not done in time is killed. Once begun it goes to its end."""
        self._wanted = False
        peer, incarnation = self.peer, self.incarnation
        if peer is None or incarnation is None or not incarnation.alive:
            return
        with trio.move_on_after(DRAIN_S + 10.0, shield=True):
            await peer.stop(DRAIN_S)
            if self.incarnation is incarnation:
                self.shared.gossip.leave(self.peer_id)
        if incarnation.alive:
            incarnation.crash()

    def _begin(self) -> None:
        self.lives += 1
        incarnation = Incarnation(self.shared.world, self.peer_id, self.lives)
        self.incarnation = incarnation
        self.shared.world.spawn(self._live, incarnation)

    async def _live(self, incarnation: Incarnation) -> None:
        await incarnation.run(self._main, incarnation, exits=(StoreBroken,))
        if self.incarnation is incarnation:
            self.peer, self.engines = None, []
            await trio.sleep(RESTART_S)
            if self._wanted and self.incarnation is incarnation:
                self._begin()

    async def _main(self, incarnation: Incarnation) -> None:
        self.peer = self._build(incarnation)
        await self.peer.run()

    # ---------------------------------------------------------------- one life

    def _build(self, incarnation: Incarnation) -> ClusterPeer:
        shared, world = self.shared, self.shared.world
        clock = self.clock.port(incarnation)
        entropy = SimEntropy(world.rng(f"{incarnation.name}/entropy"))
        self.engines = []

        def executor(sink: ReportSink, streams: StreamHub) -> Executor:
            return Executor(
                self.peer_id,
                [card.device for card in self.cards.values()],
                engine=self._engine(incarnation, clock),
                telemetry=lambda device: SimTelemetry(self.cards[device.label]),
                host_info=lambda: HostInfo(cpu="simulated", ram_total_bytes=1, ram_used_bytes=0, os="none"),
                files=self.files,
                sink=sink,
                streams=streams,
                clock=clock,
                thresholds=Alerts(),
                slots_max=shared.profile.slots_max,
                epoch=int(self.disk.read(EPOCH_FILE) or b"0"),
                remember_epoch=self._remember,
            )

        store = None
        if self.voter:
            store = SimStore(shared.store, incarnation, world.rng(f"{incarnation.name}/store"))
        voting = None
        if shared.roster is not None:
            voting = SimVoting(shared.roster, incarnation, self.disk, world.rng(f"{incarnation.name}/store"))
        identity = Identity(
            peer_id=self.peer_id,
            cluster_id="simulated",
            link=self.address,
            api=f"{self.peer_id}.example:8000",
            policy=shared.policy,
            catalogue=shared.catalogue,
            wire_versions=self.wire,
            voters=shared.bounds,
        )
        peer = ClusterPeer(
            identity,
            executor,
            store=store,
            voting=voting,
            gossip=shared.gossip.port(incarnation),
            network=shared.network.port(incarnation, self.address),
            clock=clock,
            entropy=entropy,
            authority=self.authority,
        )
        self._watch_orders(peer)
        return peer

    def _engine(self, incarnation: Incarnation, clock: Any) -> Callable[[str, Device], SimEngine]:
        def build(worker_id: str, device: Device) -> SimEngine:
            rng = self.shared.world.rng(f"{incarnation.name}/{device.label}")
            engine = SimEngine(
                incarnation, worker_id, self.cards[device.label], clock, rng, self.shared.profile
            )
            self.engines.append(engine)
            return engine

        return build

    def _remember(self, epoch: int) -> None:
        try:
            self.disk.write_durably(EPOCH_FILE, str(epoch).encode())
        except OSError as error:
            raise Unavailable(f"the newest epoch cannot be kept: {error}") from error

    def _watch_orders(self, peer: ClusterPeer) -> None:
        """Every order that the executor obeyed is shown to the checker."""
        obey = peer.executor.order

        async def order(order: Order) -> None:
            try:
                await obey(order)
            except Fenced:
                self._on_order(self, order, obeyed=False)
                raise
            self._on_order(self, order, obeyed=True)

        peer.executor.order = order  # type: ignore[method-assign]
