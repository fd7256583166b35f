"""Processes on a simulated network, for its tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from peer.errors import Unavailable
from peer.ports import Connection, Network
from simulations.world.kernel import Incarnation, World, run_world
from simulations.world.network import SimNetwork, SimPort


class Cluster:
    """Processes that listen; `got` is what reached each, with when."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.nursery = nursery
        self.network = SimNetwork(world, world.rng("network"))
        self.got: dict[str, list[tuple[float, bytes]]] = {}
        self.ended: dict[str, list[tuple[float, str]]] = {}
        self.lives: dict[str, Incarnation] = {}
        self.ports: dict[str, SimPort] = {}
        self.reads = True

    async def start(self, peer_id: str, *, listens: bool = True) -> Network:
        life = self.lives[peer_id].life + 1 if peer_id in self.lives else 1
        incarnation = self.lives[peer_id] = Incarnation(self.world, peer_id, life)
        port = self.ports[peer_id] = self.network.port(incarnation, f"{peer_id}:1")
        self.got.setdefault(peer_id, [])
        self.ended.setdefault(peer_id, [])
        ready = trio.Event()

        async def serve(connection: Connection) -> None:
            try:
                while self.reads:
                    frame = await connection.receive()
                    self.got[peer_id].append((trio.current_time(), frame))
                await trio.sleep_forever()
            except Unavailable as error:
                self.ended[peer_id].append((trio.current_time(), error.message))

        async def process() -> None:
            async with trio.open_nursery() as nursery:
                if listens:
                    await nursery.start(port.listen, serve)
                ready.set()
                await trio.sleep_forever()

        self.nursery.start_soon(incarnation.run, process)
        await ready.wait()
        return port

    def texts(self, peer_id: str) -> list[str]:
        return [frame.decode() for _, frame in self.got[peer_id]]


def scenario(fn: Callable[[Cluster], Awaitable[Any]], seed: int = 1) -> Any:
    async def main(world: World) -> Any:
        async with trio.open_nursery() as nursery:
            result = await fn(Cluster(world, nursery))
            nursery.cancel_scope.cancel()
        return result

    return run_world(main, seed)


async def ends(connection: Connection) -> tuple[float, str]:
    try:
        while True:
            await connection.receive()
    except Unavailable as error:
        return trio.current_time(), error.message
