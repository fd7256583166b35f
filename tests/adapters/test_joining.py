"""From a token to a link and out again: the leader's own code over real files, certificates and connections."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from peer.adapters.clock import SystemClock, SystemEntropy
from peer.adapters.links import certificates, enrolment
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.links.enrolment import EnrolmentServer
from peer.adapters.links.renewal import keep_authority
from peer.adapters.links.tls_network import TlsNetwork
from peer.errors import Unauthorized, Unavailable
from peer.ports import Connection
from peer.state import enrol as records
from peer.state.enrol import CreateJoinToken, Renew, RevokeHost
from tests.leader.rig import Rig, VirtualClock, leading

ID, SECRET = "0123456789ab", "ab" * 16


class WallClock(VirtualClock):
    """Certificates are checked by the system's clock."""

    def wall(self) -> float:
        return time.time()


def host(folder: Path) -> ClusterFiles:
    folder.mkdir()
    return ClusterFiles(folder)


async def test_a_host_joins_fetches_the_cas_key_renews_and_is_revoked(tmp_path: Path) -> None:
    founder, newcomer = host(tmp_path / "p1"), host(tmp_path / "h2")
    founder.found("c1", "p1", ("127.0.0.1",), time.time())
    with trio.fail_after(30):
        async with (
            leading(worker=False, authority=founder, clock=WallClock()) as rig,
            _serving(rig, founder) as net,
        ):
            made = await rig.leader.call(CreateJoinToken(token_id=ID, secret_sha256=records.digest(SECRET)))
            token = records.token_text(ID, SECRET, made.ca_sha256)
            key, port = newcomer.pending_key(), int(net.address.rpartition(":")[2])
            enrolled = await enrolment.join(
                "127.0.0.1", port, token, peer_id="h2", key_pem=key, now=time.time(), addresses=("127.0.0.1",)
            )
            newcomer.joined(key, enrolled)
            assert enrolled.seeds == ("10.0.0.1:7946",)
            assert newcomer.gossip_key() == founder.gossip_key()
            hosts = rig.snapshot.registry.hosts
            assert (hosts["p1"], hosts["h2"].serial) == (founder.host(), newcomer.host().serial)

            await keep_authority(newcomer, rig.leader.call, SystemClock(), SystemEntropy())
            assert newcomer.private_key() == founder.private_key()

            new_key = certificates.new_key()
            renewed = await rig.leader.call(
                Renew(
                    peer_id="h2",
                    csr=certificates.request(new_key),
                    key_sha256=certificates.key_sha256(new_key),
                    addresses=newcomer.credentials().addresses,
                )
            )
            credentials = newcomer.renewed(new_key, renewed.certificate)
            assert credentials.addresses == ("127.0.0.1",)

            other = TlsNetwork("127.0.0.1:0", credentials)
            connection = await other.dial("p1", net.address)
            assert await connection.receive() == b"hello h2"
            revocation = await rig.leader.call(RevokeHost(name="h2"))
            assert revocation.serials == (enrolled_serial(enrolled.certificate), credentials.subject.serial)
            with pytest.raises(Unavailable):
                await connection.receive()
            with pytest.raises(Unavailable, match="revoked"):
                await other.dial("p1", net.address)
            with pytest.raises(Unauthorized):  # with the same token, under the same name
                await enrolment.join("127.0.0.1", port, token, peer_id="h2", key_pem=key, now=time.time())
            other.close()


def enrolled_serial(certificate_pem: str) -> str:
    return certificates.subject_of(certificates.der_of(certificate_pem)).serial


@asynccontextmanager
async def _serving(rig: Rig, files: ClusterFiles) -> AsyncIterator[TlsNetwork]:
    """The leader's listener, which does as a peer of a cluster does."""
    server = EnrolmentServer(files.ca_pem(), rig.leader.call, SystemClock())
    network = TlsNetwork("127.0.0.1:0", files.credentials(), enrol=server.serve)
    rig.leader.on_shared = lambda: network.revoke([each.peer_id for each in rig.leader.revoked()])

    async def accept(connection: Connection) -> None:
        await connection.send(b"hello " + connection.peer_id.encode())
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(network.listen, accept)
        yield network
        nursery.cancel_scope.cancel()
    network.close()
