"""Connections between simulated peers: peer.ports.Network as TCP and TLS behave when links and processes fail.

What is modelled: frames arrive whole and in order, each after its own latency; a send waits when too much is unread.
A frame that is sent into a cut link stalls, with all behind it, and arrives after the heal, however late, even from a
side that has closed meanwhile; but a side that is not acknowledged for its retransmission limit breaks, silently. A
killed process's connections end at the other side; a host without power is only silent, until it is back and resets
what it does not know. A frozen process is dialled in vain and fills its window. Not modelled: acknowledgements take no
time, and a window is freed although they are cut; bandwidth is per connection.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import NoReturn

import trio
from trio import TASK_STATUS_IGNORED, TaskStatus

from peer import limits
from peer.errors import Unavailable
from peer.ports import REFUSED, TURNED_AWAY, Connection
from simulations.errors import SimulatorError
from simulations.world.connections import RETRANSMIT_S, RETRANSMIT_S_MAX, Pipe, SimConnection
from simulations.world.kernel import Incarnation, World
from simulations.world.links import Links, Trouble

LATENCY_S = (0.0001, 0.0008)
JITTER_S = 0.0002  # mean
SPIKE = (0.003, 0.005, 0.04)  # how likely, and from, to seconds
WINDOW_BYTES = (256 * 1024, 4 * 1024 * 1024)
BACKLOG = 128
LIMIT_S = (12.0, 18.0)  # without an acknowledgement: the connection breaks
GIVE_UP_S = 0.98 * limits.DIAL_S_MAX


class _Listener:
    def __init__(self) -> None:
        self.pending: deque[SimConnection] = deque()
        self.lot = trio.lowlevel.ParkingLot()


class SimPort:
    """peer.ports.Network of one life of a peer, at one address."""

    def __init__(self, network: SimNetwork, incarnation: Incarnation, address: str) -> None:
        self.network = network
        self.world = network.world
        self.incarnation = incarnation
        self.address = address
        self.connections: dict[SimConnection, None] = {}
        self.listener: _Listener | None = None
        self.revoked: frozenset[str] = frozenset()
        incarnation.on_death(self._died)

    async def dial(self, peer_id: str, address: str) -> Connection:
        """See peer.ports.Network."""
        await trio.lowlevel.checkpoint()
        self._check_not_revoked(peer_id)
        self._check()
        give_up_at = trio.current_time() + GIVE_UP_S
        await self._round_trip(peer_id, address, give_up_at)
        there = self.network.port_at(address)
        if there is None or there.listener is None or self.network.rejects(peer_id):
            raise Unavailable(f"{peer_id} refuses connections at {address}", code=REFUSED)
        if there.incarnation.peer_id != peer_id:
            await self._round_trip(peer_id, address, give_up_at)
            raise Unavailable(f"{there.incarnation.peer_id} answers at {address} in place of {peer_id}")
        if len(there.listener.pending) >= BACKLOG:
            self.world.count("net: a backlog is full")
            await self._in_vain(peer_id, address, give_up_at)
        connection = self.network.connect(self, there)
        arrived = False
        try:
            there.listener.pending.append(connection.other)
            there.listener.lot.unpark_all()
            with trio.move_on_at(give_up_at):
                await connection.accepted.wait()
            if connection.refused:
                raise Unavailable(f"{peer_id} has refused the connection", code=TURNED_AWAY)
            if not connection.accepted.is_set():
                self.world.count("net: a handshake is not answered")
                raise Unavailable(f"{peer_id} does not answer at {address}")
            await self._round_trip(peer_id, address, give_up_at)
            self._check_not_revoked(peer_id)
            self._check()
            arrived = True
        finally:
            if not arrived:
                connection.close()
        return connection

    async def listen(
        self,
        accept: Callable[[Connection], Awaitable[None]],
        *,
        task_status: TaskStatus[None] = TASK_STATUS_IGNORED,
    ) -> None:
        """See peer.ports.Network."""
        self._check()
        if self.listener is not None:
            self.world.violated("port_contract", f"{self.incarnation.name} listens twice")
        listener = self.listener = _Listener()
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    while listener.pending:
                        side = listener.pending.popleft()
                        if side.peer_id in self.revoked:
                            side.close()
                        elif not side.over:
                            side.other.accepted.set()
                            nursery.start_soon(self._serve, accept, side)
                    await listener.lot.park()
        finally:
            self._stop_listening()

    def revoke(self, peer_ids: Collection[str], serials: Collection[str] = ()) -> None:
        """See peer.ports.Network; a simulated peer has no certificate besides its name."""
        self.revoked = frozenset(peer_ids)
        for side in list(self.connections):
            if side.peer_id in self.revoked:
                self.world.count("net: a revoked peer is cut off")
                side.close()

    def _check_not_revoked(self, peer_id: str) -> None:
        if peer_id in self.revoked:
            raise Unavailable(f"{peer_id} has been revoked")

    async def _serve(self, accept: Callable[[Connection], Awaitable[None]], side: SimConnection) -> None:
        try:
            await accept(side)
        finally:
            side.close()

    async def _round_trip(self, peer_id: str, address: str, give_up_at: float) -> None:
        """Wait for an answer of that address's host. Raises Unavailable if there cannot be one in time."""
        me, host = self.incarnation.peer_id, self.network.host_at(address)
        if host is None or not self.network.links.both_open(me, host):
            await self._in_vain(peer_id, address, give_up_at)
        assert host is not None
        rtt = self.network.latency(me, host) + self.network.latency(host, me)
        if trio.current_time() + rtt > give_up_at:
            await self._in_vain(peer_id, address, give_up_at)
        await trio.sleep(rtt)
        if not self.network.links.both_open(me, host):
            await self._in_vain(peer_id, address, give_up_at)
        self._check()

    async def _in_vain(self, peer_id: str, address: str, give_up_at: float) -> NoReturn:
        self.world.count("net: a dial in vain")
        await trio.sleep_until(give_up_at)
        raise Unavailable(f"{peer_id} does not answer at {address}")

    def _check(self) -> None:
        if not self.incarnation.alive:
            raise Unavailable("this process is dead")

    def _stop_listening(self) -> None:
        listener, self.listener = self.listener, None
        if listener is not None:
            for side in listener.pending:
                side.close()
            listener.pending.clear()

    def _died(self, how: str) -> None:
        self.network.leaves(self, how)
        for connection in list(self.connections):
            connection.died(how)
        self._stop_listening()


class SimNetwork:
    """All hosts' network. A host is up from its first port on; it is down between a loss of power and the next port.

    Faults return a Trouble, which `end()`s; `for_s` > 0 ends it by itself, `flapping` turns it on and off.
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.links = Links(world)
        self.links.watchers.append(self._links_changed)
        self._ports: dict[str, SimPort] = {}  # by address
        self._hosts: dict[str, str] = {}  # address -> peer
        self._base_s: dict[tuple[str, str], float] = {}
        self._rejecting: dict[str, None] = {}  # hosts
        self._connections: dict[SimConnection, None] = {}  # one side of each that is not over on both

    def port(self, incarnation: Incarnation, address: str) -> SimPort:
        """The network of a new life. Its host is up from here on."""
        other = self._ports.get(address)
        if other is not None and other.incarnation.alive:
            raise SimulatorError(f"{other.incarnation.name} lives at {address}")
        port = self._ports[address] = SimPort(self, incarnation, address)
        self._hosts[address] = incarnation.peer_id
        self.links.host_up(incarnation.peer_id)
        return port

    @property
    def open_connections(self) -> int:
        """Those that at least one side still holds."""
        return len(self._connections)

    # ---------------------------------------------------------------- faults

    def cut(
        self, one: str, other: str, *, one_way: bool = False, for_s: float = 0.0, flapping: bool = False
    ) -> Trouble:
        """Nothing passes from `one` to `other` and, unless `one_way`, back."""
        self.world.count("net: cut one way" if one_way else "net: cut")
        pairs = ((one, other),) if one_way else ((one, other), (other, one))
        return self.links.add(lambda a, b: (a, b) in pairs, cut=True, for_s=for_s, flapping=flapping)

    def isolate(self, peer_id: str, *, only: str = "", for_s: float = 0.0, flapping: bool = False) -> Trouble:
        """Nothing passes to or from this host. `only`: "in", it hears nothing; "out", nobody hears it."""
        if only not in ("", "in", "out"):
            raise SimulatorError(f"only {only!r}")
        self.world.count(f"net: isolated {only}".strip())

        def on(source: str, target: str) -> bool:
            return (source == peer_id and only != "in") or (target == peer_id and only != "out")

        return self.links.add(on, cut=True, for_s=for_s, flapping=flapping)

    def partition(
        self, groups: Iterable[Iterable[str]], *, for_s: float = 0.0, flapping: bool = False
    ) -> Trouble:
        """Nothing passes between the groups; hosts in none of them are one more group."""
        self.world.count("net: partition")
        group = {peer_id: number for number, each in enumerate(groups) for peer_id in each}
        return self.links.add(
            lambda a, b: group.get(a) != group.get(b), cut=True, for_s=for_s, flapping=flapping
        )

    def lossy(self, loss: float, one: str = "", other: str = "", *, for_s: float = 0.0) -> Trouble:
        """A share of packets is lost: frames stall for retransmissions, and sometimes the connection breaks."""
        self.world.count("net: loss")
        return self.links.add(_between(one, other), loss=loss, for_s=for_s)

    def slow(self, factor: float, one: str = "", other: str = "", *, for_s: float = 0.0) -> Trouble:
        """Latencies are so many times as long, in both directions; "" is any host."""
        self.world.count("net: delay")
        return self.links.add(_between(one, other), factor=factor, for_s=for_s)

    def reset(self, one: str = "", other: str = "") -> None:
        """Every connection between the two breaks now on both sides, as a firewall that forgets does it."""
        between = _between(one, other)
        for connection in list(self._connections):
            if between(connection.peer_id, connection.other.peer_id):
                self.world.count("net: reset")
                connection.reset()

    def reject(self, peer_id: str, rejects: bool) -> None:
        """A firewall answers for a host whose peer lives: what is open breaks, new connections are refused."""
        if rejects:
            self.world.count("net: a firewall rejects")
            self._rejecting[peer_id] = None
            self.reset(peer_id)
        else:
            self._rejecting.pop(peer_id, None)

    def rejects(self, peer_id: str) -> bool:
        return peer_id in self._rejecting

    def mend(self) -> None:
        """End all faults of links. Hosts without power come back with their next port."""
        self._rejecting.clear()
        self.links.mend()

    # ---------------------------------------------------------------- what connections and gossip ask

    def latency(self, source: str, target: str) -> float:
        """Of one frame now, with the retransmissions that it needs."""
        rng = self.rng
        base = self._base_s.get((source, target))
        if base is None:
            base = self._base_s[source, target] = rng.uniform(*LATENCY_S)
        seconds = base + rng.expovariate(1.0 / JITTER_S)
        if rng.random() < SPIKE[0]:
            seconds += rng.uniform(SPIKE[1], SPIKE[2])
        link = self.links.link(source, target)
        seconds *= link.factor
        again = RETRANSMIT_S
        while link.loss and rng.random() < link.loss:
            self.world.count("net: a frame is retransmitted")
            seconds += again
            again = min(2 * again, RETRANSMIT_S_MAX)
        return seconds

    def port_at(self, address: str) -> SimPort | None:
        return self._ports.get(address)

    def host_at(self, address: str) -> str | None:
        return self._hosts.get(address)

    def connect(self, here: SimPort, there: SimPort) -> SimConnection:
        me, other = here.incarnation.peer_id, there.incarnation.peer_id
        limit_s, window = self.rng.uniform(*LIMIT_S), self.rng.randint(*WINDOW_BYTES)
        outgoing = Pipe(self, me, other, limit_s, window)
        incoming = Pipe(self, other, me, limit_s, window)
        connection = SimConnection(self, here.connections, other, outgoing, incoming)
        connection.other = SimConnection(self, there.connections, me, incoming, outgoing)
        connection.other.other = connection
        self._connections[connection] = None
        return connection

    def forget(self, connection: SimConnection) -> None:
        self._connections.pop(connection, None)
        self._connections.pop(connection.other, None)

    def leaves(self, port: SimPort, how: str) -> None:
        if self._ports.get(port.address) is port:
            del self._ports[port.address]
        if how == "power":
            self.links.host_down(port.incarnation.peer_id)

    def _links_changed(self) -> None:
        for connection in list(self._connections):
            connection.links_changed()
            connection.other.links_changed()


def _between(one: str, other: str) -> Callable[[str, str], bool]:
    def on(source: str, target: str) -> bool:
        return (one in ("", source) and other in ("", target)) or (
            one in ("", target) and other in ("", source)
        )

    return on
