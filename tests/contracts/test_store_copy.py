"""Copies between real stores: etcd, SQLite, and the file of an etcd member that does not run."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from peer.adapters.stores import store_copy
from peer.adapters.stores.etcd_file import FILE, EtcdFile
from peer.adapters.stores.etcd_store import BASE_KEY, REQUEST_BYTES_MAX, EtcdStore
from peer.adapters.stores.migration import opened_sqlite
from peer.adapters.stores.sqlite_store import SqliteStore
from peer.adapters.stores.store_copy import compare, copy, measure, set_base
from peer.errors import Conflict, StoreBroken, StoreError, TooLarge
from peer.ports import BATCH_KEY, BEAT_KEY, LEADER_KEY, Delete, Put, Store
from tests.contracts.etcd import EtcdCluster, EtcdProcess, needs_etcd, poll, running_cluster
from tests.contracts.model import lead, one, put, values

pytestmark = needs_etcd

ODD_KEYS = ["a\x7f", "ä", "～", "\U0001f600", "z", "10", "9"]


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdCluster]:
    with running_cluster(tmp_path / "cluster", 1, heartbeat_ms=10, election_ms=100) as cluster:
        yield cluster


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with opened_sqlite(tmp_path / "store.sqlite") as store:
        yield store


async def fill(store: Store, seed: int = 1) -> dict[str, bytes]:
    """Records of many sizes, with a leadership's own among them; what is to be copied."""
    chance = random.Random(seed)
    kept = {f"task/{number:05}": chance.randbytes(chance.randrange(300)) for number in range(2_500)}
    kept |= {key: key.encode() for key in ODD_KEYS}
    kept |= {"empty": b"", "large/1": chance.randbytes(5_000_000), "large/2": chance.randbytes(3_000_000)}
    writes = [Put(key, value) for key, value in kept.items()]
    for at in range(0, len(writes), 1_000):
        await store.txn([], writes[at : at + 1_000])
    for _ in range(20):
        await put(store, "task/00001", kept["task/00001"])
    await store.txn([], [Put("gone", b"1")])
    await store.txn([], [Delete("gone"), Put(BEAT_KEY, b"1"), Put(BATCH_KEY, b"1/1")])
    await put(store, LEADER_KEY, b"me", (await store.grant(60.0)).lease_id)
    return kept


def member(etcd: EtcdCluster) -> EtcdProcess:
    return etcd.members[0]


async def test_there_and_back_nothing_is_lost_and_epochs_only_grow(
    etcd: EtcdCluster, sqlite: SqliteStore, tmp_path: Path
) -> None:
    kept = await fill(sqlite)
    epoch = await lead(sqlite)
    revision = (await sqlite.range("", "")).revision
    await set_base(member(etcd).address, revision)
    store = EtcdStore(member(etcd).address, call_s_max=20.0)
    told: list[tuple[str, int]] = []
    copied = await copy(sqlite, store, lambda what, records: told.append((what, records)))
    assert copied.records == len(kept)
    assert copied.nbytes == sum(len(key.encode()) + len(value) for key, value in kept.items())
    assert copied == await measure(store) == await measure(sqlite)
    assert [each for each in told if each[1] == len(kept)][-1] == ("compared", len(kept))
    assert {what for what, _ in told} == {"measured", "copied", "compared"}
    found = await values(store)
    assert found.pop(BASE_KEY) == str(revision).encode()
    assert found == kept  # without leader, beat and batch

    newer = await lead(store)
    assert newer > epoch
    await store.commit(newer, [Put("since", b"1"), Delete("empty")])
    revision = (await store.range("", "")).revision
    async with opened_sqlite(tmp_path / "back.sqlite", revision) as back:
        returned = await copy(store, back)
        del kept["empty"]
        assert await values(back) == kept | {"since": b"1"}
        assert returned.records == len(kept) + 1
        newest = await lead(back)
        assert newest > revision > newer
    async with opened_sqlite(tmp_path / "back.sqlite") as again:
        assert await lead(again) > newest
    await store.aclose()


async def test_what_cannot_be_copied_is_refused_before_anything_is_written(
    etcd: EtcdCluster, sqlite: SqliteStore
) -> None:
    store = EtcdStore(member(etcd).address, call_s_max=20.0)
    await sqlite.txn([], [Put("a", b"1"), Put("b", bytes(REQUEST_BYTES_MAX))])
    with pytest.raises(TooLarge, match="record b has"):
        await copy(sqlite, store)
    assert await store.count("", "\U0010ffff") == 0
    largest = store_copy.RECORD_BYTES_MAX - 1
    await sqlite.txn([], [Put("b", bytes(largest))])
    assert (await copy(sqlite, store)).nbytes == largest + 3
    with pytest.raises(Conflict, match="not empty"):
        await copy(sqlite, store)
    with pytest.raises(Conflict, match="not empty"):
        await set_base(member(etcd).address, 5)
    await store.aclose()


async def test_every_difference_is_found(sqlite: SqliteStore, tmp_path: Path) -> None:
    await fill(sqlite)
    async with opened_sqlite(tmp_path / "other.sqlite") as other:
        await copy(sqlite, other)
        for key, write, named in (
            ("task/01234", Put("task/01234", b"other"), "task/01234"),
            ("task/01234", Delete("task/01234"), "task/01234, which it has not"),
            ("task/01234x", Put("task/01234x", b""), "task/01234x, which the store has not"),
            ("～z", Put("～z", b""), "～z, which the store has not"),
        ):
            before = await one(other, key)
            await other.txn([], [write])
            with pytest.raises(StoreError) as found:
                await compare(sqlite, other)
            assert named in found.value.message
            await other.txn([], [Put(key, before.value) if before is not None else Delete(key)])
        await other.txn([], [Put("\U0001f601", b"")])  # behind all others
        with pytest.raises(StoreError, match="which the store has not"):
            await compare(sqlite, other)
        await other.txn([], [Delete("\U0001f601")])
        await compare(sqlite, other)


async def test_a_store_that_changes_meanwhile_is_not_taken_for_copied(
    sqlite: SqliteStore, tmp_path: Path
) -> None:
    await fill(sqlite)
    async with opened_sqlite(tmp_path / "other.sqlite") as other:

        class Changing:
            def __init__(self) -> None:
                self.pages = 0

            async def range(self, start: str, end: str, *, limit: int = 0):  # type: ignore[no-untyped-def]
                self.pages += 1
                if self.pages == 60:  # measured, and not yet copied so far
                    await sqlite.txn([], [Put("task/02400", b"changed")])
                return await sqlite.range(start, end, limit=limit)

        with pytest.raises(StoreError, match="changed while it was copied"):
            await copy(Changing(), other)


# ------------------------------------------------------------------------------------------------ the file


async def test_the_file_of_a_member_holds_what_the_member_said(etcd: EtcdCluster, tmp_path: Path) -> None:
    await set_base(member(etcd).address, 10_000)
    store = EtcdStore(member(etcd).address, call_s_max=20.0)
    await fill(store)
    page = await store.range("", "\U0010ffff")
    copied = await measure(store)
    await store.client.compact(page.revision - 10_000 - 5)
    await store.aclose()
    await trio.sleep(0.5)  # etcd writes to its file ten times a second
    member(etcd).kill()
    with EtcdFile(member(etcd).config.folder / FILE) as file:
        assert file.revision == page.revision
        assert file.own_revision == page.revision - 10_000
        assert [each.name for each in file.members] == ["m0"]
        assert not file.members[0].is_learner
        assert (await file.range("", "\U0010ffff")).items == page.items
        first = await file.range("task/", "task0", limit=7)
        assert first.items == tuple(item for item in page.items if item.key.startswith("task/"))[:7]
        assert first.more
        assert not (await file.range("task/", "task0", limit=2_500)).more
        assert await measure(file) == copied
        async with opened_sqlite(tmp_path / "copy.sqlite", file.revision) as target:
            assert await copy(file, target) == copied


async def test_a_damaged_file_is_refused(etcd: EtcdCluster, tmp_path: Path) -> None:
    store = EtcdStore(member(etcd).address)
    await store.txn([], [Put(f"k/{number:05}", bytes(100)) for number in range(2_000)])
    await store.aclose()
    path = member(etcd).config.folder / FILE
    poll("the records are in the file", lambda: b"k/01999" in path.read_bytes())
    member(etcd).kill()
    whole = path.read_bytes()
    damaged = tmp_path / "damaged"
    for content in (
        bytes(len(whole)),
        whole[:100],
        bytes(8_192) + whole[8_192:],
        whole[:8_192] + bytes(len(whole) - 8_192),
        whole[:16_384],
    ):
        damaged.write_bytes(content)
        with pytest.raises(StoreBroken, match="damaged"):
            EtcdFile(damaged)
    damaged.write_bytes(bytes(4_096) + whole[4_096:])  # the other meta page is whole
    EtcdFile(damaged).__exit__(None, None, None)


async def test_cancelled_copies_leave_stores_usable(etcd: EtcdCluster, sqlite: SqliteStore) -> None:
    await fill(sqlite)
    store = EtcdStore(member(etcd).address, call_s_max=20.0)
    with trio.CancelScope() as scope:
        await copy(sqlite, store, lambda what, records: scope.cancel() if what == "copied" else None)
    assert scope.cancelled_caught
    with pytest.raises(Conflict, match="not empty"):
        await copy(sqlite, store)
    await store.aclose()
