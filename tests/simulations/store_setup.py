"""Three voters of a simulated store, for its tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from peer.ports import LEADER_KEY, Delete, Put
from simulations.world.kernel import Incarnation, World, run_world
from simulations.world.store import EtcdModel, SimStore

VOTERS = ("h1", "h2", "h3")
TTL_S = 5.0


class Setup:
    """Three voters and a network between them whose broken pairs are in `cut`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cut: set[tuple[str, str]] = set()
        self.model = EtcdModel(
            VOTERS,
            world.rng("etcd"),
            reachable=lambda a, b: (a, b) not in self.cut,
            violated=world.violated,
        )
        self.lives = 0
        world.spawn(self.model.run)

    def process(self, name: str) -> Incarnation:
        self.lives += 1
        return Incarnation(self.world, name, self.lives)

    def store(self, name: str = "h1", process: Incarnation | None = None) -> SimStore:
        process = process or self.process(name)
        return SimStore(self.model, process, self.world.rng(f"store/{name}/{self.lives}"))

    def isolate(self, name: str) -> None:
        self.cut |= {pair for other in VOTERS for pair in ((name, other), (other, name)) if other != name}

    async def lead(self, store: SimStore) -> int:
        await store.txn((), [Delete(LEADER_KEY)])
        return (await store.txn((), [Put(LEADER_KEY, store.peer_id.encode())])).revision


def simulated(test: Callable[[Setup], Awaitable[None]], seed: int = 1) -> None:
    async def main(world: World) -> None:
        await test(Setup(world))

    run_world(main, seed)
