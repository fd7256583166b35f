"""The simulated network against the contract, under virtual time."""

from __future__ import annotations

import pytest
import trio

from simulations.world.kernel import Incarnation, World, run_world
from simulations.world.network import SimNetwork
from tests.contracts.network import Accept, NetworkContract, Node, Play, Scenario, Stage


class SimStage(Stage):
    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.nursery = nursery
        self.network = SimNetwork(world, world.rng("network"))

    async def start(self, peer_id: str, accept: Accept | None = None) -> Node:
        incarnation = Incarnation(self.world, peer_id, 1)
        node = Node(self.network.port(incarnation, f"{peer_id}:1"))
        node.address = f"{peer_id}:1"
        ready = trio.Event()

        async def process() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(node.listen, accept or node.hold)
                ready.set()
                await trio.sleep_forever()

        self.nursery.start_soon(incarnation.run, process)
        await ready.wait()
        return node

    async def silent_address(self) -> str:
        node = await self.start("h2")
        self.network.isolate("h2")
        return node.address

    async def dead_address(self) -> str:
        incarnation = Incarnation(self.world, "h2", 1)
        self.network.port(incarnation, "h2:1")
        return "h2:1"


class TestSimNetwork(NetworkContract):
    """The contract."""

    @pytest.fixture(params=[1, 2])
    def play(self, request: pytest.FixtureRequest) -> Play:
        def play(scenario: Scenario) -> None:
            async def main(world: World) -> None:
                async with trio.open_nursery() as nursery:
                    await scenario(SimStage(world, nursery))
                    nursery.cancel_scope.cancel()

            run_world(main, request.param)

        return play
