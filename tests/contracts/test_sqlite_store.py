"""The SQLite store against the contract, and its own: the file, faults of the disk, other processes."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from peer.adapters.stores.sqlite_store import TXN_BYTES_MAX
from peer.errors import Compacted, Fenced, NotFound, StoreBroken, StoreError, TooLarge, Unavailable
from peer.ports import LEADER_KEY, Batch, Change, Compare, Delete, Put, Store
from tests.contracts.conftest import SqliteFactory
from tests.contracts.store import StoreContract, lead, one, put, take, values

RING_BATCHES = 256
RING_BYTES = 100_000


@contextmanager
def locked(factory: SqliteFactory) -> Iterator[None]:
    """Another connection holds the write lock: the writer's thread waits for it, and requests gather."""
    lock = sqlite3.connect(factory.path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    yield
    lock.execute("ROLLBACK")
    lock.close()


class TestSqliteStore(StoreContract):
    """The contract."""


# ------------------------------------------------------------------------------------------------ the file


async def test_the_files_are_private(store_factory: SqliteFactory, nursery: trio.Nursery) -> None:
    def modes() -> set[int]:
        files = list(store_factory.path.parent.glob("store.db*"))
        assert store_factory.path in files
        return {file.stat().st_mode & 0o777 for file in files}

    old = os.umask(0)
    try:
        for _ in range(2):
            store = await store_factory.open(nursery)
            await put(store, "a")
            assert modes() == {0o600}
            await store.aclose()
            assert modes() == {0o600}
            store_factory.path.chmod(0o644)  # by mistake: mended at the next start
    finally:
        os.umask(old)


async def test_a_newer_schema_is_refused(store_factory: SqliteFactory, nursery: trio.Nursery) -> None:
    await (await store_factory.open(nursery)).aclose()
    connection = sqlite3.connect(store_factory.path)
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    with pytest.raises(StoreError, match="newer version"):
        await store_factory.open(nursery)


async def test_what_is_no_database_is_refused(store_factory: SqliteFactory, nursery: trio.Nursery) -> None:
    store_factory.path.write_bytes(b"no database " * 1000)
    with pytest.raises(StoreBroken):
        await store_factory.open(nursery)


async def test_a_path_that_cannot_be_is_refused(tmp_path: Path, nursery: trio.Nursery) -> None:
    with pytest.raises(StoreBroken, match="missing"):
        await SqliteFactory(tmp_path / "missing" / "store.db").open(nursery)


async def test_a_path_with_odd_characters(tmp_path: Path, nursery: trio.Nursery) -> None:
    factory = SqliteFactory(tmp_path / "a?mode=memory&b#c %41.db")
    store = await factory.open(nursery)
    await put(store, "a")
    await store.aclose()
    assert factory.path.stat().st_size > 0


async def test_a_corrupt_page_breaks_the_store(store_factory: SqliteFactory, nursery: trio.Nursery) -> None:
    store = await store_factory.open(nursery)
    await store.txn((), [Put(f"k/{number:03}", b"x" * 3000) for number in range(200)])
    await store.aclose()
    content = bytearray(store_factory.path.read_bytes())
    content[8 * 4096 : -4096] = b"\xff" * (len(content) - 9 * 4096)
    store_factory.path.write_bytes(content)
    store = await store_factory.open(nursery)
    for _ in range(2):
        with pytest.raises(StoreBroken):
            await store.range("k/", "k0")
    with pytest.raises(StoreBroken):
        await put(store, "a")
    await store.aclose()


async def test_calls_after_the_end_are_refused(store_factory: SqliteFactory, nursery: trio.Nursery) -> None:
    store = await store_factory.open(nursery)
    await store.aclose()
    for call in (lambda: put(store, "a"), lambda: store.count("a", "b"), lambda: store.keepalive(1)):
        with pytest.raises(Unavailable, match="closed"):
            await call()


async def test_the_end_waits_for_what_is_under_way(
    store_factory: SqliteFactory, nursery: trio.Nursery
) -> None:
    store = await store_factory.open(nursery)
    async with trio.open_nursery() as writers:
        for number in range(50):
            writers.start_soon(put, store, f"k/{number:02}")
            writers.start_soon(values, store)
        await trio.testing.wait_all_tasks_blocked()
        writers.start_soon(store.aclose)
    store = await store_factory.open(nursery)
    assert await store.count("k/", "k0") == 50
    await store.aclose()


# ------------------------------------------------------------------------------------------------ groups


async def test_each_request_of_a_group_has_its_own_outcome(
    store: Store, store_factory: SqliteFactory
) -> None:
    epoch = await lead(store)
    outcomes: dict[str, object] = {}

    async def note(name: str, call: Callable[[], Awaitable[object]]) -> None:
        try:
            outcomes[name] = await call()
        except (Fenced, NotFound) as error:
            outcomes[name] = type(error)

    async with trio.open_nursery() as nursery, store.watch("", epoch + 1) as batches:
        requests: dict[str, Callable[[], Awaitable[object]]] = {
            "in time": lambda: store.commit(epoch, [Put("a", b"1")]),
            "no lease": lambda: store.txn((), [Put("a", b"2"), Put("b", b"2", 77)]),
            "resign": lambda: store.txn((), [Delete(LEADER_KEY)]),
            "too late": lambda: store.commit(epoch, [Put("a", b"3")]),
            "elect": lambda: store.txn([Compare(LEADER_KEY, "mod_revision", 0)], [Put(LEADER_KEY, b"")]),
            "elected": lambda: store.commit(epoch + 3, [Put("a", b"4")]),
            "sees it": lambda: store.txn([Compare("a", "value", b"4")], [Put("c", b"5")]),
        }
        with locked(store_factory):
            for name, call in requests.items():
                nursery.start_soon(note, name, call)
                await trio.testing.wait_all_tasks_blocked()
            assert outcomes == {}
        seen = await take(batches, 5)
    assert {name: getattr(outcome, "revision", outcome) for name, outcome in outcomes.items()} == {
        "in time": epoch + 1,
        "no lease": NotFound,
        "resign": epoch + 2,
        "too late": Fenced,
        "elect": epoch + 3,
        "elected": epoch + 4,
        "sees it": epoch + 5,
    }
    assert [batch.revision for batch in seen] == [epoch + number for number in range(1, 6)]
    assert await values(store) == {"a": b"4", "c": b"5", LEADER_KEY: b""}


async def test_a_caller_cancelled_in_mid_commit_waits_and_the_write_is_done(
    store: Store, store_factory: SqliteFactory
) -> None:
    revisions: list[int] = []
    scope = trio.CancelScope()

    async def write() -> None:
        with scope:
            revisions.append(await put(store, "a"))

    async with trio.open_nursery() as nursery:
        with locked(store_factory):
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert revisions == []
    item = await one(store, "a")
    assert item is not None
    assert revisions == [item.mod_revision]


async def test_a_caller_cancelled_before_hands_nothing_over(store: Store) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await put(store, "a")
    assert await one(store, "a") is None


async def test_requests_that_cannot_be_are_refused_alone(store: Store) -> None:
    revision = await put(store, "a")
    for error, write in (
        (ValueError, Put("", b"")),
        (ValueError, Put("\ud800", b"")),
        (ValueError, Put("a", b"", -1)),
        (ValueError, Put("a", b"", 1 << 70)),
        (TypeError, Put("a", "text")),  # type: ignore[arg-type]
        (TooLarge, Put("a", bytes(TXN_BYTES_MAX + 1))),
    ):
        with pytest.raises(error):
            await store.txn((), [write])
    with pytest.raises(ValueError, match="field"):
        await store.txn([Compare("a", "lease", 0)], [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit"):
        await store.range("a", "b", limit=-1)
    for ttl_s in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="lease"):
            await store.grant(ttl_s)
    assert await put(store, "a") == revision + 1


async def test_keys_may_hold_any_character(store: Store) -> None:
    keys = ["\x00", "a\x00b", "a", "a\x00", "'; --", "%_*"]
    await store.txn((), [Put(key, key.encode()) for key in keys])
    assert await values(store) == {key: key.encode() for key in sorted(keys)}
    assert set(await store.get(keys)) == set(keys)


# ------------------------------------------------------------------------------------------------ leases


async def test_a_lease_has_its_whole_time_after_a_start(
    store_factory: SqliteFactory, nursery: trio.Nursery
) -> None:
    store = await store_factory.open(nursery)
    lease = await store.grant(10.0)
    await put(store, "a", lease=lease.lease_id)
    store_factory.clock.advance(9.0)
    await store.aclose()
    store_factory.clock.advance(100.0)  # while nobody has it open
    store = await store_factory.open(nursery)
    store_factory.clock.advance(9.9)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert await one(store, "a") is not None
    store_factory.clock.advance(0.2)
    await put(store, "b")  # comes after the expiry
    assert await values(store) == {"b": b"v"}
    await store.aclose()


async def test_no_write_counts_on_a_lease_whose_time_is_up(
    store: Store, store_factory: SqliteFactory
) -> None:
    """Even before the expiry task has run: as after a suspended host wakes."""
    lease = await store.grant(5.0)
    epoch = await put(store, LEADER_KEY, lease=lease.lease_id)
    store_factory.clock.advance(5.0)
    with pytest.raises(Fenced):
        await store.commit(epoch, [Put("a", b"")])
    with pytest.raises(NotFound):
        await store.keepalive(lease.lease_id)


async def test_an_expiry_that_meets_a_lock_comes_later(store: Store, store_factory: SqliteFactory) -> None:
    lease = await store.grant(5.0)
    revision = await put(store, "a", lease=lease.lease_id)
    with locked(store_factory):
        store_factory.clock.advance(5.0)
        with pytest.raises(Unavailable):
            await put(store, "b")
    async with store.watch("", revision + 1) as batches:
        with trio.fail_after(5):
            while await one(store, "a") is not None:
                store_factory.clock.advance(0.1)
                await trio.sleep(0.01)
        assert await take(batches, 1) == [Batch(revision + 1, (Change("a", None),))]


# ------------------------------------------------------------------------------------------------ watching


async def test_a_slow_watcher_is_overtaken(store: Store) -> None:
    first = await put(store, "a")
    async with store.watch("", first) as slow, store.watch("", first) as quick:
        for _ in range(3):
            await take(slow, 0)
            for _ in range(RING_BATCHES // 2):
                await put(store, "a")
                await take(quick, 1)
        with pytest.raises(Compacted):
            await take(slow, 1)
        await take(quick, 1)


async def test_the_history_is_bounded_in_bytes(store: Store) -> None:
    first = await put(store, "a")
    for _ in range(11):
        last = await put(store, "a", bytes(RING_BYTES // 10))
    with pytest.raises(Compacted):
        async with store.watch("", first):
            pass
    big = await put(store, "a", bytes(RING_BYTES * 2))
    with pytest.raises(Compacted):
        async with store.watch("", last):
            pass
    async with store.watch("", big) as batches:
        assert [batch.revision for batch in await take(batches, 1)] == [big]


async def test_history_from_before_the_start_is_compacted(
    store_factory: SqliteFactory, nursery: trio.Nursery
) -> None:
    store = await store_factory.open(nursery)
    last = await put(store, "a")
    await store.aclose()
    store = await store_factory.open(nursery)
    for revision in (0, 1, last):
        with pytest.raises(Compacted):
            async with store.watch("", revision):
                pass
    async with store.watch("", last + 1) as batches:
        await put(store, "b")
        assert await take(batches, 1) == [Batch(last + 1, (Change("b", b"v"),))]
    await store.aclose()


async def test_a_watcher_is_told_of_the_end(store_factory: SqliteFactory, nursery: trio.Nursery) -> None:
    store = await store_factory.open(nursery)

    async def watch() -> None:
        with pytest.raises(Unavailable):
            async with store.watch("", 1) as batches:
                await anext(batches)

    async with trio.open_nursery() as watchers:
        watchers.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        await store.aclose()


# ------------------------------------------------------------------------------------------------ others


async def test_a_lock_held_by_another_is_said_and_breaks_nothing(
    store: Store, store_factory: SqliteFactory
) -> None:
    revision = await put(store, "a")
    with locked(store_factory):
        with pytest.raises(Unavailable, match="lock"):
            await put(store, "b")
        assert await values(store) == {"a": b"v"}
    assert await put(store, "c") == revision + 1


async def test_what_another_store_wrote_is_a_gap_for_watchers(
    store: Store, store_factory: SqliteFactory, nursery: trio.Nursery
) -> None:
    other = await store_factory.open(nursery)
    first = await put(store, "a")
    async with store.watch("", first + 1) as batches:
        assert await put(other, "b") == first + 1
        assert await put(store, "c") == first + 2
        with pytest.raises(Compacted):
            await take(batches, 1)
    await other.aclose()
    assert list(await values(store)) == ["a", "b", "c"]
    assert await put(store, "d") == first + 3


# ------------------------------------------------------------------------------------------------ processes
