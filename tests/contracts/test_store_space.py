"""Real etcd members that reach a small quota, and their keepers, which make room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from peer import store_space
from peer.adapters.clock import SystemClock
from peer.adapters.stores.etcd_voting import EtcdVoting
from peer.decide import space
from peer.errors import Ambiguous, BitinglipError, Unavailable
from peer.leader import Leader
from peer.ports import Delete, Put, Store
from peer.state.voter import Space
from peer.store_space import SpaceKeeper
from tests.contracts.etcd import free_port, needs_etcd
from tests.contracts.model import values

pytestmark = needs_etcd

MIB = 1024 * 1024
QUOTA = 4 * MIB
VALUE = bytes(300_000)
WAIT_S = 60.0  # on a busy host


class Nobody:
    leader = ""


class Host:
    """A voter that is alone, and its keeper."""

    def __init__(self, folder: Path, quota_bytes: int = QUOTA) -> None:
        address = f"127.0.0.1:{free_port()}"
        self.voting = EtcdVoting(
            folder,
            "h1",
            address,
            token=folder.name,
            heartbeat_ms=50,
            election_ms=500,
            quota_bytes=quota_bytes,
        )
        self.leader: Leader | None = None
        self.follower = Nobody()
        self.store: Store | None = None
        self.full = ""
        self.keeper = SpaceKeeper(self.voting, self, SystemClock(), self.tell)

    def begin(self, store: Store) -> None:
        self.store = store

    async def end(self) -> None:
        self.store = None

    def tell(self, why: str) -> None:
        self.full = why

    async def look(self) -> Space:
        assert self.voting.upkeep is not None
        found = await self.voting.upkeep.look()
        assert found is not None
        return found


@asynccontextmanager
async def running(host: Host) -> AsyncIterator[Store]:
    """Its member, which ends with the block."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.voting.run, host.begin, host.end)
        with trio.fail_after(WAIT_S):
            while host.store is None:  # noqa: ASYNC110 - of a process
                await trio.sleep(0.02)
            store = host.store
            while not await answers(store):  # noqa: ASYNC110
                await trio.sleep(0.02)
        yield store
        nursery.cancel_scope.cancel()


async def answers(store: Store) -> bool:
    try:
        await store.count("a", "b")
    except BitinglipError:
        return False
    return True


async def fill(store: Store, key: str) -> int:
    """Until the store is full; how many writes it has acknowledged. `key` may have a number in it."""
    number = 0
    with pytest.raises((Ambiguous, Unavailable)) as full:  # noqa: PT012
        while number < 200:
            await store.txn((), [Put(key.format(number), VALUE)])
            number += 1
    assert full.value.code == "store_full"
    return number


async def cured(host: Host) -> None:
    with trio.fail_after(WAIT_S):
        while (await host.look()).alarmed:  # noqa: ASYNC110 - of a process
            await trio.sleep(0.05)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_space, "LOOK_S", 0.1)
    monkeypatch.setattr(space, "COMPACT_S", 1.0)
    monkeypatch.setattr(space, "AGAIN_S", 1.0)
    monkeypatch.setattr(space, "UNSURE_S", 3.0)


async def test_a_store_that_its_history_has_filled_is_cured_and_nothing_acknowledged_is_lost(
    tmp_path: Path,
) -> None:
    host = Host(tmp_path)
    host.voting.found()
    async with running(host) as store, trio.open_nursery() as nursery:
        await store.txn((), [Put("kept", b"1")])
        assert await fill(store, "k") > 3
        assert (await host.look()).alarmed
        nursery.start_soon(host.keeper.run)
        await cured(host)
        found = await host.look()
        assert found.file_bytes < QUOTA / 2
        assert await values(store, "k", "l") == {"k": VALUE, "kept": b"1"}
        assert await fill(store, "k") > 3  # and so it is the next time
        await cured(host)
        nursery.cancel_scope.cancel()


async def test_data_that_fill_the_quota_wait_for_deletions_or_a_larger_quota(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.voting.found()
    async with running(host) as store, trio.open_nursery() as nursery:
        many = await fill(store, "k/{:03}")
        nursery.start_soon(host.keeper.run)
        with trio.fail_after(WAIT_S):
            while "the store is full" not in host.full:  # noqa: ASYNC110
                await trio.sleep(0.05)
        await store.txn((), [Delete(f"k/{number:03}") for number in range(many // 2)])  # which it takes
        await cured(host)
        assert await store.count("k/", "k0") >= many - many // 2
        many += await fill(store, "l/{:03}") - many // 2
        nursery.cancel_scope.cancel()
    larger = Host(tmp_path, 4 * QUOTA)
    async with running(larger) as store, trio.open_nursery() as nursery:
        nursery.start_soon(larger.keeper.run)
        await cured(larger)
        assert await store.count("k/", "m") >= many
        await store.txn((), [Put("new", VALUE)])
        nursery.cancel_scope.cancel()


async def test_one_member_is_defragmented_at_a_time(tmp_path: Path) -> None:
    host = Host(tmp_path, 64 * MIB)
    host.voting.found()
    async with running(host) as store:
        for _ in range(20):
            await store.txn((), [Put("k", VALUE)])
        before = (await host.look()).file_bytes
        upkeep = host.voting.upkeep
        assert upkeep is not None
        await upkeep.compact((await host.look()).revision)
        await upkeep.compact((await host.look()).revision)  # again: it may be repeated
        lease = await store.grant(30.0)
        await store.txn((), [Put(store_space.TURN_KEY, b"", lease.lease_id)])
        with pytest.raises(Unavailable, match="another member"):
            await host.keeper._alone(upkeep, store)
        assert (await host.look()).file_bytes >= before
        await store.revoke(lease.lease_id)
        await host.keeper._alone(upkeep, store)
        assert (await host.look()).file_bytes < before / 2
        assert await store.get([store_space.TURN_KEY]) == {}
        assert await values(store, "k", "l") == {"k": VALUE}
