"""The real network against the contract, over loopback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from peer.adapters.links.tls_network import TlsNetwork
from tests.adapters.pki import Pki
from tests.contracts.network import Accept, NetworkContract, Node, Play, Scenario, Stage


class TlsStage(Stage):
    def __init__(self, pki: Pki, nursery: trio.Nursery) -> None:
        self.pki = pki
        self.nursery = nursery
        self.networks: list[TlsNetwork] = []
        self.sockets: list[socket.socket] = []

    async def start(self, peer_id: str, accept: Accept | None = None) -> Node:
        network = TlsNetwork("127.0.0.1:0", self.pki.host(peer_id))
        self.networks.append(network)
        node = Node(network)
        await self.nursery.start(node.listen, accept or node.hold)
        node.address = network.address
        return node

    async def silent_address(self) -> str:
        """The system takes the connection, and nobody shakes hands."""
        listening = socket.create_server(("127.0.0.1", 0))
        self.sockets.append(listening)
        return f"127.0.0.1:{listening.getsockname()[1]}"

    async def dead_address(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            return f"127.0.0.1:{listening.getsockname()[1]}"


class TestTlsNetwork(NetworkContract):
    """The contract."""

    @pytest.fixture
    def play(self, tmp_path: Path) -> Play:
        def play(scenario: Scenario) -> None:
            async def main() -> None:
                async with trio.open_nursery() as nursery:
                    stage = TlsStage(Pki(tmp_path), nursery)
                    try:
                        await scenario(stage)
                    finally:
                        for each in (*stage.networks, *stage.sockets):
                            each.close()
                    nursery.cancel_scope.cancel()

            trio.run(main)

        return play
