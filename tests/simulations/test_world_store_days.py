"""Commits through bad days of the simulated store, against what it applied."""

from __future__ import annotations

from typing import Any

import trio

from peer.errors import Ambiguous, NotFound, StoreError, Unavailable
from peer.ports import LEADER_KEY, Compare, Put, Write
from simulations.world.kernel import Incarnation, World, run_world
from simulations.world.store import SimStore
from tests.simulations.store_setup import TTL_S, VOTERS, Setup


class Day:
    """Voters that campaign and commit numbered batches, tried again for a while, through random faults."""

    def __init__(self, s: Setup) -> None:
        self.s = s
        self.rng = s.world.rng("day")
        self.applied: dict[str, int] = {}  # batch: its place in the log
        self.acknowledged: dict[str, int] = {}
        self.unsent: set[str] = set()
        self.order: dict[int, list[str]] = {}
        self.processes: dict[str, Incarnation] = {}
        self.kinds: dict[str, int] = {}
        s.model.on_applied.append(self._told)

    def _told(self, revision: int, writes: tuple[Write, ...], epoch: int | None, peer_id: str) -> None:
        for write in writes:
            if write.key == "name" and isinstance(write, Put):
                name = write.value.decode()
                assert name not in self.applied, "twice"
                assert epoch == self.s.model.data[LEADER_KEY].create_revision
                assert name.startswith(f"{epoch}:")
                self.applied[name] = revision

    async def life(self, store: SimStore) -> None:
        """A process: it leads when it can, until a fence or a fault ends it."""
        while True:
            try:
                await self.leadership(store)
            except (StoreError, Unavailable, NotFound) as error:
                self.kinds[type(error).__name__] = self.kinds.get(type(error).__name__, 0) + 1
            await trio.sleep(self.rng.uniform(0.1, 2.0))

    async def leadership(self, store: SimStore) -> None:
        lease = await store.grant(TTL_S)
        vacant = [Compare(LEADER_KEY, "create_revision", 0)]
        won = await store.txn(vacant, [Put(LEADER_KEY, store.peer_id.encode(), lease.lease_id)])
        if not won.succeeded:
            return
        epoch, number = won.revision, 0
        while True:
            number += 1
            name = f"{epoch}:{number}"
            self.order.setdefault(epoch, []).append(name)
            writes = [Put("name", name.encode()), Put(f"n/{number % 5}", b"")]
            for tries in range(self.rng.choice([1, 3, 8])):
                try:
                    self.acknowledged[name] = await store.commit(epoch, writes)
                    break
                except Unavailable:
                    assert tries == 0 or name in self.unsent, "ambiguous before, and now it was never sent"
                    self.unsent.add(name)
                except Ambiguous:
                    self.unsent.discard(name)
                await trio.sleep(0.1)
            else:
                return
            self.unsent.discard(name)
            if number % 5 == 0:
                await store.keepalive(lease.lease_id)
            await trio.sleep(self.rng.uniform(0.0, 0.2))

    async def run(self, seconds: float) -> None:
        for name in VOTERS:
            self.start(name)
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            await trio.sleep(self.rng.uniform(0.2, 3.0))
            await self.fault()
        self.mend()
        before = len(self.acknowledged)
        await trio.sleep(30)
        assert len(self.acknowledged) > before + 10, "it does not go on after the faults"

    def start(self, name: str) -> None:
        process = self.processes[name] = self.s.process(name)
        self.s.world.spawn(process.run, self.life, self.s.store(name, process))

    async def fault(self) -> None:
        rng, model = self.rng, self.s.model
        name = rng.choice(VOTERS)
        match rng.randrange(11):
            case 0:
                self.s.isolate(name)
            case 1:
                model.member_down(name)
            case 2:
                model.move_leader()
            case 3:
                model.time_outs(rng.uniform(0.05, 0.5))
            case 4:
                self.processes[name].crash()
                self.start(name)
            case 5:
                self.processes[name].freeze()
                await trio.sleep(rng.uniform(0.0, 2 * TTL_S))
                self.processes[name].thaw()
            case 6:
                model.slow(rng.choice([5, 100, 400]))
            case 7:
                model.quorum_lost(True)
                await trio.sleep(rng.uniform(0.1, 4))
                model.quorum_lost(False)
            case 8:
                model.no_space(True)
                await trio.sleep(rng.uniform(0.1, 1))
                model.no_space(False)
            case _:
                self.mend()

    def mend(self) -> None:
        self.s.cut.clear()
        self.s.model.mend()

    def check(self) -> None:
        assert self.acknowledged.items() <= self.applied.items(), "acknowledged at another revision, or never"
        assert not self.unsent & set(self.applied), "applied, though it was said not to be sent"
        epochs = [int(name.partition(":")[0]) for name in self.applied]
        assert epochs == sorted(epochs), "an older epoch's after a newer one's"
        for epoch, order in self.order.items():
            mine = [name for name in self.applied if name.startswith(f"{epoch}:")]
            assert mine == [name for name in order if name in self.applied], "out of order"


def bad_day(seed: int, seconds: float = 120) -> tuple[Any, ...]:
    async def main(world: World) -> tuple[Any, ...]:
        day = Day(Setup(world))
        await day.run(seconds)
        day.check()
        return tuple(day.applied.items()), len(day.order), len(day.acknowledged), day.kinds

    return run_world(main, seed)


def test_commits_through_bad_days_take_effect_once_and_in_order() -> None:
    epochs, acknowledged, kinds = 0, 0, set[str]()
    for seed in range(25):
        _, led, told, met = bad_day(seed)
        epochs += led
        acknowledged += told
        kinds |= met.keys()
    assert epochs > 100
    assert acknowledged > 2_000
    assert kinds >= {"Fenced", "Ambiguous", "Unavailable"}


def test_the_same_seed_is_the_same_day() -> None:
    assert bad_day(7) == bad_day(7)
    assert bad_day(7) != bad_day(8)
