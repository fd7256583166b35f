"""What the real network adds to the contract: certificates that do not hold, callers that mean no good, renewal."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from peer import limits
from peer.adapters.links import certificates, tls_network
from peer.adapters.links.certificates import LINK_ALPN, Authority, Credentials
from peer.adapters.links.tls_frames import FrameStream
from peer.adapters.links.tls_network import TlsNetwork
from peer.errors import BadRequest, ConfigError, Unauthorized, Unavailable
from peer.ports import Connection
from tests.adapters.pki import Pki
from tests.contracts.network import ends, frames, send_on, until

DAY_S = 86_400.0


class Rig:
    """A listening peer h2, and what it has accepted."""

    def __init__(self, network: TlsNetwork) -> None:
        self.network = network
        self.accepted: list[Connection] = []

    @property
    def port(self) -> int:
        return int(self.network.address.rpartition(":")[2])

    async def hold(self, connection: Connection) -> None:
        self.accepted.append(connection)
        await trio.sleep_forever()


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@asynccontextmanager
async def listening(credentials: Credentials) -> AsyncIterator[Rig]:
    rig = Rig(TlsNetwork("127.0.0.1:0", credentials))
    async with trio.open_nursery() as nursery:
        await nursery.start(rig.network.listen, rig.hold)
        yield rig
        nursery.cancel_scope.cancel()
    rig.network.close()


async def dial(rig: Rig, credentials: Credentials, peer_id: str = "h2") -> tuple[TlsNetwork, Connection]:
    network = TlsNetwork("127.0.0.1:0", credentials)
    return network, await network.dial(peer_id, rig.network.address)


async def refused(rig: Rig, credentials: Credentials, why: str) -> None:
    with pytest.raises(Unavailable, match=why):
        await dial(rig, credentials)
    assert rig.accepted == []


async def still_serves(rig: Rig, pki: Pki) -> None:
    network, connection = await dial(rig, pki.host("h1"))
    await until(lambda: len(rig.accepted) > 0)
    await connection.send(b"x")
    assert await frames(rig.accepted[-1], 1) == [b"x"]
    network.close()


# ---------------------------------------------------------------- certificates


async def test_tls_13_and_nothing_older(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        context = certificates.trusting(pki.ca_pem)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        transport = await trio.open_tcp_stream("127.0.0.1", rig.port)
        async with trio.SSLStream(transport, context) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.do_handshake()
        await still_serves(rig, pki)


async def test_a_server_of_a_foreign_ca_is_refused(pki: Pki, tmp_path: Path) -> None:
    foreign = Pki(tmp_path)
    async with listening(foreign.host("h2")) as rig:
        await refused(rig, pki.host("h1"), "not of this cluster's CA")


async def test_a_caller_of_a_foreign_ca_is_refused(pki: Pki, tmp_path: Path) -> None:
    foreign = Pki(tmp_path)
    async with listening(pki.host("h2")) as rig:
        await refused(rig, foreign.host("h1", trusts=pki.ca_pem), "did not take this host's certificate")


async def test_another_cluster_of_the_same_ca_is_refused(pki: Pki, tmp_path: Path) -> None:
    other = Pki(tmp_path, "c2", pki.authority)
    async with listening(other.host("h2")) as rig:
        await refused(rig, pki.host("h1"), "of the cluster 'c2', not 'c1'")


async def test_an_expired_certificate_is_refused_on_either_side(pki: Pki) -> None:
    async with listening(pki.host("h2", age_s=31 * DAY_S)) as rig:
        await refused(rig, pki.host("h1"), "does not hold by this host's clock .*expired")
    async with listening(pki.host("h2", age_s=-DAY_S)) as rig:
        await refused(rig, pki.host("h1"), "does not hold by this host's clock .*not yet valid")
    async with listening(pki.host("h2")) as rig:
        await refused(rig, pki.host("h1", age_s=31 * DAY_S), "expired")


async def test_a_caller_without_certificate_is_told_so(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        for alpn, why in ((LINK_ALPN, b"shows no certificate"), ("h2", b"does not speak")):
            context = certificates.trusting(pki.ca_pem)
            context.set_alpn_protocols([alpn])
            transport = await trio.open_tcp_stream("127.0.0.1", rig.port)
            stream = trio.SSLStream(transport, context, https_compatible=True)
            await stream.do_handshake()
            verdict = FrameStream(stream, "h2")
            assert why in await verdict.receive()
            assert await ends_raw(verdict)
        assert rig.accepted == []


async def ends_raw(stream: FrameStream) -> str:
    with pytest.raises(Unavailable) as caught:
        await stream.receive()
    return caught.value.message


async def test_a_revoked_caller_is_refused_and_an_open_one_cut_off(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        mine = pki.host("h1")
        network, connection = await dial(rig, mine)
        other_network, other = await dial(rig, pki.host("h3"))
        await until(lambda: len(rig.accepted) == 2)
        rig.network.revoke({"h1"})
        assert [each.peer_id for each in rig.network._held] == ["h3"]  # at once
        assert await ends(connection) == []
        with pytest.raises(Unavailable, match="refused the connection: h1 has been revoked"):
            await network.dial("h2", rig.network.address)
        await other.send(b"x")
        assert await frames(next(each for each in rig.accepted if each.peer_id == "h3"), 1) == [b"x"]
        other_network.revoke({"h2"})
        with pytest.raises(Unavailable, match="h2 has been revoked"):
            await other_network.dial("h2", rig.network.address)
        assert await ends(other) == []


async def test_one_certificate_is_revoked_by_its_serial(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        lost, kept = pki.host("h1"), pki.host("h1")
        rig.network.revoke((), {lost.subject.serial})
        await refused(rig, lost, "revoked")
        network, _ = await dial(rig, kept)
        network.close()


async def test_a_certificate_is_renewed_under_open_connections(pki: Pki) -> None:
    old, new = pki.host("h2", age_s=20 * DAY_S), pki.host("h2")
    async with listening(old) as rig:
        first_network, first = await dial(rig, pki.host("h1", age_s=20 * DAY_S))
        await until(lambda: len(rig.accepted) == 1)
        rig.network.renew(new)
        first_network.renew(pki.host("h1"))
        second = await first_network.dial("h2", rig.network.address)
        await until(lambda: len(rig.accepted) == 2)
        await first.send(b"first")
        await second.send(b"second")
        assert await frames(rig.accepted[0], 1) + await frames(rig.accepted[1], 1) == [b"first", b"second"]
        serials = [first.serial, second.serial]
        assert serials == [old.subject.serial, new.subject.serial]
        first_network.close()


async def test_the_listener_has_its_own_proof(pki: Pki) -> None:
    """A frame that says otherwise changes nothing: the name is the certificate's."""
    async with listening(pki.host("h2")) as rig:
        network, connection = await dial(rig, pki.host("h9"))
        await connection.send(b"I am h1")
        await until(lambda: len(rig.accepted) == 1)
        assert rig.accepted[0].peer_id == "h9"
        network.close()


# ---------------------------------------------------------------- callers that mean no good


async def test_garbage_is_dropped(pki: Pki) -> None:
    """First bytes of every kind, among them half a real greeting: no crash, and peers are served meanwhile."""
    rng = random.Random(20)
    hello = client_hello()
    async with listening(pki.host("h2")) as rig:
        for number in range(120):
            if number % 3 == 0:
                data = rng.randbytes(rng.randint(0, 600))
            elif number % 3 == 1:
                data = hello[: rng.randint(1, len(hello) - 1)]
            else:
                changed = bytearray(hello)
                for _ in range(rng.randint(1, 8)):
                    changed[rng.randrange(len(changed))] = rng.randrange(256)
                data = bytes(changed)
            stream = await trio.open_tcp_stream("127.0.0.1", rig.port)
            await stream.send_all(data)
            if number % 2:
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await stream.aclose()
        await still_serves(rig, pki)
        await until(lambda: not rig.network._handshakes)
        assert len(rig.accepted) == 1


async def test_a_bug_in_serving_one_caller_ends_no_peer(pki: Pki) -> None:
    served: list[str] = []

    async def accept(connection: Connection) -> None:
        served.append(connection.peer_id)
        if len(served) == 1:
            raise ExceptionGroup("of a nursery", [KeyError("a bug")])
        await connection.send(b"well")

    async with trio.open_nursery() as nursery:
        network = TlsNetwork("127.0.0.1:0", pki.host("h2"))
        await nursery.start(network.listen, accept)
        caller = TlsNetwork("127.0.0.1:0", pki.host("h1"))
        broken = await caller.dial("h2", network.address)
        with pytest.raises(Unavailable):
            await broken.receive()
        assert await (await caller.dial("h2", network.address)).receive() == b"well"
        caller.close()
        nursery.cancel_scope.cancel()
    assert network.connections == 0


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    greeting = certificates.trusting_nobody_yet().wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        greeting.do_handshake()
    return outgoing.read()


async def test_replayed_bytes_of_a_peer_are_dropped(pki: Pki) -> None:
    """What a peer once sent, byte for byte: the keys of a handshake are good for that one."""
    recorded: list[bytes] = []
    async with listening(pki.host("h2")) as rig, trio.open_nursery() as nursery:
        relay = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def pass_on(client: trio.SocketStream) -> None:
            async def up() -> None:
                async for data in client:
                    recorded.append(bytes(data))
                    await server.send_all(data)

            server = await trio.open_tcp_stream("127.0.0.1", rig.port)
            async with server, trio.open_nursery() as both:
                both.start_soon(up)
                async for data in server:
                    await client.send_all(data)

        nursery.start_soon(trio.serve_listeners, pass_on, relay)
        port = relay[0].socket.getsockname()[1]
        network = TlsNetwork("127.0.0.1:0", pki.host("h1"))
        connection = await network.dial("h2", f"127.0.0.1:{port}")
        await connection.send(b"order")
        await until(lambda: len(rig.accepted) == 1)
        assert await frames(rig.accepted[0], 1) == [b"order"]
        stream = await trio.open_tcp_stream("127.0.0.1", rig.port)
        await stream.send_all(b"".join(recorded))
        with trio.move_on_after(1.0):
            while await stream.receive_some():
                pass
        assert len(rig.accepted) == 1
        await stream.aclose()
        network.close()
        nursery.cancel_scope.cancel()
    relay[0].socket.close()


async def test_who_does_not_shake_hands_is_dropped_in_time(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_network, "HANDSHAKE_S_MAX", 0.5)
    async with listening(pki.host("h2")) as rig:
        slow = await trio.open_tcp_stream("127.0.0.1", rig.port)
        hello = client_hello()
        with trio.fail_after(10.0), pytest.raises((trio.BrokenResourceError, OSError)):
            await drip(slow, hello)
        await slow.aclose()
        await still_serves(rig, pki)


async def drip(stream: trio.SocketStream, data: bytes) -> None:
    for number in range(len(data)):
        await stream.send_all(data[number : number + 1])
        await trio.sleep(0.01)


async def test_too_many_slow_callers_keep_no_peer_out(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_network, "HANDSHAKES_MAX", 8)
    async with listening(pki.host("h2")) as rig:
        slow = [await trio.open_tcp_stream("127.0.0.1", rig.port) for _ in range(30)]
        await until(lambda: len(rig.network._handshakes) == 8)
        await still_serves(rig, pki)
        assert len(rig.network._handshakes) <= 8
        for stream in slow:
            await stream.aclose()


async def test_a_peers_connections_are_bounded(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_network, "CONNECTIONS_PER_PEER_MAX", 2)
    monkeypatch.setattr(tls_network, "CONNECTIONS_MAX", 3)
    async with listening(pki.host("h2")) as rig:
        network, _ = await dial(rig, pki.host("h1"))
        await network.dial("h2", rig.network.address)
        with pytest.raises(Unavailable, match="h1 has 2 connections open"):
            await network.dial("h2", rig.network.address)
        third, _ = await dial(rig, pki.host("h3"))
        with pytest.raises(Unavailable, match="3 connections"):
            await dial(rig, pki.host("h4"))
        third.close()
        network.close()


async def test_a_frame_too_large_is_not_read(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        network, connection = await dial(rig, pki.host("h1"))
        await until(lambda: len(rig.accepted) == 1)
        raw = connection._frames.stream
        await raw.send_all((limits.FRAME_BYTES_MAX + 1).to_bytes(4, "big") + b"x" * 100_000)
        with pytest.raises(Unavailable, match="announced a frame of 8388609 bytes"):
            await rig.accepted[0].receive()
        assert await ends(connection) == []
        network.close()


async def test_a_frame_too_large_is_not_sent_and_the_next_is(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        network, connection = await dial(rig, pki.host("h1"))
        with pytest.raises(Unavailable, match="too large"):
            await connection.send(bytes(limits.FRAME_BYTES_MAX + 1))
        await connection.send(b"x")
        await until(lambda: len(rig.accepted) == 1)
        assert await frames(rig.accepted[0], 1) == [b"x"]
        network.close()


async def test_an_end_within_a_frame_is_told(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        network, connection = await dial(rig, pki.host("h1"))
        await until(lambda: len(rig.accepted) == 1)
        raw = connection._frames.stream
        await raw.send_all((100).to_bytes(4, "big") + b"half")
        await connection.aclose()
        with pytest.raises(Unavailable, match="ended the connection in the middle of a frame"):
            await rig.accepted[0].receive()
        network.close()


async def test_a_send_cancelled_half_way_breaks_the_connection(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        network, connection = await dial(rig, pki.host("h1"))
        with trio.move_on_after(0.2):
            await send_on(connection, bytes(1_000_000))
        with pytest.raises(Unavailable, match="given up in the middle of a frame"):
            await connection.send(b"x")
        with pytest.raises(Unavailable, match="given up in the middle of a frame"):
            await connection.receive()
        assert network.connections == 0


async def test_to_send_to_who_has_gone_fails(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        network, connection = await dial(rig, pki.host("h1"))
        await until(lambda: len(rig.accepted) == 1)
        await rig.accepted[0].aclose()
        with trio.fail_after(5.0):
            await send_on(connection, b"x")
        assert network.connections == 0


async def test_sockets_are_tuned(pki: Pki) -> None:
    async with listening(pki.host("h2")) as rig:
        network, connection = await dial(rig, pki.host("h1"))
        await until(lambda: len(rig.accepted) == 1)
        for side in (connection, rig.accepted[0]):
            sock = side._frames.stream.transport_stream.socket
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        network.close()


async def test_addresses_that_are_none(pki: Pki) -> None:
    network = TlsNetwork("127.0.0.1:0", pki.host("h1"))
    for address in ("", "nonsense", "1.2.3.4", "::1:80"):
        with pytest.raises(Unavailable, match="cannot be reached"):
            await network.dial("h2", address)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Unavailable, match="Connection refused"):
        await network.dial("h2", f"127.0.0.1:{port}")


# ---------------------------------------------------------------- certificates as such


def test_damaged_files_are_named(pki: Pki, tmp_path: Path) -> None:
    file = tmp_path / "x.pem"
    with pytest.raises(ConfigError, match=r"x\.pem"):
        Credentials.load(file, pki.ca_pem)
    for text in ("", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", pki.authority.pem):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"x\.pem"):
            Credentials.load(file, pki.ca_pem)
    good = pki.host("h1")
    lacks_key = good.file.read_text()
    file.write_text(lacks_key[lacks_key.index("-----BEGIN CERT") :])
    with pytest.raises(ConfigError, match=r"x\.pem"):
        TlsNetwork("127.0.0.1:0", Credentials.load(file, pki.ca_pem))
    with pytest.raises(ConfigError, match="do not belong together"):
        Authority(certificates.new_key() + pki.ca_pem)


def test_an_authority_signs_what_was_granted_only(pki: Pki) -> None:
    key, other = certificates.new_key(), certificates.new_key()
    grant = pki.grant("h1", certificates.key_sha256(key))
    with pytest.raises(BadRequest, match="another key"):
        pki.authority.sign(certificates.request(other), grant)
    csr = certificates.request(key)
    lines = csr.splitlines()
    lines[-2] = lines[-2][:4] + ("A" if lines[-2][4] != "A" else "B") + lines[-2][5:]
    for damaged in ("", "x", "\n".join(lines)):
        with pytest.raises(BadRequest, match="certificate request"):
            pki.authority.sign(damaged, grant)
    certificate = pki.authority.sign(csr, grant)
    assert certificates.subject_of(certificates.der_of(certificate))[:2] == ("c1", "h1")
    again = Authority(pki.authority.pem)
    assert certificates.ca_sha256(again.certificate_pem) == pki.ca_sha256


def test_names_of_every_kind_are_read_back(tmp_path: Path) -> None:
    for cluster in ("c", "my cluster/1", "ü:@?#%2f", "x" * 128):
        pki = Pki(tmp_path, cluster)
        key = certificates.new_key()
        certificate = pki.authority.sign(
            certificates.request(key), pki.grant("a.b_c-1", certificates.key_sha256(key))
        )
        assert certificates.subject_of(certificates.der_of(certificate))[:2] == (cluster, "a.b_c-1")


def test_what_names_no_peer_is_refused(pki: Pki) -> None:
    for der in (b"", b"x" * 100, certificates.der_of(pki.ca_pem)):
        with pytest.raises(Unauthorized, match="names no peer"):
            certificates.subject_of(der)
