"""Tokens between peers over the real network: many streams at a time, each its own, and none is left open."""

from __future__ import annotations

from pathlib import Path

import trio

from peer.adapters.clock import SystemClock
from peer.adapters.links.tls_network import TlsNetwork
from peer.link import wire
from peer.link.session import Session, receive
from peer.ports import Connection
from peer.relay import TokenRelay
from peer.streams import Stream, StreamHub
from tests.adapters.pki import Pki
from tests.contracts.network import until

STREAMS = 24


class Directory:
    def __init__(self, address: str) -> None:
        self._address = address

    def address(self, peer_id: str) -> str | None:
        return self._address


async def test_many_streams_are_read_at_a_time(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    here, there = TlsNetwork("127.0.0.1:0", pki.host("h1")), TlsNetwork("127.0.0.1:0", pki.host("h2"))
    hub = StreamHub(SystemClock())
    gives = TokenRelay("h2", hub, there, Directory(""))
    copies = [Stream() for _ in range(STREAMS)]

    async def accept(connection: Connection) -> None:
        follow = wire.decode(await receive(connection))
        assert isinstance(follow, wire.Follow)
        await gives.serve(Session(connection), follow)

    with trio.fail_after(30.0):
        async with trio.open_nursery() as nursery:
            await nursery.start(there.listen, accept)
            takes = TokenRelay("h1", StreamHub(SystemClock()), here, Directory(there.address))
            async with trio.open_nursery() as copying:
                for number, copy in enumerate(copies):
                    copying.start_soon(takes.copy, "h2", f"t{number}", 1, copy)
                await until(lambda: gives.given == STREAMS)
                for number in range(STREAMS):
                    hub.publish(f"t{number}", 1, f"{number}: ", 1)
                await until(lambda: all(copy.tokens == 1 for copy in copies))
                for number in range(STREAMS):
                    hub.publish(f"t{number}", 1, "the rest", 2)
                    hub.close(f"t{number}", 1)
            assert takes.taken == 0
            await until(lambda: gives.given == 0 and there.connections == 0)
            nursery.cancel_scope.cancel()
    for number, copy in enumerate(copies):
        copy.end()
        assert [item.text async for item in copy.items()] == [f"{number}: the rest"]
    here.close()
    there.close()
