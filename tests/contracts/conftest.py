"""The SQLite store for the contract suite and its own tests; virtual time for classes with `virtual_time`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from peer.adapters.stores.sqlite_store import SqliteStore
from peer.ports import Store
from tests.contracts.store import StoreFactory, put

RING_BATCHES = 256
RING_BYTES = 100_000


class ManualClock:
    """Goes on when told; who sleeps until then wakes."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._advanced = trio.lowlevel.ParkingLot()

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        end = self._now + seconds
        await trio.lowlevel.checkpoint()
        while self._now < end:
            await self._advanced.park()

    def advance(self, seconds: float) -> None:
        self._now += seconds
        self._advanced.unpark_all()


class SqliteFactory(StoreFactory):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = ManualClock()

    async def open(self, nursery: trio.Nursery) -> Store:
        return await SqliteStore.open(
            self.path,
            nursery,
            clock=self.clock,
            ring_batches_max=RING_BATCHES,
            ring_bytes_max=RING_BYTES,
            busy_timeout_s=0.2,
        )

    async def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def forget_history(self, store: Store) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(RING_BATCHES + 1):
                nursery.start_soon(put, store, "filler")


@pytest.fixture
def store_factory(tmp_path: Path) -> SqliteFactory:
    return SqliteFactory(tmp_path / "store.db")


@pytest.fixture
async def store(store_factory: SqliteFactory, nursery: trio.Nursery) -> AsyncIterator[Store]:
    store = await store_factory.open(nursery)
    yield store
    await store.aclose()


def run_virtually(fn: Any, *, clock: Any = None, instruments: Any = ()) -> Any:
    """pytest-trio takes a clock from a test's own arguments alone, which those of a suite do not have."""
    return trio.run(fn, clock=clock or trio.testing.MockClock(autojump_threshold=0), instruments=instruments)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(getattr(item, "cls", None), "virtual_time", False):
            item.add_marker(pytest.mark.trio(run=run_virtually), append=False)  # before pytest-trio's own
