"""The store over three real members of etcd, some of which are killed, stopped, or lose the leadership."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import trio

from peer.adapters.stores.etcd_client import decoder
from peer.adapters.stores.etcd_store import EtcdStore
from peer.errors import Ambiguous, Fenced, NotFound, Unavailable
from peer.ports import BATCH_KEY, LEADER_KEY, Put
from tests.contracts.etcd import EtcdCluster, EtcdProcess, needs_etcd, running_cluster
from tests.contracts.model import lead, one, put, take, values

pytestmark = needs_etcd

CALL_S = 0.7
PATIENCE_S = 20.0  # on a busy host


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with running_cluster(tmp_path_factory.mktemp("etcd"), 3, heartbeat_ms=50, election_ms=500) as cluster:
        yield cluster


@pytest.fixture
async def cluster(running: EtcdCluster) -> EtcdCluster:
    """All three run and agree, and hold nothing."""
    for member in running.members:
        if member.process is None or member.process.poll() is not None:
            member.start()
        member.signal(signal.SIGCONT)
    leader = running.await_leader()
    store = EtcdStore(leader.address)
    await eventually(
        lambda: store.client.call(
            "kv/deleterange", {"key": b"\0", "range_end": b"\0"}, decoder(dict), writes=True
        )
    )
    await store.aclose()
    return running


class Opened:
    """Stores of one test."""

    def __init__(self) -> None:
        self._stores: list[EtcdStore] = []

    def __call__(self, address: str, call_s_max: float = 2.0) -> EtcdStore:
        self._stores.append(EtcdStore(address, call_s_max=call_s_max))
        return self._stores[-1]

    async def close(self) -> None:
        for store in self._stores:
            await store.aclose()


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    opened = Opened()
    yield opened
    await opened.close()


def followers(cluster: EtcdCluster) -> list[EtcdProcess]:
    leader = cluster.await_leader()
    return [member for member in cluster.members if member is not leader]


async def eventually(call: Callable[[], Awaitable[object]]) -> object:
    """What it returns once the store answers."""
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                return await call()
            except (Unavailable, Ambiguous):
                await trio.sleep(0.05)


# ------------------------------------------------------------------------------------------------ one member


async def test_a_stopped_member_makes_writes_ambiguous_and_reads_unavailable(
    cluster: EtcdCluster, opened: Opened
) -> None:
    member = followers(cluster)[0]
    store, other = opened(member.address, CALL_S), opened(cluster.await_leader().address)
    epoch = await lead(store)
    await store.commit(epoch, [Put("a", b"0")])
    lease = await store.grant(60.0)
    member.signal(signal.SIGSTOP)
    before = trio.current_time()
    with pytest.raises(Unavailable):
        await store.get(["a"])
    with pytest.raises(Ambiguous):
        await store.commit(epoch, [Put("a", b"1")])
    with pytest.raises(Ambiguous):
        await put(store, "b")
    with pytest.raises(Ambiguous):
        await store.keepalive(lease.lease_id)
    assert 4 * CALL_S <= trio.current_time() - before < 4 * CALL_S + 2.0
    # another commits under the same keys; what is under way in the stopped member arrives when it goes on
    member.signal(signal.SIGCONT)
    await eventually(lambda: store.commit(epoch, [Put("a", b"1")]))
    assert await store.commit(epoch, [Put("a", b"2")]) > epoch
    found = await values(other)
    found.pop(
        "b", b""
    )  # applied late or never: etcd drops a request whose client has gone, if it notices in time
    assert found == {LEADER_KEY: b"me", "a": b"2"}


async def test_what_arrives_late_is_refused_by_the_fence(cluster: EtcdCluster, opened: Opened) -> None:
    member = followers(cluster)[0]
    store, other = opened(member.address, CALL_S), opened(cluster.await_leader().address)
    old = await lead(store)
    await store.commit(old, [Put("a", b"0")])
    member.signal(signal.SIGSTOP)
    with pytest.raises(Ambiguous):
        await store.commit(old, [Put("a", b"old")])
    new = await lead(other, b"other")
    await other.commit(new, [Put("a", b"new")])
    member.signal(signal.SIGCONT)
    await eventually(lambda: store.get(["a"]))
    with pytest.raises(Fenced):
        await eventually(lambda: store.commit(old, [Put("a", b"old")]))
    assert (await values(other))["a"] == b"new"


async def test_a_killed_member_refuses_and_is_back(cluster: EtcdCluster, opened: Opened) -> None:
    member = followers(cluster)[0]
    store = opened(member.address, CALL_S)
    first = await put(store, "a")
    async with store.watch("", first + 1) as batches:
        member.kill()
        with pytest.raises(Unavailable):
            await take(batches, 1)
    for call in (lambda: put(store, "b"), lambda: store.get(["a"]), lambda: store.grant(5.0)):
        with pytest.raises(Unavailable):
            await call()  # not sent: nothing is ambiguous
    member.start()
    await eventually(lambda: put(store, "c"))
    assert await values(store) == {"a": b"v", "c": b"v"}


# ------------------------------------------------------------------------------------------------ the leader


async def test_commits_go_on_through_a_follower_while_leaders_are_killed_and_stopped(
    cluster: EtcdCluster, opened: Opened
) -> None:
    """Each batch takes effect once and in order, though some are ambiguous and tried again."""
    mine = followers(cluster)[0]
    store = opened(mine.address, CALL_S)
    epoch = await lead(store)
    committed, unclear, done = 0, 0, trio.Event()

    async def commit() -> None:
        nonlocal committed, unclear
        while not done.is_set():
            try:
                await store.commit(epoch, [Put("n", str(committed + 1).encode())])
                committed += 1
            except (Ambiguous, Unavailable) as error:
                unclear += isinstance(error, Ambiguous)
                await trio.sleep(0.02)

    async def until_it_goes_on() -> None:
        seen = committed
        with trio.fail_after(PATIENCE_S):
            while committed < seen + 20:  # noqa: ASYNC110 - counted elsewhere
                await trio.sleep(0.01)

    def other_leader() -> EtcdProcess | None:
        leader = cluster.leader()
        return leader if leader is not mine else None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit)
        await until_it_goes_on()
        if (leader := other_leader()) is not None:
            leader.kill()
            await until_it_goes_on()
            leader.start()
        cluster.await_leader()
        if (leader := other_leader()) is not None:
            leader.signal(signal.SIGSTOP)
            await until_it_goes_on()
            leader.signal(signal.SIGCONT)
        mine.signal(signal.SIGSTOP)
        with trio.move_on_after(3 * CALL_S):
            await trio.sleep_forever()  # long enough for time-outs
        mine.signal(signal.SIGCONT)
        await until_it_goes_on()
        done.set()
    assert unclear
    async with store.watch("n", epoch + 1) as batches:
        told = [batch.changes[0].value for batch in await take(batches, committed)]
    assert told == [str(number + 1).encode() for number in range(committed)]
    batch = await one(store, BATCH_KEY)
    assert batch is not None
    assert batch.value == f"{epoch}/{committed}".encode()


async def test_without_a_quorum_nothing_is_read_or_written_and_then_it_goes_on(
    cluster: EtcdCluster, opened: Opened
) -> None:
    first, *others = cluster.members
    store = opened(first.address, CALL_S)
    epoch = await lead(store)
    await store.commit(epoch, [Put("a", b"1")])
    for member in others:
        member.kill()
    with pytest.raises(Unavailable):
        await store.get(["a"])
    assert (await store.peek(["a"]))["a"].value == b"1"
    with pytest.raises((Ambiguous, Unavailable)):
        await store.commit(epoch, [Put("a", b"2")])
    for member in others:
        member.start()
    await eventually(lambda: store.commit(epoch, [Put("a", b"2")]))
    assert (await values(store))["a"] == b"2"


async def test_a_moved_leader_keeps_leases_and_fences(cluster: EtcdCluster, opened: Opened) -> None:
    leader = cluster.await_leader()
    target = followers(cluster)[0]
    store, asked = opened(target.address), opened(leader.address)
    lease = await store.grant(5.0)
    epoch = await put(store, LEADER_KEY, b"me", lease.lease_id)
    (to,) = [each.member_id for each in await asked.client.members() if each.name == target.config.name]
    await asked.client.move_leader(to)
    assert cluster.await_leader() is target
    assert (await store.keepalive(lease.lease_id)).ttl_s == 5.0
    await store.commit(epoch, [Put("a", b"1")])
    await store.revoke(lease.lease_id)
    with pytest.raises(NotFound):
        await store.keepalive(lease.lease_id)
    with pytest.raises(Fenced):
        await store.commit(epoch, [Put("a", b"2")])
