"""What a host keeps of its cluster, and how its certificate is renewed."""

from __future__ import annotations

import base64
import errno
import os
import random
import ssl
import time
import warnings
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509

from peer import identity, ports
from peer.adapters.clock import SystemClock, SystemEntropy
from peer.adapters.links import certificates, renewal
from peer.adapters.links.certificates import Authority, Subject
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.links.renewal import LOOK_S, RETRY_S, due_at, keep_authority, keep_renewed
from peer.errors import BadRequest, ConfigError, Conflict, Unauthorized, Unavailable
from peer.state.enrol import AuthorityKey, Enrolled, GetAuthority, Grant, Renew
from tests.adapters.joining import Leader


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


# ---------------------------------------------------------------- files


def test_a_cluster_is_founded_once(founded: ClusterFiles) -> None:
    with pytest.raises(Conflict, match="in the cluster 'c1' already, as h1"):
        founded.found("c2", "h1", (), time.time())


def test_damaged_files_are_named(founded: ClusterFiles) -> None:
    (founded.folder / "ca.pem").unlink()
    with pytest.raises(ConfigError, match=r"ca\.pem is missing"):
        founded.credentials()
    (founded.folder / "cluster.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cluster\.json is damaged"):
        founded.belonging()


def test_the_cas_key_is_kept_where_it_is_one(founded: ClusterFiles, newcomer: ClusterFiles) -> None:
    join(founded, newcomer)
    newcomer.keep_authority(founded.private_key())
    copied = newcomer.authority()
    assert isinstance(copied, Authority)
    assert copied.certificate_pem == founded.ca_pem()
    with pytest.raises(ConfigError):
        newcomer.keep_authority(founded.ca_pem())
    with pytest.raises(ConfigError, match="another CA"):
        newcomer.keep_authority(Authority.create(time.time()).pem)


def join(founded: ClusterFiles, newcomer: ClusterFiles, *, voter: bool = True) -> None:
    """Let h2 in."""
    key = newcomer.pending_key()
    newcomer.joined(key, founded.issue(certificates.request(key), grant(key, voter=voter), ()))


def grant(key: str, *, voter: bool = True) -> Grant:
    return Grant(
        cluster="c1",
        peer_id="h2",
        serial="2",
        key_sha256=certificates.key_sha256(key),
        not_before=time.time() - 60,
        not_after=time.time() + 60,
        voter=voter,
        addresses=("10.0.0.2", "h2", "fd00::2"),
    )


def test_the_port_of_the_cas(founded: ClusterFiles, newcomer: ClusterFiles) -> None:
    """As the leader sees this host's files."""
    authority: ports.Authority = founded
    assert (authority.ready(), authority.cluster()) == (True, "c1")
    assert authority.ca_sha256() == certificates.ca_sha256(founded.ca_pem())
    assert Authority(authority.private_key()).certificate_pem == founded.ca_pem()
    join(founded, newcomer)
    assert (newcomer.ready(), newcomer.cluster()) == (False, "c1")
    assert newcomer.ca_sha256() == founded.ca_sha256()
    assert newcomer.host().addresses == (
        "10.0.0.2",
        "h2",
        "fd00::2",
    )  # in the order in which they were granted
    with pytest.raises(Unavailable, match="CA's key"):
        newcomer.private_key()


async def test_the_cas_key_is_fetched_until_it_is_here(
    founded: ClusterFiles, newcomer: ClusterFiles, autojump_clock: Any
) -> None:
    join(founded, newcomer)
    asked: list[GetAuthority] = []

    async def ask(query: GetAuthority) -> AuthorityKey:
        asked.append(query)
        if len(asked) == 1:
            raise Unavailable("no leader")
        if len(asked) == 2:
            return AuthorityKey(pem=Authority.create(time.time()).pem)
        return AuthorityKey(pem=founded.private_key())

    with trio.fail_after(60):
        await keep_authority(newcomer, ask, SystemClock(), SystemEntropy())
    assert asked == [GetAuthority(peer_id="h2")] * 3
    assert newcomer.private_key() == founded.private_key()
    await keep_authority(newcomer, ask, SystemClock(), SystemEntropy())
    assert len(asked) == 3


async def test_who_may_not_lead_does_not_ask_for_the_cas_key(
    founded: ClusterFiles, newcomer: ClusterFiles
) -> None:
    async def ask(query: GetAuthority) -> AuthorityKey:
        raise AssertionError(query)

    await keep_authority(newcomer, ask, SystemClock(), SystemEntropy())
    join(founded, newcomer, voter=False)
    await keep_authority(newcomer, ask, SystemClock(), SystemEntropy())
    assert not newcomer.ready()


def test_who_has_not_the_cas_key_signs_nothing(founded: ClusterFiles) -> None:
    key = certificates.new_key()
    enrolled = founded.issue(certificates.request(key), grant(key), ("h1:8001",))
    assert (enrolled.seeds, enrolled.gossip_key) == (("h1:8001",), founded.gossip_key())
    (founded.folder / "authority.pem").unlink()
    with pytest.raises(Unavailable, match="CA's key"):
        founded.issue(certificates.request(key), grant(key), ())


def test_a_host_as_a_record(founded: ClusterFiles, newcomer: ClusterFiles) -> None:
    host, subject = founded.host(), founded.credentials().subject
    assert (host.peer_id, host.voter, host.addresses) == ("h1", True, ("127.0.0.1",))
    assert (host.serial, host.expires_at) == (subject.serial, subject.not_after)
    with pytest.raises(ConfigError):
        newcomer.host()


def test_damaged_requests_and_certificates_are_refused(founded: ClusterFiles) -> None:
    """Whatever comes over the network raises what its readers know, or is still whole."""
    rng = random.Random(7)
    csr = certificates.request(certificates.new_key())
    body = base64.b64decode("".join(csr.splitlines()[1:-1]))
    certificate = certificates.der_of(founded.ca_pem())
    for _ in range(300):
        text = base64.encodebytes(damaged(rng, body)).decode()
        head, foot = csr.splitlines()[0], csr.splitlines()[-1]
        with suppress(BadRequest):
            certificates.requested_key_sha256(f"{head}\n{text}{foot}\n")
        with suppress(Unauthorized), warnings.catch_warnings(action="ignore"):
            certificates.subject_of(damaged(rng, certificate))
        with suppress(Unauthorized), warnings.catch_warnings(action="ignore"):
            certificates.ca_sha256_of(damaged(rng, certificate))


def damaged(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed))
        if rng.random() < 0.5:
            changed[at] = rng.randrange(256)
        else:
            changed[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
    return bytes(changed)


def test_a_revocation_list_for_other_programs(founded: ClusterFiles) -> None:
    authority = founded.authority()
    assert authority is not None
    pem = certificates.revocation_list(authority.pem, ["5eed", "ab"], time.time(), 3_600.0)
    found = x509.load_pem_x509_crl(pem.encode())
    assert [revoked.serial_number for revoked in found] == [0x5EED, 0xAB]
    key = x509.load_pem_x509_certificate(founded.ca_pem().encode()).public_key()
    assert found.is_signature_valid(key)


# ---------------------------------------------------------------- renewal


def test_two_thirds_of_a_life() -> None:
    assert due_at(Subject("c1", "h1", "1", 100.0, 400.0)) == pytest.approx(300.0)


class Clock:
    def __init__(self) -> None:
        self.began = time.time()

    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return self.began + trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


async def test_a_certificate_is_renewed_in_time(founded: ClusterFiles, autojump_clock: Any) -> None:
    """Not before it is due, again after failures, with a new key."""

    clock = Clock()
    leader = Leader(founded, clock)
    first = founded.credentials()
    key = first.file.read_text()
    used: list[tuple[float, str]] = []
    asked: list[float] = []

    async def ask_leader(command: Renew) -> Enrolled:
        asked.append(clock.wall())
        if len(asked) <= 3:
            raise Unavailable("no leader")
        if len(asked) == 4:
            of_another_key = key[key.index("-----BEGIN CERT") :]
            return Enrolled(cluster="c1", peer_id="h1", certificate=of_another_key, ca="", voter=True)
        return await leader.renew(command)

    def use(credentials: certificates.Credentials) -> None:
        used.append((clock.wall(), credentials.subject.serial))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_renewed, founded, use, ask_leader, clock, SystemEntropy())
        with trio.move_on_after(21 * 86_400):
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    due = due_at(first.subject)
    assert 0 <= asked[0] - due <= LOOK_S
    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert len(gaps) == 4
    assert all(RETRY_S[0] <= gap <= RETRY_S[1] for gap in gaps)
    assert [serial for _, serial in used] == ["aa"]
    renewed = founded.credentials()
    assert renewed.subject.serial == "aa"
    assert renewed.addresses == first.addresses
    assert renewed.file.read_text()[:200] != key[:200]
    assert isinstance(renewed.server_context(), ssl.SSLContext)


async def test_a_full_disk_is_waited_for_and_costs_no_certificate(
    founded: ClusterFiles, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that ended over it would come back with the old certificate to the same full disk."""
    clock = Clock()
    leader = Leader(founded, clock)
    due = due_at(founded.credentials().subject)
    full_until = due + 86_400
    asked: list[float] = []
    used: list[str] = []

    async def ask_leader(command: Renew) -> Enrolled:
        asked.append(clock.wall())
        return await leader.renew(command)

    def write(path: Path, content: str) -> None:
        if clock.wall() < full_until:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        identity.write_private(path, content)

    monkeypatch.setattr(renewal, "write_private", write)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            keep_renewed,
            founded,
            lambda credentials: used.append(credentials.subject.serial),
            ask_leader,
            clock,
            SystemEntropy(),
        )
        with trio.move_on_after(due + 2 * 86_400 - clock.wall()):
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    assert len(asked) == 1
    assert full_until <= asked[0] <= full_until + RETRY_S[1]
    assert used == [founded.credentials().subject.serial]
