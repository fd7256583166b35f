"""A peer that lets hosts in as a leader does, for tests of joining and renewing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from peer.adapters.clock import SystemClock
from peer.adapters.links import certificates
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.links.enrolment import EnrolmentServer
from peer.adapters.links.tls_network import TlsNetwork
from peer.decide import enrol as decide
from peer.decide.decision import Decision
from peer.state import enrol as records
from peer.state.enrol import CreateJoinToken, Enrol, Enrolled, Registry, Renew
from peer.state.snapshot import Save

ID, SECRET = "0123456789ab", "ab" * 16


class Leader:
    """A peer h1 of cluster c1 that lets hosts in as a leader does."""

    def __init__(self, files: ClusterFiles, clock: Any = None) -> None:
        self.files = files
        self.registry = Registry()
        self.take(decide.note(self.registry, files.host()))
        self.clock = clock or SystemClock()
        self.asked: list[Enrol] = []
        self.serials = 0
        self.server = EnrolmentServer(files.ca_pem(), self.admit, self.clock)
        self.network = TlsNetwork("127.0.0.1:0", files.credentials(), enrol=self.server.serve)

    @property
    def port(self) -> int:
        return int(self.network.address.rpartition(":")[2])

    def token(self, ttl_s: float = 1_800.0) -> str:
        command = CreateJoinToken(token_id=ID, secret_sha256=records.digest(SECRET), ttl_s=ttl_s)
        self.take(decide.create_token(self.registry, self.clock.wall(), command))
        return records.token_text(ID, SECRET, certificates.ca_sha256(self.files.ca_pem()))

    def take(self, decision: Decision) -> Any:
        for change in decision.changes:
            if isinstance(change, Save):
                self.registry.save(change.record)
            else:
                self.registry.drop(change.record)
        return decision.reply

    async def admit(self, command: Enrol) -> Enrolled:
        self.asked.append(command)
        self.serials += 1
        decision = decide.enrol(
            self.registry, self.clock.wall(), command, cluster="c1", serial=f"{self.serials:x}"
        )
        return self.files.issue(command.csr, self.take(decision), (self.network.address,))

    async def renew(self, command: Renew) -> Enrolled:
        decision = decide.renew(self.registry, self.clock.wall(), command, cluster="c1", serial="aa")
        return self.files.issue(command.csr, self.take(decision), ())


@asynccontextmanager
async def serving(leader: Leader) -> AsyncIterator[Leader]:
    async def accept(connection: Any) -> None:
        await connection.send(b"hello " + connection.peer_id.encode())
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(leader.network.listen, accept)
        yield leader
        nursery.cancel_scope.cancel()
    leader.network.close()
