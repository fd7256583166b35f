"""Real etcd members that come and go as a leader's care for voters says, on one machine."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from peer import voters as keeping
from peer.adapters.clock import SystemClock
from peer.adapters.links import certificates
from peer.adapters.links.certificates import Authority
from peer.adapters.stores.etcd_member import Certificates
from peer.adapters.stores.etcd_voting import ASIDE, DATA, FILE, EtcdVoting, ExternalVoting
from peer.decide.voters import Bounds
from peer.errors import Ambiguous, ConfigError, Conflict, Unavailable
from peer.ports import Put, Store
from peer.state.enrol import CERTIFICATE_S, Grant
from peer.state.snapshot import Snapshot
from peer.state.voter import LinkedPeer, Seat
from peer.voters import VoterKeeper
from simulations.world.host import POLICY
from tests.contracts.etcd import free_port, needs_etcd
from tests.contracts.model import put, values

pytestmark = needs_etcd

WAIT_S = 60.0  # on a busy host; etcd alone waits 5 s between two changes
BOUNDS = Bounds(dead_s=2.0, pair_s=30.0, start_s=30.0, steady_s=0.2)


class Host:
    """One host's part in the store, and whether its peer is linked to the leader."""

    def __init__(self, folder: Path, name: str, certified: Certificates | None = None) -> None:
        self.folder = folder / name
        self.name = name
        self.address = f"127.0.0.1:{free_port()}"
        self.certified = certified
        self.store: Store | None = None
        self.scope = trio.CancelScope()
        self.over = trio.Event()
        self.voting = self.build()

    def build(self) -> EtcdVoting:
        return EtcdVoting(
            self.folder,
            self.name,
            self.address,
            certificates=self.certified,
            token="test",
            heartbeat_ms=50,
            election_ms=500,
            backoff_s=(0.1,),
        )

    def begin(self, store: Store) -> None:
        assert self.store is None
        self.store = store

    async def end(self) -> None:
        self.store = None

    async def live(self) -> None:
        with self.scope:
            await self.voting.run(self.begin, self.end)
        self.over.set()

    async def stop(self) -> None:
        self.scope.cancel()
        await self.over.wait()


class Cluster:
    """Implements keeping.Peers, for a leader on the first host."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.hosts: dict[str, Host] = {}
        self.linked: dict[str, LinkedPeer] = {}
        self.snapshot = Snapshot(
            cluster_id="test", peer_id="h1", epoch=1, started_at=0.0, policy=POLICY, catalogue={}
        )

    def start(self, host: Host) -> None:
        self.hosts[host.name] = host
        host.scope, host.over = trio.CancelScope(), trio.Event()
        host.voting = host.build()
        self._nursery.start_soon(host.live)
        self.linked[host.name] = LinkedPeer(
            peer_id=host.name, address=host.voting.address, seat=host.voting.seat
        )

    async def stop(self, name: str) -> None:
        del self.linked[name]
        await self.hosts[name].stop()

    def lead(self, bounds: Bounds = BOUNDS) -> None:
        keeper = VoterKeeper(self.snapshot, self.hosts["h1"].voting, self, SystemClock(), bounds, still_leads)
        self._nursery.start_soon(keeper.run)

    def vote(self, peer_id: str, seat: Seat) -> None:
        if peer_id in self.linked:
            self.hosts[peer_id].voting.join(seat)
            self._seat(peer_id, seat.member_id)

    def unvote(self, peer_id: str, reason: str) -> None:
        if peer_id in self.linked:
            self.hosts[peer_id].voting.leave(reason)
            self._seat(peer_id, 0)

    def _seat(self, peer_id: str, member_id: int) -> None:
        address = self.hosts[peer_id].address
        self.linked[peer_id] = LinkedPeer(peer_id=peer_id, address=address, seat=member_id)

    def shown(self) -> list[str]:
        return [each.peer_id + "+" * each.linked + " learns" * each.learner for each in self.snapshot.voters]

    async def until(self, shown: list[str]) -> None:
        await until(lambda: self.shown() == shown, lambda: f"{self.shown()} instead of {shown}")

    async def write(self, key: str) -> None:
        store = self.hosts["h1"].store
        assert store is not None
        await answered(lambda: put(store, key))


async def until(true: Callable[[], bool], what: Callable[[], str] = lambda: "it is not so") -> None:
    with trio.move_on_after(WAIT_S):
        while not true():  # noqa: ASYNC110 - of processes
            await trio.sleep(0.05)
    assert true(), f"{what()} after {WAIT_S:g} s"


@asynccontextmanager
async def still_leads() -> AsyncIterator[None]:
    await trio.lowlevel.checkpoint()
    yield


async def answered(call: Callable[[], Awaitable[object]]) -> object:
    with trio.fail_after(WAIT_S):
        while True:
            try:
                return await call()
            except (Unavailable, Ambiguous):
                await trio.sleep(0.05)


@asynccontextmanager
async def clustered(
    folder: Path, *names: str, certified: Certificates | None = None, bounds: Bounds = BOUNDS
) -> AsyncIterator[Cluster]:
    """The first host has begun the store, and leads."""
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery)
        try:
            for name in names:
                host = Host(folder, name, certified)
                if name == "h1":
                    host.voting.found()
                cluster.start(host)
            cluster.lead(bounds)
            yield cluster
        finally:
            nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "LOOK_S", 0.2)


async def test_three_hosts_vote_and_a_dead_one_is_replaced_by_a_spare(tmp_path: Path) -> None:
    async with clustered(tmp_path, "h1", "h2", "h3") as cluster:
        await cluster.until(["h1+", "h2+", "h3+"])
        await cluster.write("a")
        assert cluster.snapshot.outlook == "3 voters: any one may be lost"
        # a restart goes on with the same member
        seat = cluster.hosts["h3"].voting.seat
        await cluster.stop("h3")
        await cluster.until(["h1+", "h2+", "h3"])
        cluster.start(cluster.hosts["h3"])
        assert cluster.hosts["h3"].voting.seat == seat
        await cluster.until(["h1+", "h2+", "h3+"])
        await cluster.write("b")
        # one that stays away gives way
        await cluster.stop("h3")
        cluster.start(Host(tmp_path, "h4"))
        await cluster.until(["h1+", "h2+", "h4+"])
        store = cluster.hosts["h4"].store
        assert store is not None
        assert await answered(lambda: values(store)) == {"a": b"v", "b": b"v"}
        # and is none when it is back: its data is put aside, and nothing runs
        back = cluster.hosts["h3"]
        cluster.start(back)
        await until(lambda: not back.voting.seat and not (back.folder / DATA).exists())
        assert not (back.folder / FILE).exists()
        assert (back.folder / ASIDE).is_dir()
        assert back.store is None
        assert cluster.shown() == ["h1+", "h2+", "h4+"]


async def test_two_hosts_stay_one_voter_and_one_learner_which_learns_again_when_it_was_removed(
    tmp_path: Path,
) -> None:
    async with clustered(tmp_path, "h1", "h2", bounds=Bounds(wanted=3, steady_s=0.2)) as cluster:
        await cluster.until(["h1+", "h2+ learns"])
        await cluster.write("a")
        seat = cluster.hosts["h2"].voting.seat
        members = cluster.hosts["h1"].voting.members
        assert members is not None
        await answered(lambda: members.remove(seat))  # by hand: nobody tells the host
        await until(lambda: cluster.hosts["h2"].voting.seat not in (0, seat))
        await cluster.until(["h1+", "h2+ learns"])
        assert "takeover` on h2" in cluster.snapshot.outlook


async def moved(cluster: Cluster, name: str) -> None:
    """Stop it, and start it at another address with the same data."""
    await cluster.stop(name)
    host = cluster.hosts[name]
    host.address = f"127.0.0.2:{free_port('127.0.0.2')}"
    cluster.start(host)


async def test_a_voter_that_is_alone_tells_the_store_of_its_new_address(tmp_path: Path) -> None:
    async with clustered(tmp_path, "h1", bounds=Bounds(wanted=3, steady_s=0.2)) as cluster:
        await cluster.until(["h1+"])
        await cluster.write("a")
        await moved(cluster, "h1")
        cluster.lead(Bounds(wanted=3, steady_s=0.2))
        address = cluster.hosts["h1"].address
        await until(lambda: address in (cluster.hosts["h1"].folder / FILE).read_text())
        members = cluster.hosts["h1"].voting.members
        assert members is not None
        assert [each.address for each in await members.members()] == [address]
        # so others find it
        cluster.start(Host(tmp_path, "h2"))
        await cluster.until(["h1+", "h2+ learns"])
        await cluster.write("b")


async def test_one_of_three_voters_keeps_its_member_at_a_new_address(tmp_path: Path) -> None:
    async with clustered(tmp_path, "h1", "h2", "h3", bounds=Bounds(steady_s=5.0)) as cluster:
        await cluster.until(["h1+", "h2+", "h3+"])
        seat = cluster.hosts["h3"].voting.seat
        await moved(cluster, "h3")
        await cluster.until(["h1+", "h2+", "h3"])
        await cluster.until(["h1+", "h2+", "h3+"])
        assert cluster.hosts["h3"].voting.seat == seat
        store = cluster.hosts["h3"].store
        assert store is not None
        await answered(lambda: put(store, "a"))


async def test_a_member_that_does_not_answer_is_a_problem_until_it_does(tmp_path: Path) -> None:
    async with clustered(tmp_path, "h1") as cluster:
        await cluster.until(["h1+"])
        voting = cluster.hosts["h1"].voting
        assert voting.member is not None
        assert voting.member.child.pid is not None
        os.kill(voting.member.child.pid, signal.SIGSTOP)
        await until(lambda: "has not answered" in voting.problem)
        os.kill(voting.member.child.pid, signal.SIGCONT)
        await until(lambda: not voting.problem)


async def test_members_prove_who_they_are_with_the_clusters_certificates(tmp_path: Path) -> None:
    now = time.time()
    authority = Authority.create(now)
    certified = certificates_of(tmp_path / "pki", authority, now)
    async with clustered(tmp_path, "h1", "h2", certified=certified) as cluster:
        await cluster.until(["h1+", "h2+ learns"])
        foreign = certificates_of(tmp_path / "foreign", Authority.create(now), now)
        address = cluster.hosts["h1"].address
        assert await trio.to_thread.run_sync(members_answer, address, certified, certified)
        assert not await trio.to_thread.run_sync(members_answer, address, certified, foreign)
        assert not await trio.to_thread.run_sync(members_answer, address, certified, None)
        thief = certificates_of(tmp_path / "thief", authority, now, serial="5eed")
        assert await trio.to_thread.run_sync(members_answer, address, certified, thief)
        cluster.hosts["h1"].voting.revoke(["ab", "5eed"])
        assert not await trio.to_thread.run_sync(members_answer, address, certified, thief)
        assert await trio.to_thread.run_sync(members_answer, address, certified, certified)


def members_answer(address: str, trusted: Certificates, shown: Certificates | None) -> bool:
    """Whether a member tells who is in the store to whom shows this certificate."""
    context = ssl.create_default_context(cafile=str(trusted.authority))
    if shown is not None:
        context.load_cert_chain(shown.certificate, shown.key)
    connection = http.client.HTTPSConnection(address, timeout=10.0, context=context)
    try:
        connection.request("GET", "/members")
        return b"clientURLs" in connection.getresponse().read()
    except (ssl.SSLError, ConnectionError):
        return False
    finally:
        connection.close()


def certificates_of(folder: Path, authority: Authority, now: float, serial: str = "1f") -> Certificates:
    """Of all hosts of a test: they are at the same address. Key and certificate are in one file, as on hosts."""
    folder.mkdir()
    key = certificates.new_key()
    grant = Grant(
        cluster="test-cluster",
        peer_id="h1",
        serial=serial,
        key_sha256=certificates.key_sha256(key),
        not_before=now - 60.0,
        not_after=now + CERTIFICATE_S,
        voter=True,
        addresses=("127.0.0.1",),
    )
    (folder / "host.pem").write_text(key + authority.sign(certificates.request(key), grant))
    (folder / "ca.pem").write_text(authority.certificate_pem)
    return Certificates(certificate=folder / "host.pem", key=folder / "host.pem", authority=folder / "ca.pem")


def test_a_store_is_begun_once_and_what_is_damaged_is_said(tmp_path: Path) -> None:
    host = Host(tmp_path, "h1")
    host.voting.found()
    with pytest.raises(Conflict) as refused:
        host.voting.found()
    assert refused.value.code == "store_exists"
    (host.folder / FILE).write_text("{")
    with pytest.raises(ConfigError, match=FILE):
        host.build()


async def test_a_store_that_others_run_is_used_and_not_managed(tmp_path: Path) -> None:
    async with clustered(tmp_path, "h1") as cluster:
        await cluster.until(["h1+"])
        voting = ExternalVoting(f"unix:{cluster.hosts['h1'].folder / 'etcd.sock:0'}")
        begun: list[Store] = []
        ended = trio.Event()

        async def end() -> None:
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(voting.run, begun.append, end)
            await until(lambda: bool(begun))
            await answered(lambda: begun[0].txn((), [Put("a", b"v")]))
            voting.join(Seat(member_id=1, members={}))
            voting.leave("a test")
            assert (voting.address, voting.seat, voting.members) == ("", 0, None)
            nursery.cancel_scope.cancel()
        assert ended.is_set()
        with pytest.raises(Unavailable):
            await begun[0].get(["a"])


async def test_etcd_is_looked_for(tmp_path: Path) -> None:
    assert (await Host(tmp_path, "h1").voting.check()).startswith("3.")
    with pytest.raises(Unavailable, match="/no/such/etcd"):
        await EtcdVoting(tmp_path, "h1", "", program="/no/such/etcd").check()
