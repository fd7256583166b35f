"""The store of a cluster, asked behind the peers' backs, at the member of one host."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from peer.adapters.stores.etcd_member import SOCKET
from peer.adapters.stores.etcd_store import EtcdStore
from peer.errors import BitinglipError, Compacted, Unavailable
from peer.ports import LEADER_KEY, Compare, Delete, Put
from tests.process.cluster import faults
from tests.process.cluster.member import Member

ASK_S_MAX: Final = 5.0
KEYS: Final = tuple(f"of-a-test/{number}" for number in range(8))  # the history of one key takes room, too
PIECE_BYTES: Final = 1024 * 1024
SWELL_S_MAX: Final = 30.0
LEASED_KEY: Final = "of-a-test/leased"
LEASE_S_MAX: Final = 60.0
LEADER_POLL_S: Final = 0.02
PAUSE_S: Final = 0.2

_NONE: Final = [Delete(key) for key in KEYS]


@contextmanager
def _address(member: Member) -> Iterator[str]:
    """Of its store member; by a descriptor, since the path of a socket has to be short. Raises Unavailable."""
    found = faults.having(member.host, "etcd")
    if not found:
        raise Unavailable(f"{member.host.name} has no store member that runs")
    folder = found[0].cwd()
    descriptor = os.open(member.host.seen(Path(folder)), os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"unix:/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


@asynccontextmanager
async def _opened(address: str) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(address)
    try:
        yield store
    finally:
        await store.aclose()


def answers(member: Member) -> bool:
    """Whether this host's member runs and is one of a quorum."""

    async def ask(address: str) -> bool:
        async with _opened(address) as store:
            with trio.move_on_after(ASK_S_MAX):
                await store.get([LEADER_KEY])
                return True
        return False

    try:
        with _address(member) as address:
            return trio.run(ask, address)
    except BitinglipError:
        return False


def takes_write(member: Member, epoch: int) -> bool:
    """Whether a leader of this epoch could write now, at this host's member. What is tried changes nothing."""

    async def write(address: str) -> bool:
        async with _opened(address) as store:
            with trio.fail_after(ASK_S_MAX):
                holds = [Compare(LEADER_KEY, "create_revision", epoch)]
                return (await store.txn(holds, _NONE)).succeeded

    with _address(member) as address:
        return trio.run(write, address)


def leader(member: Member) -> str:
    """The host whose member leads the store's own elections, as this host's member knows it; "" if it knows none."""

    async def ask(address: str) -> str:
        async with _opened(address) as store:
            with trio.fail_after(ASK_S_MAX):
                leading = (await store.client.status()).leader
                named = {each.member_id: each.name for each in await store.client.members()}
                return named.get(leading, "")

    with _address(member) as address:
        return trio.run(ask, address)


def await_next_leader(member: Member, old: str) -> float:
    """The monotonic time at which this host's member names another leader of the store's own elections than `old`."""

    async def wait(address: str) -> float:
        async with _opened(address) as store:
            named = {each.member_id: each.name for each in await store.client.members()}
            with trio.fail_after(LEASE_S_MAX):
                while True:
                    if named.get((await store.client.status()).leader, "") not in ("", old):
                        return time.monotonic()
                    await trio.sleep(LEADER_POLL_S)

    with _address(member) as address:
        return trio.run(wait, address)


def await_lease_end(member: Member, ttl_s: float, begun: Callable[[], None]) -> float:
    """Hold a key by a lease that is kept alive just before `begun` is called and never after; the monotonic time at
    which this host's member tells that the key has gone."""

    async def wait(address: str) -> float:
        async with _opened(address) as store:
            lease = await store.grant(ttl_s)
            put = await store.txn([], [Put(LEASED_KEY, b"", lease.lease_id)])
            async with store.watch(LEASED_KEY, put.revision + 1) as batches:
                await store.keepalive(lease.lease_id)
                begun()
                with trio.fail_after(LEASE_S_MAX):
                    await anext(batches)
                    return time.monotonic()

    with _address(member) as address:
        return trio.run(wait, address)


def defragment(member: Member) -> None:
    """Its file holds no more than what is there now, so that it has to grow soon. Raises Unavailable."""

    async def ask(address: str) -> None:
        async with _opened(address) as store:
            status = await store.client.status()
            with suppress(Compacted):
                await store.client.compact(status.header.revision, physical=True)
            await store.client.defragment()

    with _address(member) as address:
        trio.run(ask, address)


def swell(member: Member, pieces: int) -> None:
    """Write so many MiB more than the store's file has room for, so that every member's disk has to give some."""

    async def write(address: str) -> None:
        async with _opened(address) as store:
            status = await store.client.status()
            room = (status.db_bytes - status.db_bytes_in_use) // PIECE_BYTES
            with trio.move_on_after(SWELL_S_MAX):
                for number in range(room + pieces):
                    try:
                        await store.txn([], [Put(KEYS[number % len(KEYS)], os.urandom(PIECE_BYTES))])
                    except BitinglipError:
                        await trio.sleep(PAUSE_S)  # the store's leader may be the one that is full

    with _address(member) as address:
        trio.run(write, address)


def shrink(member: Member) -> None:
    """What `swell` wrote goes again; tried until the store answers."""

    async def write(address: str) -> None:
        async with _opened(address) as store:
            with trio.fail_after(SWELL_S_MAX):
                while True:
                    try:
                        await store.txn([], _NONE)
                        return
                    except BitinglipError:
                        await trio.sleep(PAUSE_S)

    with _address(member) as address:
        trio.run(write, address)
