"""The simulated gossip against the contract, in virtual time."""

from __future__ import annotations

from simulations.world.gossip import SimGossip
from simulations.world.kernel import Incarnation, World, run_world
from simulations.world.network import SimNetwork
from tests.contracts.gossip import GossipContract, Rig, Scenario


class SimRig(Rig):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.network = SimNetwork(world, world.rng("network"))
        self.gossip = SimGossip(world, self.network, world.rng("gossip"))
        self.lives: dict[str, Incarnation] = {}

    async def start(self, peer_id: str) -> None:
        life = self.lives[peer_id].life + 1 if peer_id in self.lives else 1
        incarnation = self.lives[peer_id] = Incarnation(self.world, peer_id, life)
        self.network.port(incarnation, f"{peer_id}:1")
        self.gossips[peer_id] = self.gossip.port(incarnation)

    async def kill(self, peer_id: str) -> None:
        del self.gossips[peer_id]
        self.lives[peer_id].crash()

    async def leave(self, peer_id: str) -> None:
        self.gossip.leave(peer_id)
        await self.kill(peer_id)

    def address(self, peer_id: str) -> str:
        return f"{peer_id}.example"

    def port(self, peer_id: str) -> int:
        return 7946


class TestSimGossip(GossipContract):
    """The contract."""

    def play(self, scenario: Scenario) -> None:
        async def main(world: World) -> None:
            await scenario(SimRig(world))

        run_world(main, 1)
