"""Virtual time: a heap of events, a hash of everything that happened, and named sources of chance."""

from __future__ import annotations

import hashlib
import heapq
import random
import struct
from collections.abc import Callable
from typing import Any

WALL_BASE_S = 1_760_000_000.0  # what virtual second 0 is called on a correct wall clock


_EVENT = struct.Struct("<dq").pack


class Heap:
    """Events in order of time, then of being scheduled. `trace` grows with each event and each commit."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._made = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def random(self, name: str) -> random.Random:
        """A component's own source. Seeded by text, which Python hashes the same in every process."""
        return random.Random(f"{self.seed}/{name}")

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        self._made += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._made, call, args))

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        self.after(max(0.0, when - self.now), call, *args)

    def step(self) -> bool:
        """Run the next event. False: there is none."""
        if not self._heap:
            return False
        self.now, number, call, args = heapq.heappop(self._heap)
        self.events += 1
        self._hash.update(_EVENT(self.now, number))
        self._hash.update(call.__name__.encode())
        call(*args)
        return True

    def trace(self, text: str) -> None:
        """Add to the hash what a replay must reproduce."""
        self._hash.update(text.encode())

    def trace_bytes(self, value: bytes) -> None:
        self._hash.update(value)

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()
