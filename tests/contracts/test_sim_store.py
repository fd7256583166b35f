"""The simulated store against the contract, under virtual time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio

from peer.errors import Compacted
from peer.ports import Put, Store
from simulations.world.etcd import HISTORY_MAX
from simulations.world.store import EtcdModel, SimStore
from tests.contracts.model import put
from tests.contracts.store import StoreContract, StoreFactory


class Alive:
    peer_id = "h1"
    alive = True


class RunningStore(SimStore):
    """What goes on by itself ends with the store: a test's nursery waits for it."""

    running: trio.CancelScope

    async def aclose(self) -> None:
        await super().aclose()
        self.running.cancel()


class SimFactory(StoreFactory):
    def __init__(self) -> None:
        self.model = EtcdModel(["h1", "h2", "h3"], random.Random("model"))
        self.opened = 0

    async def open(self, nursery: trio.Nursery) -> Store:
        self.opened += 1
        store = RunningStore(self.model, Alive(), random.Random(f"store {self.opened}"), strict=False)
        store.running = trio.CancelScope()

        async def run() -> None:
            with store.running:
                await self.model.run()

        nursery.start_soon(run)
        return store

    async def pass_time(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def forget_history(self, store: Store) -> None:
        self.model.compact_all()


class TestSimStore(StoreContract):
    """The contract."""

    virtual_time = True  # see conftest

    @pytest.fixture
    def store_factory(self) -> SimFactory:
        return SimFactory()


async def test_history_is_bounded(autojump_clock: Any) -> None:
    factory = SimFactory()
    async with trio.open_nursery() as nursery:
        store = await factory.open(nursery)
        first = await put(store, "a")
        for _ in range(HISTORY_MAX):
            factory.model.apply_txn((), [Put("a", b"")], (), "h1")
        assert factory.model.compacted == first
        with pytest.raises(Compacted):
            async with store.watch("", first):
                pass
        await store.aclose()
