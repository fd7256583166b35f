"""The simulated store: durable keys in order, written in whole transactions. Its reads never wait."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from peer.ports import KeyValue, Page
from peer.state.snapshot import StoreWrites
from simulations.errors import SimulatorError

T = TypeVar("T")


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never really waits, without any event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise SimulatorError("code that must not wait has waited")


class StandingClock:
    """What `load_snapshot` needs of peer.ports.Clock."""

    def __init__(self, wall: float) -> None:
        self._wall = wall

    def now(self) -> float:
        return self._wall

    def wall(self) -> float:
        return self._wall

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError


class SimStore:
    """The reading part of peer.ports.Store, so that `peer.establish` loads from it, and `apply`."""

    def __init__(self, stored: Callable[[StoreWrites], None]) -> None:
        self._values: dict[str, bytes] = {}
        self._keys: list[str] = []
        self._stored = stored
        self.revision = 0
        self.epoch = 0

    def value(self, key: str) -> bytes | None:
        return self._values.get(key)

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def apply(self, writes: StoreWrites) -> None:
        """One transaction, all of it."""
        self._stored(writes)
        self.revision += 1
        for key, value in writes.items():
            if value is None:
                if key in self._values:
                    del self._values[key]
                    del self._keys[bisect_left(self._keys, key)]
            else:
                if key not in self._values:
                    insort(self._keys, key)
                self._values[key] = value

    def keys(self, start: str, end: str, limit: int = 0) -> list[str]:
        first, last = bisect_left(self._keys, start), bisect_left(self._keys, end)
        return self._keys[first : min(last, first + limit) if limit else last]

    async def range(
        self, start: str, end: str, *, limit: int = 0, offset: int = 0, keys_only: bool = False
    ) -> Page:
        found = self.keys(start, end)[offset:]
        taken = found[:limit] if limit else found
        items = tuple(KeyValue(key, b"" if keys_only else self._values[key], 1, 1) for key in taken)
        return Page(items, self.revision, more=len(taken) < len(found))

    async def count(self, start: str, end: str) -> int:
        return bisect_left(self._keys, end) - bisect_left(self._keys, start)

    async def get(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        return {key: KeyValue(key, self._values[key], 1, 1) for key in keys if key in self._values}

    async def peek(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        return await self.get(keys)
