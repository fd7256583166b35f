"""How a host gets in over the wire, and how others do not: the secret is sent to the token's cluster only."""

from __future__ import annotations

import random
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from peer.adapters.links import certificates, enrolment
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.links.own_addresses import own_names
from peer.adapters.links.tls_frames import FrameStream
from peer.adapters.links.tls_network import TlsNetwork
from peer.decide import enrol as decide
from peer.errors import (
    BadRequest,
    BitinglipError,
    Conflict,
    RateLimited,
    Unauthorized,
    Unavailable,
)
from peer.state import enrol as records
from peer.state.enrol import CERTIFICATE_S, Enrol, Enrolled, RevokeHost
from tests.adapters.joining import ID, SECRET, Leader, serving
from tests.adapters.pki import Pki


class ManualClock:
    """Goes on when told."""

    def __init__(self) -> None:
        self.at = time.time()

    def now(self) -> float:
        return self.at

    def wall(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nobody waits here")

    def advance(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def manual_clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def founded(tmp_path: Path) -> ClusterFiles:
    files = ClusterFiles(tmp_path / "h1")
    files.folder.parent.mkdir()
    files.found("c1", "h1", ("127.0.0.1",), time.time())
    return files


@pytest.fixture
def newcomer(tmp_path: Path) -> ClusterFiles:
    (tmp_path / "h2").mkdir()
    return ClusterFiles(tmp_path / "h2")


async def ask(leader: Leader, token: str, peer_id: str = "h2", key: str = "", **more: Any) -> Enrolled:
    more.setdefault("now", time.time())
    key = key or certificates.new_key()
    return await enrolment.join("127.0.0.1", leader.port, token, peer_id=peer_id, key_pem=key, **more)


async def refused(kind: type[BitinglipError], code: str, leader: Leader, token: str, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        await ask(leader, token, **more)
    assert caught.value.code == code
    return caught.value.message


# ---------------------------------------------------------------- joining


async def test_a_host_joins_and_is_a_peer_then(founded: ClusterFiles, newcomer: ClusterFiles) -> None:
    async with serving(Leader(founded)) as leader:
        key = newcomer.pending_key()
        newcomer.joined(key, await ask(leader, leader.token(), key=key))
        belonging = newcomer.belonging()
        assert belonging is not None
        assert (belonging.cluster, belonging.peer_id, belonging.voter) == ("c1", "h2", True)
        assert belonging.seeds == (leader.network.address,)
        assert newcomer.gossip_key() == founded.gossip_key()
        assert newcomer.authority() is None
        assert newcomer.credentials().addresses == ("127.0.0.1", *await own_names())
        network = TlsNetwork("127.0.0.1:0", newcomer.credentials())
        connection = await network.dial("h1", leader.network.address)
        assert await connection.receive() == b"hello h2"
        network.close()


async def test_files_are_private(founded: ClusterFiles, newcomer: ClusterFiles) -> None:
    newcomer.pending_key()
    for folder in (founded.folder, newcomer.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        files = [file for file in folder.iterdir() if file.is_file()]
        assert files
        for file in files:
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_who_got_no_answer_asks_again_with_the_same_key(
    founded: ClusterFiles, newcomer: ClusterFiles
) -> None:
    async with serving(Leader(founded)) as leader:
        token = leader.token()
        await ask(leader, token, key=newcomer.pending_key())  # and it dies before it has written that down
        again = await ask(leader, token, key=ClusterFiles(newcomer.folder.parent).pending_key())
        newcomer.joined(newcomer.pending_key(), again)
        assert newcomer.credentials().subject.serial == "2"
        with pytest.raises(Conflict, match="in the cluster 'c1' already"):
            newcomer.pending_key()


async def test_a_used_token_is_no_good_to_others(founded: ClusterFiles) -> None:
    async with serving(Leader(founded)) as leader:
        token = leader.token()
        await ask(leader, token)
        message = await refused(Unauthorized, "join_token_used", leader, token, peer_id="h3")
        assert "used by h2" in message
        await refused(Unauthorized, "join_token_used", leader, token)  # the name alone is not enough


async def test_an_expired_token_is_refused(founded: ClusterFiles, manual_clock: Any) -> None:
    async with serving(Leader(founded, manual_clock)) as leader:
        token = leader.token(ttl_s=60.0)
        manual_clock.advance(61.0)
        await refused(Unauthorized, "join_token_expired", leader, token)


async def test_a_forged_token_is_refused(founded: ClusterFiles) -> None:
    async with serving(Leader(founded)) as leader:
        token = leader.token()
        ca = token.rpartition("_")[2]
        wrong = await refused(Unauthorized, "join_token_invalid", leader, f"blj_{ID}_{'0' * 32}_{ca}")
        unknown = await refused(Unauthorized, "join_token_invalid", leader, f"blj_{'0' * 12}_{SECRET}_{ca}")
        assert wrong == unknown
        await refused(BadRequest, "invalid_request", leader, "blk_" + token[4:])


async def test_a_name_in_use_and_a_revoked_one_are_refused(founded: ClusterFiles) -> None:
    async with serving(Leader(founded)) as leader:
        token = leader.token()
        await ask(leader, token)
        leader.registry.tokens.clear()
        await refused(Conflict, "name_in_use", leader, leader.token())
        leader.take(decide.revoke(leader.registry, time.time(), RevokeHost(name="h2"), leader="h1"))
        await refused(Unauthorized, "host_revoked", leader, token)
        await refused(BadRequest, "invalid_request", leader, token, peer_id="a b")
        leader.registry.tokens.clear()
        await refused(Conflict, "name_in_use", leader, leader.token(), peer_id="h1")  # who made the cluster


async def test_a_clock_that_is_wrong_is_told(founded: ClusterFiles) -> None:
    async with serving(Leader(founded)) as leader:
        message = await refused(
            Unauthorized, "clock_skew", leader, leader.token(), now=time.time() - 2 * CERTIFICATE_S
        )
        assert "set the clock right" in message


async def test_a_host_that_lets_nobody_in(founded: ClusterFiles) -> None:
    leader = Leader(founded)
    token = leader.token()
    leader.network = TlsNetwork("127.0.0.1:0", founded.credentials())
    async with serving(leader):
        await refused(Unavailable, "link_broken", leader, token)


# ---------------------------------------------------------------- men in the middle


class Impostor:
    """Answers under the enrolment protocol with certificates of its own, and notes what it is sent."""

    def __init__(self, pki: Pki, shows_ca: str) -> None:
        self.context = pki.host("h1").server_context()
        self.shows_ca = certificates.der_of(shows_ca)
        self.heard: list[bytes] = []
        self.port = 0

    async def serve(self, transport: trio.SocketStream) -> None:
        stream = trio.SSLStream(transport, self.context, server_side=True, https_compatible=True)
        frames = FrameStream(stream, "victim")
        with suppress(trio.BrokenResourceError, Unavailable):
            await stream.do_handshake()
            await frames.send(self.shows_ca)
            while True:
                self.heard.append(await frames.receive())


@asynccontextmanager
async def posing(impostor: Impostor) -> AsyncIterator[Impostor]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    impostor.port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, impostor.serve, listeners)
        yield impostor
        nursery.cancel_scope.cancel()
    for listener in listeners:
        listener.socket.close()


@pytest.mark.parametrize("shows_the_right_ca", [False, True])
async def test_another_ca_never_gets_the_secret(
    founded: ClusterFiles, tmp_path: Path, shows_the_right_ca: bool
) -> None:
    """Also one that shows the right CA's certificate, which is no secret, and has none of its."""
    foreign = Pki(tmp_path)
    impostor = Impostor(foreign, founded.ca_pem() if shows_the_right_ca else foreign.ca_pem)
    async with posing(impostor):
        token = records.token_text(ID, SECRET, certificates.ca_sha256(founded.ca_pem()))
        with pytest.raises(Unauthorized, match="secret was not sent") as caught:
            await enrolment.join(
                "127.0.0.1",
                impostor.port,
                token,
                peer_id="h2",
                key_pem=certificates.new_key(),
                now=time.time(),
            )
        assert caught.value.code == "wrong_ca"
    assert impostor.heard == []


async def test_a_clock_that_is_far_off_is_told_before_the_secret(
    founded: ClusterFiles, tmp_path: Path
) -> None:
    authority = founded.authority()
    assert authority is not None
    impostor = Impostor(Pki(tmp_path, authority=authority), founded.ca_pem())
    impostor.context = Pki(tmp_path, authority=authority).host("h1", age_s=40 * 86_400).server_context()
    token = records.token_text(ID, SECRET, certificates.ca_sha256(founded.ca_pem()))
    async with posing(impostor):
        with pytest.raises(Unauthorized, match="set the clocks right") as caught:
            await enrolment.join(
                "127.0.0.1",
                impostor.port,
                token,
                peer_id="h2",
                key_pem=certificates.new_key(),
                now=time.time(),
            )
    assert caught.value.code == "clock_skew"
    assert impostor.heard == []


async def test_a_ca_that_is_garbage_is_refused(founded: ClusterFiles, tmp_path: Path) -> None:
    impostor = Impostor(Pki(tmp_path), founded.ca_pem())
    token = records.token_text(ID, SECRET, certificates.ca_sha256(founded.ca_pem()))
    for garbage in (b"", b"x" * 1_000, impostor.shows_ca[:-1]):
        impostor.shows_ca = garbage
        async with posing(impostor):
            with pytest.raises(Unauthorized, match="CA's certificate"):
                await enrolment.join(
                    "127.0.0.1",
                    impostor.port,
                    token,
                    peer_id="h2",
                    key_pem=certificates.new_key(),
                    now=time.time(),
                )
    assert impostor.heard == []


async def test_what_answers_is_no_peer(founded: ClusterFiles) -> None:
    token = records.token_text(ID, SECRET, certificates.ca_sha256(founded.ca_pem()))
    heard: list[bytes] = []

    async def web_server(stream: trio.SocketStream) -> None:
        heard.append(bytes(await stream.receive_some()))
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, web_server, listeners)
        with pytest.raises(Unavailable, match="no peer's link port"):
            await enrolment.join("127.0.0.1", port, token, peer_id="h2", key_pem="", now=0.0)
        nursery.cancel_scope.cancel()
    listeners[0].socket.close()
    assert SECRET.encode() not in b"".join(heard)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await enrolment.join("127.0.0.1", port, token, peer_id="h2", key_pem="", now=0.0)


# ---------------------------------------------------------------- callers that mean no good


async def raw(leader: Leader) -> FrameStream:
    """A connection under the enrolment protocol that has got the CA."""
    transport = await trio.open_tcp_stream("127.0.0.1", leader.port)
    context = certificates.trusting_nobody_yet()
    stream = trio.SSLStream(transport, context, https_compatible=True)
    await stream.do_handshake()
    frames = FrameStream(stream, "h1")
    assert await frames.receive() == certificates.der_of(leader.files.ca_pem())
    return frames


async def test_garbage_never_reaches_the_leader(
    founded: ClusterFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "TRIES_MAX", 1_000)
    monkeypatch.setattr(enrolment, "TRIES_ALL_MAX", 1_000)
    rng = random.Random(4)
    key = certificates.new_key()
    good = msgspec.msgpack.encode(
        enrolment.Ask(token_id=ID, secret=SECRET, peer_id="h2", csr=certificates.request(key))
    )
    async with serving(Leader(founded)) as leader:
        token = leader.token()
        for number in range(40):
            frames = await raw(leader)
            noise = rng.randbytes(rng.randint(0, 300))
            await frames.send(noise if number % 2 else good[: rng.randrange(len(good))])
            answer = enrolment._answer(await frames.receive())
            assert isinstance(answer, enrolment.Refused)
            assert answer.kind == "BadRequest"
            frames.end("enough")
        assert leader.asked == []
        huge = await raw(leader)
        await huge.stream.send_all((1 << 31).to_bytes(4, "big") + b"x" * 1_000)
        with pytest.raises(Unavailable):
            await huge.receive()
        await ask(leader, token, key=key)


async def test_guesses_are_few(founded: ClusterFiles, manual_clock: Any) -> None:
    async with serving(Leader(founded, manual_clock)) as leader:
        token = leader.token()
        ca = token.rpartition("_")[2]
        for number in range(enrolment.TRIES_MAX):
            guess = f"blj_{ID}_{number:032x}_{ca}"
            await refused(Unauthorized, "join_token_invalid", leader, guess)
        await refused(RateLimited, "rate_limited", leader, token)
        assert len(leader.asked) == enrolment.TRIES_MAX
        manual_clock.advance(enrolment.TRIES_S)
        await ask(leader, token, now=manual_clock.wall() + 1)


async def test_what_is_in_time_counts_not(founded: ClusterFiles) -> None:
    async with serving(Leader(founded)) as leader:
        token, key = leader.token(), certificates.new_key()
        for _ in range(enrolment.TRIES_MAX + 2):
            await ask(leader, token, key=key)


def test_tries_count_by_network(manual_clock: Any) -> None:
    tries = enrolment._Tries(manual_clock)
    for number in range(enrolment.TRIES_MAX):
        with pytest.raises(Unauthorized), tries.of(f"fe80::{number}%eth0"):
            raise Unauthorized("no")
    with pytest.raises(RateLimited):
        tries.of("fe80::ffff")
    tries.of("fe80:0:0:1::1")
    tries.of("10.0.0.1")


async def test_who_asks_nothing_keeps_nobody_out(
    founded: ClusterFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "ASKING_MAX", 4)
    async with serving(Leader(founded)) as leader:
        idle = [await raw(leader) for _ in range(10)]
        await ask(leader, leader.token())
        for frames in idle:
            frames.end("enough")


async def test_who_asks_nothing_is_dropped_in_time(
    founded: ClusterFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "ASK_S_MAX", 0.1)
    async with serving(Leader(founded)) as leader:
        frames = await raw(leader)
        with trio.fail_after(2.0), pytest.raises(Unavailable):
            await frames.receive()


async def test_without_a_leader_it_says_so(founded: ClusterFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader(founded)

    async def nobody(_: Enrol) -> Enrolled:
        raise Unavailable("no leader", retry_after_s=1.0)

    leader.server._admit = nobody
    async with serving(leader):
        await refused(Unavailable, "unavailable", leader, leader.token())
