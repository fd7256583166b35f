"""The store over real etcd against the contract, and its own: what etcd refuses, large answers, its quota."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from peer.adapters.stores.etcd_client import decoder
from peer.adapters.stores.etcd_store import BASE_KEY, OPERATIONS_MAX, REQUEST_BYTES_MAX, EtcdStore
from peer.errors import Ambiguous, Compacted, Conflict, Fenced, NotFound, TooLarge, Unavailable
from peer.ports import LEADER_KEY, Batch, Change, Compare, Delete, Put, Store
from tests.contracts.etcd import EtcdCluster, needs_etcd, running_cluster
from tests.contracts.model import lead, one, put, take, values
from tests.contracts.store import StoreContract, StoreFactory

pytestmark = needs_etcd

MEBIBYTE = 1024 * 1024


class EtcdFactory(StoreFactory):
    def __init__(self, address: str, revision_base: int = 0) -> None:
        self.address = address
        self.revision_base = revision_base

    async def open(self, nursery: trio.Nursery) -> EtcdStore:
        return EtcdStore(self.address, revision_base=self.revision_base)

    async def pass_time(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def forget_history(self, store: Store) -> None:
        assert isinstance(store, EtcdStore)
        await store.client.compact((await store.range("", "")).revision - self.revision_base)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with running_cluster(tmp_path_factory.mktemp("etcd"), 1, heartbeat_ms=10, election_ms=100) as cluster:
        yield cluster


@pytest.fixture
async def store_factory(etcd: EtcdCluster) -> EtcdFactory:
    """One member for all tests; each finds it empty."""
    address = etcd.members[0].address
    store = EtcdStore(address)
    everything = {"key": b"\0", "range_end": b"\0"}
    await store.client.call("kv/deleterange", everything, decoder(dict), writes=True)
    await store.aclose()
    return EtcdFactory(address)


@pytest.fixture
async def store(store_factory: EtcdFactory, nursery: trio.Nursery) -> AsyncIterator[EtcdStore]:
    store = await store_factory.open(nursery)
    yield store
    await store.aclose()


class TestEtcdStore(StoreContract):
    """The contract."""


class TestEtcdStoreWithABase(StoreContract):
    """The contract, for a store that goes on where another one stood."""

    @pytest.fixture
    async def store_factory(self, store_factory: EtcdFactory) -> EtcdFactory:
        return EtcdFactory(store_factory.address, revision_base=1_000_000_000_000)


# ------------------------------------------------------------------------------------------------ the base


async def test_the_base_is_read_before_the_first_call_that_needs_it(store: EtcdStore) -> None:
    below = await put(store, BASE_KEY, b"5000")
    for call in (
        lambda opened: opened.get([BASE_KEY]),
        lambda opened: opened.range(BASE_KEY, BASE_KEY + "\0"),
        lambda opened: opened.txn((), []),
    ):
        opened = EtcdStore(store.client.address)
        found = await call(opened)
        match found:
            case dict():
                assert found[BASE_KEY].mod_revision == below + 5_000
            case _:
                assert found.revision == below + 5_000
        await opened.aclose()


async def test_revisions_of_before_the_base_never_match_and_have_no_history(store: EtcdStore) -> None:
    await put(store, BASE_KEY, b"5000")
    opened = EtcdStore(store.client.address)
    epoch = await lead(opened)
    assert epoch > 5_000
    for old in (1, epoch - 5_000, 4_999, 5_000):
        for key in (LEADER_KEY, "missing"):
            assert not (await opened.txn([Compare(key, "create_revision", old)], [])).succeeded
        with pytest.raises(Fenced):
            await opened.commit(old, [Put("a", b"1")])
        with pytest.raises(Compacted):
            async with opened.watch("", old):
                pass
    assert (await opened.txn([Compare("missing", "mod_revision", 0)], [])).succeeded
    revision = await opened.commit(epoch, [Put("a", b"1")])
    async with opened.watch("a", epoch) as batches:
        assert [batch.revision for batch in await take(batches, 1)] == [revision]
    await opened.aclose()


# ------------------------------------------------------------------------------------------------ sizes


async def test_answers_beyond_etcds_limit_come_in_pages_of_one_revision(store: EtcdStore) -> None:
    keys = [f"big/{number:02}" for number in range(9)]
    revisions = [await put(store, key, bytes(MEBIBYTE)) for key in keys for _ in range(2)]
    page = await store.range("big/", "big0")
    assert [item.key for item in page.items] == keys
    assert {len(item.value) for item in page.items} == {MEBIBYTE}
    assert not page.more
    assert list(await store.get(keys)) == keys
    async with store.watch("big/", revisions[0]) as batches:
        found = await take(batches, 18)
    assert [batch.changes[0].key for batch in found] == [key for key in keys for _ in range(2)]


async def test_values_of_any_size_are_read_though_pages_have_grown(store: EtcdStore) -> None:
    """Small ones first: what comes then is much more than one answer carries, or than there is time for."""
    store = EtcdStore(store.client.address, call_s_max=20.0)
    few = {f"a/{number:04}": b"small" for number in range(1_500)}
    await store.txn((), [Put(key, value) for key, value in few.items()])
    many = {f"b/{number:04}": bytes([number]) * MEBIBYTE for number in range(30)}
    for key, value in many.items():
        await store.txn((), [Put(key, value)])
    largest = {"c": b"x" * (REQUEST_BYTES_MAX - 1024)}
    await store.txn((), [Put("c", largest["c"])])
    assert await values(store, "a", "d") == few | many | largest
    found = await store.get([*few, *many, *largest])
    assert {key: item.value for key, item in found.items()} == few | many | largest
    async with store.watch("c", (await store.range("", "")).revision) as batches:
        assert [batch.changes for batch in await take(batches, 1)] == [(Change("c", largest["c"]),)]
    await store.aclose()


async def test_many_keys_are_read_at_one_revision_while_others_write(store: EtcdStore) -> None:
    for start in range(0, 20_000, 5_000):
        await store.txn((), [Put(f"k/{number:05}", b"0") for number in range(start, start + 5_000)])
    done = trio.Event()

    async def rewrite() -> None:
        round_ = 0
        while not done.is_set():
            round_ += 1
            await store.txn((), [Put(f"k/{n:05}", str(round_).encode()) for n in range(0, 20_000, 4_000)])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rewrite)
        for _ in range(3):
            page = await store.range("k/", "k0")
            assert len(page.items) == 20_000
            assert len({page.items[at].value for at in range(0, 20_000, 4_000)}) == 1
            page = await store.range("k/", "k0", offset=17_000, limit=10, keys_only=True)
            assert [item.key for item in page.items] == [f"k/{n:05}" for n in range(17_000, 17_010)]
            found = await store.get([f"k/{n:05}" for n in range(0, 20_000, 4_000)])
            assert len({item.value for item in found.values()}) == 1
        done.set()


async def test_a_large_transaction_is_one_batch(store: EtcdStore) -> None:
    writes = [Put(f"k/{number:05}", bytes(100)) for number in range(OPERATIONS_MAX)]
    done = await store.txn((), writes)
    async with store.watch("k/", done.revision) as batches:
        (batch,) = await take(batches, 1)
    assert batch == Batch(done.revision, tuple(Change(each.key, each.value) for each in writes))


async def test_what_etcd_does_not_take_is_refused_whole(store: EtcdStore) -> None:
    store = EtcdStore(store.client.address, call_s_max=20.0)
    epoch = await lead(store)
    for writes in (
        [Put("a", b"1"), Put("b", bytes(REQUEST_BYTES_MAX))],  # refused here
        [Put("a", b"1"), Put("b", bytes(REQUEST_BYTES_MAX - 4))],  # refused there
        [Put(f"k/{number}", b"") for number in range(OPERATIONS_MAX + 1)],
    ):
        with pytest.raises(TooLarge):
            await store.txn((), writes)
        with pytest.raises(TooLarge):
            await store.commit(epoch, writes)
    for error, write in (
        (ValueError, Put("", b"")),
        (ValueError, Put("\ud800", b"")),
        (ValueError, Put("a", b"", -1)),
        (TypeError, Put("a", "text")),
    ):
        with pytest.raises(error):
            await store.txn((), [write])
    for ttl_s in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="lease"):
            await store.grant(ttl_s)
    assert await one(store, "a") is None
    await store.commit(epoch, [Put("a", b"1")])
    await store.aclose()


async def test_leases_are_of_whole_seconds_and_no_less_than_two(store: EtcdStore) -> None:
    assert [(await store.grant(ttl_s)).ttl_s for ttl_s in (0.3, 2.0, 2.1)] == [2.0, 2.0, 3.0]


# ------------------------------------------------------------------------------------------------ history


async def test_a_watch_from_the_compacted_revision_itself_is_compacted(store: EtcdStore) -> None:
    """etcd allows it, though it tells no more of a deletion at that revision."""
    await put(store, "a")
    deleted = (await store.txn((), [Delete("a")])).revision
    await store.client.compact(deleted, physical=True)
    with pytest.raises(Compacted):
        async with store.watch("a", deleted):
            pass
    async with store.watch("a", deleted + 1) as batches:
        await put(store, "a")
        assert [batch.revision for batch in await take(batches, 1)] == [deleted + 1]


async def test_a_watcher_that_is_overtaken_is_compacted(store: EtcdStore) -> None:
    first = await put(store, "a")
    await put(store, "a")
    await store.client.compact(first + 1)
    with pytest.raises(Compacted):
        async with store.watch("", first) as batches:
            await anext(batches)


# ------------------------------------------------------------------------------------------------ ends


async def test_after_the_end_nothing_is_asked(store: EtcdStore) -> None:
    revision = (await store.range("", "")).revision
    async with store.watch("", revision + 1) as batches, trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(Unavailable):
                await anext(batches)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await store.aclose()
    for call in (lambda: put(store, "a"), lambda: store.count("a", "b"), lambda: store.keepalive(1)):
        with pytest.raises(Unavailable, match="closed"):
            await call()


async def test_cancelled_callers_spoil_no_connection(store: EtcdStore) -> None:
    await store.txn((), [Put(f"k/{number:03}", str(number).encode()) for number in range(100)])

    async def ask(number: int, patience_s: float) -> None:
        with trio.move_on_after(patience_s):
            assert await values(store, f"k/{number:03}", f"k/{number:03}\0") == {
                f"k/{number:03}": str(number).encode()
            }

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(ask, number, 0.0005 * number)
    for number in range(100):
        await ask(number, 10.0)


# ------------------------------------------------------------------------------------------------ the quota


async def test_a_full_store_says_so_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 1, heartbeat_ms=10, election_ms=100) as cluster:
        (member,) = cluster.members
        member.kill()
        member.config = msgspec.structs.replace(member.config, quota_bytes=4 * MEBIBYTE)
        cluster.start()
        store = EtcdStore(member.address)
        epoch = await lead(store)
        acknowledged = 0

        async def fill() -> None:
            nonlocal acknowledged
            while acknowledged < 100:
                await store.commit(epoch, [Put(f"k/{acknowledged:03}", bytes(300_000))])
                acknowledged += 1

        with pytest.raises(Unavailable, match="space") as full:
            await fill()
        assert full.value.code == "store_full"
        assert 5 < acknowledged < 20
        assert await store.count("k/", "k0") == acknowledged
        with pytest.raises(Ambiguous, match="space"):
            await put(store, "other")
        assert await one(store, "other") is None
        # deletions go on, and make room
        revision = (await store.txn((), [Delete(f"k/{n:03}") for n in range(acknowledged)])).revision
        await store.client.compact(revision, physical=True)
        await store.client.defragment()
        for member_id, alarm in await store.client.alarms():
            assert alarm == "NOSPACE"
            await store.client.disarm(member_id)
        await store.commit(epoch, [Put("k/new", bytes(300_000))])
        await store.aclose()


# ------------------------------------------------------------------------------------------------ members' calls


async def test_a_member_tells_of_itself(store: EtcdStore) -> None:
    status = await store.client.status()
    (member,) = await store.client.members()
    assert status.version == await store.client.version()
    assert status.leader == status.header.member_id == member.member_id
    assert (member.name, member.is_learner) == ("m0", False)
    for call in (store.client.remove(1), store.client.promote(1)):
        with pytest.raises(NotFound):
            await call
    with pytest.raises(Conflict):
        await store.client.move_leader(1)


async def test_comparisons_of_every_kind_hold_together(store: EtcdStore) -> None:
    revision = await put(store, "a", b"")
    compare = [
        Compare("a", "create_revision", revision),
        Compare("a", "mod_revision", revision),
        Compare("a", "value", b""),
        Compare("b", "create_revision", 0),
    ]
    assert (await store.txn(compare, [])).succeeded
