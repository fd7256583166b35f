"""A process with a SqliteStore, for what can only be done to a process: kill it, or fail its disk.

python -m tests.contracts.sqlite_child write PATH NAME     commits for ever; a line "key revision" for each
python -m tests.contracts.sqlite_child break PATH HOW      see `break_disk`; "acknowledged N", then "ok"
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

import trio

from peer.adapters.clock import SystemClock
from peer.adapters.stores.sqlite_store import SqliteStore
from peer.errors import StoreBroken
from peer.ports import Put

FAIL_FILE_ENV = "BITINGLIP_TEST_FAIL_FILE"
WRITERS = 8


async def write_for_ever(path: Path, name: str) -> None:
    async with trio.open_nursery() as nursery:
        store = await SqliteStore.open(path, nursery, clock=SystemClock())

        async def write(writer: int) -> None:
            for number in count():
                key = f"{name}/{writer}/{number:06}"
                done = await store.txn((), [Put(f"a/{key}", key.encode()), Put(f"b/{key}", key.encode())])
                os.write(1, f"{key} {done.revision}\n".encode())

        for writer in range(WRITERS):
            nursery.start_soon(write, writer)


def fill_disk(path: Path) -> Callable[[], None]:
    """No file may grow by more than a little, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(f"{path}-wal") + 20_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_fsync(path: Path) -> Callable[[], None]:
    """Every fsync fails while the file exists that the preloaded library looks for."""
    flag = Path(os.environ[FAIL_FILE_ENV])
    flag.touch()
    return flag.unlink


async def must_be_broken(call: Callable[[], Awaitable[object]]) -> None:
    try:
        await call()
    except StoreBroken:
        return
    raise AssertionError("a broken store still answers")


async def break_disk(path: Path, how: Callable[[Path], Callable[[], None]]) -> None:
    async with trio.open_nursery() as nursery:
        store = await SqliteStore.open(path, nursery, clock=SystemClock())
        lease = await store.grant(60.0)
        acknowledged = 0

        async def write() -> None:
            nonlocal acknowledged
            await store.txn((), [Put(f"k/{acknowledged:04}", b"x" * 4000)])
            acknowledged += 1

        async def watch() -> None:
            async with store.watch("nothing/", 1) as batches:
                await anext(batches)

        for _ in range(5):
            await write()
        nursery.start_soon(must_be_broken, watch)
        repair = how(path)
        try:
            for _ in range(100):
                await write()
        except StoreBroken:
            repair()
        else:
            raise AssertionError("the disk is broken and commits go on")
        for _ in range(2):
            await must_be_broken(write)
            await must_be_broken(watch)
            await must_be_broken(lambda: store.commit(1, []))
            await must_be_broken(lambda: store.range("a", "z"))
            await must_be_broken(lambda: store.count("a", "z"))
            await must_be_broken(lambda: store.get(["a"]))
            await must_be_broken(lambda: store.grant(1.0))
            await must_be_broken(lambda: store.keepalive(lease.lease_id))
            await must_be_broken(lambda: store.revoke(lease.lease_id))
        print(f"acknowledged {acknowledged}", flush=True)
        await store.aclose()
    print("ok", flush=True)


if __name__ == "__main__":
    _, what, where, argument = sys.argv
    if what == "write":
        trio.run(write_for_ever, Path(where), argument)
    else:
        trio.run(break_disk, Path(where), {"full": fill_disk, "fsync": fail_fsync}[argument])
