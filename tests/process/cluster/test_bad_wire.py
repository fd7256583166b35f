"""Strangers at the ports of a peer that runs: refused, with a line in its log, and it goes on as it was."""

from __future__ import annotations

import random
import shutil
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import psutil
import pytest
import trio

from peer.adapters.links import certificates
from peer.adapters.links.certificates import LINK_ALPN
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.links.tls_network import TlsNetwork
from peer.errors import Unavailable
from tests.process.cluster import faults
from tests.process.cluster.cluster import Cluster, cluster
from tests.process.cluster.hosts import unusable
from tests.process.cluster.member import GOSSIP, LINK, STORE, Member
from tests.process.peers import poll

pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(unusable()), reason=unusable())]

SEED = 7
CALLERS = 300
GROWTH_BYTES_MAX = 16 * 1024 * 1024
CONNECT_S_MAX = 3.0
TOKEN_S = 60  # the shortest that there is
ABORT = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two peers."""
    with cluster(tmp_path_factory.mktemp("two"), 2) as made:
        yield made


@pytest.fixture(scope="module")
def expiring(two: Cluster) -> tuple[str, float]:
    """A token, and when it is of no use any more."""
    token = two.members[0].bitinglip("token", "--expires", f"{TOKEN_S}s")["token"]
    return token, time.monotonic() + TOKEN_S + 1.0


@pytest.fixture
def peer(two: Cluster, expiring: tuple[str, float]) -> Iterator[Member]:
    """The first one; after the test it is the same process, with its children, and serves."""
    member = two.members[0]
    before = processes(member)
    yield member
    assert processes(member) == before, "something has died"
    assert two.submits(member)
    two.settle()
    two.check()


@pytest.fixture
def stranger(two: Cluster) -> Iterator[Member]:
    """Another host's folder, which is in no cluster yet. The host is a real one of the network."""
    host = two.net.hosts[-1] if len(two.net.hosts) > len(two.members) else two.net.add()
    shutil.rmtree(host.seen(host.disk / "data"), ignore_errors=True)
    member = Member(host)
    member.prepare()
    yield member
    assert not member.runs


def processes(member: Member) -> dict[str, list[int]]:
    roles: tuple[faults.Role, ...] = ("peer", "engine", "serf", "etcd")
    return {role: [process.pid for process in faults.having(member.host, role)] for role in roles}


def logged(member: Member, event: str, **fields: str) -> Callable[[], bool]:
    """Whether a line of this event has each of these texts in its field."""

    def found() -> bool:
        lines = (line for line in member.log_lines() if line.get("event") == event)
        return any(all(text in str(line.get(name)) for name, text in fields.items()) for line in lines)

    return found


def garbage(chance: random.Random, number: int) -> bytes:
    """Bytes of every kind: noise, half a TLS greeting, a greeting with noise in it, an HTTP request."""
    hello = client_hello()
    match number % 4:
        case 0:
            return chance.randbytes(chance.randint(0, 4_000))
        case 1:
            return hello[: chance.randint(1, len(hello) - 1)]
        case 2:
            changed = bytearray(hello)
            for _ in range(chance.randint(1, 8)):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            return bytes(changed)
    return b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n" + chance.randbytes(64)


@cache
def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols([LINK_ALPN])
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="h1").do_handshake()
    return outgoing.read()


def throw(member: Member, port: int, count: int) -> None:
    """Garbage of so many callers. Every other one breaks its connection off, the rest end it."""
    chance = random.Random(SEED)
    for number in range(count):
        with socket.create_connection((member.host.address, port), timeout=CONNECT_S_MAX) as connection:
            with suppress(OSError):  # it has hung up already
                connection.sendall(garbage(chance, number))
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)


def rss(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


@pytest.mark.parametrize(("port", "role"), [(LINK, "peer"), (GOSSIP, "serf"), (STORE, "etcd")])
def test_garbage_is_dropped_and_memory_stays(peer: Member, port: int, role: faults.Role) -> None:
    process = faults.having(peer.host, role)[0]
    throw(peer, port, CALLERS)
    before = rss(process)
    throw(peer, port, CALLERS)
    grown = rss(process) - before
    assert grown < GROWTH_BYTES_MAX, f"{grown} bytes more after {CALLERS} callers"
    if role == "peer":
        poll("it says so", logged(peer, "caller_refused", why="no TLS handshake"))


def test_gossip_takes_no_packets_of_strangers(peer: Member, two: Cluster) -> None:
    chance = random.Random(SEED)
    process = faults.having(peer.host, "serf")[0]
    before = rss(process)
    with socket.socket(type=socket.SOCK_DGRAM) as out:
        for _ in range(2_000):
            out.sendto(chance.randbytes(chance.randint(1, 1_400)), (peer.host.address, GOSSIP))
    poll("it says so", logged(peer, "serf_log", message="memberlist"))
    assert rss(process) - before < GROWTH_BYTES_MAX
    found = two.get(peer, "/workers")
    assert found is not None
    assert found["online"] == 2


class Tap:
    """A relay to a peer's link that keeps what the callers say."""

    def __init__(self, member: Member) -> None:
        self.said: list[bytes] = []
        self._member = member
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            caller, _ = self._server.accept()
            target = (self._member.host.address, LINK)
            with caller, socket.create_connection(target, timeout=CONNECT_S_MAX) as peer:
                back = threading.Thread(target=self._back, args=(peer, caller))
                back.start()
                while data := caller.recv(65_536):
                    self.said.append(data)
                    peer.sendall(data)
                peer.shutdown(socket.SHUT_RDWR)
                back.join(CONNECT_S_MAX)

    def _back(self, peer: socket.socket, caller: socket.socket) -> None:
        with suppress(OSError):
            while data := peer.recv(65_536):
                caller.sendall(data)
            caller.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(CONNECT_S_MAX)


def credentials(member: Member) -> Any:
    return ClusterFiles(member.host.seen(member.data)).credentials()


def dial(files_of: Member, peer_id: str, address: str, *frames: bytes) -> bytes:
    """Call as the host whose files these are; the first frame that is answered. Raises Unavailable."""

    async def call() -> bytes:
        network = TlsNetwork("127.0.0.1:0", credentials(files_of))
        try:
            with trio.fail_after(CONNECT_S_MAX):
                connection = await network.dial(peer_id, address)
                for frame in frames:
                    await connection.send(frame)
                return await connection.receive()
        finally:
            network.close()

    return trio.run(call)


def test_what_a_peer_said_once_is_nothing_worth_again(peer: Member, two: Cluster) -> None:
    tap = Tap(peer)
    try:
        with pytest.raises(Unavailable):  # the peer hangs up on what is no frame of its protocol
            dial(two.members[1], peer.peer_id, tap.address, b"\0 no frame of the link")
    finally:
        tap.close()
    poll("it says so", logged(peer, "caller_not_understood", peer_id=two.members[1].peer_id))
    said = b"".join(tap.said)
    assert len(said) > 1_000  # a greeting, a certificate, a frame
    refusals = sum(1 for line in peer.log_lines() if line.get("event") == "caller_refused")
    understood = sum(1 for line in peer.log_lines() if line.get("event") == "caller_not_understood")

    def refused_again() -> bool:
        """Tried anew while the log is full of others' refusals of the same second: so many are written, and no more."""
        again = socket.create_connection((peer.host.address, LINK), timeout=CONNECT_S_MAX)
        with again as connection, suppress(OSError):
            connection.sendall(said)
            while connection.recv(65_536):
                pass
        return sum(1 for line in peer.log_lines() if line.get("event") == "caller_refused") > refusals

    poll("the same bytes are refused", refused_again, every_s=0.2)
    assert sum(1 for line in peer.log_lines() if line.get("event") == "caller_not_understood") == understood


def test_a_host_of_another_cluster_is_refused(peer: Member, stranger: Member) -> None:
    stranger.bitinglip("init", "--cluster", "other", "--data-dir", str(stranger.data))
    with pytest.raises(Unavailable):
        dial(stranger, peer.peer_id, f"{peer.host.address}:{LINK}")
    poll("it says so", logged(peer, "caller_refused", why="certificate"))


def join(stranger: Member, peer: Member, token: str) -> str:
    """What a host is told that may not join."""
    with pytest.raises(AssertionError) as caught:
        stranger.bitinglip("join", f"{peer.host.address}:{LINK}", "--token", token)
    return str(caught.value)


def test_garbage_of_who_asks_to_join_is_refused(peer: Member) -> None:
    """After a whole handshake: frames of noise, and ends within a frame. The first few are told why, the rest less."""
    chance = random.Random(SEED)
    context = certificates.trusting_nobody_yet()
    for number in range(20):
        address = (peer.host.address, LINK)
        with (
            socket.create_connection(address, timeout=CONNECT_S_MAX) as plain,
            context.wrap_socket(plain) as stream,
        ):
            noise = chance.randbytes(chance.randint(1, 2_000))
            length = len(noise) + (number % 3) * chance.randint(1, 2**20)
            with suppress(OSError):
                stream.sendall(length.to_bytes(4, "big") + noise)
                if length == len(noise):
                    while stream.recv(65_536):
                        pass
    poll("it says so", logged(peer, "enrolment_refused", why="not understood"))


def test_a_forged_token_is_refused(peer: Member, stranger: Member) -> None:
    token = peer.bitinglip("token")["token"]
    kind, token_id, secret, ca = token.split("_")
    forged = "_".join((kind, token_id, secret[::-1], ca))
    assert "token" in join(stranger, peer, forged)
    poll("it says so", logged(peer, "enrolment_refused", code="join_token_invalid"))
    assert "secret was not sent" in join(stranger, peer, "_".join((kind, token_id, secret, ca[::-1])))


def test_a_used_token_and_a_name_in_use_are_refused(peer: Member, stranger: Member, two: Cluster) -> None:
    token = peer.bitinglip("token")["token"]
    stranger.bitinglip("join", f"{peer.host.address}:{LINK}", "--token", token)
    shutil.rmtree(stranger.host.seen(stranger.data))
    stranger.peer_id = "h4"
    stranger.prepare()
    assert "used" in join(stranger, peer, token)
    poll("it says so", logged(peer, "enrolment_refused", code="join_token_used"))

    shutil.rmtree(stranger.host.seen(stranger.data))
    stranger.peer_id = two.members[1].peer_id
    stranger.prepare()
    assert "name" in join(stranger, peer, peer.bitinglip("token")["token"])
    poll("it says so", logged(peer, "enrolment_refused", code="name_in_use"))


def test_a_copy_of_a_host_does_not_take_its_place(peer: Member, stranger: Member, two: Cluster) -> None:
    """The whole folder of a peer that runs, started on another host: it is told, and the cluster stays as it was."""
    original = two.members[1]
    epoch = two.epoch()
    shutil.rmtree(stranger.host.seen(stranger.data))
    kept = shutil.ignore_patterns("*.sock*", "etcd", "serf", "lock", "peer.json")
    shutil.copytree(original.host.seen(original.data), stranger.host.seen(stranger.data), ignore=kept)
    stranger.start()
    try:
        assert stranger.process is not None
        code = stranger.process.wait(30.0)
        assert code != 0
        assert "another member of the cluster is called" in stranger.log_end()
    finally:
        stranger.host.kill_all()
    two.settle()
    assert original.runs
    assert two.epoch() == epoch


def test_an_expired_token_is_refused(peer: Member, stranger: Member, expiring: tuple[str, float]) -> None:
    token, over_at = expiring
    poll("the token has expired", lambda: time.monotonic() > over_at, TOKEN_S + 5.0, 0.5)
    assert "expired" in join(stranger, peer, token)
    poll("it says so", logged(peer, "enrolment_refused", code="join_token_expired"))
    assert not stranger.has("cluster/cluster.json")
