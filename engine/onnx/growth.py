"""How much memory a model may take while it is loaded: its operators can ask for any, and compute it from its data.

Nothing tells beforehand: shapes come out of other operators, and some become lists that only Python sees. So what is
taken is counted: tinygrad's buffers as they are allocated, all else by the kernel (RLIMIT_DATA).
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinygrad.device import Allocator

from engine.device import host_memory

SPARE_BYTES = 1 << 30  # for what does not grow with a model: libraries, graphs, compilers
_HOST = "CPU"


class Growth:
    """What may be taken beyond what is taken now: `most` bytes of the host, which must have them, and of a device."""

    def __init__(self, most: int) -> None:
        self.most = min(most, host_memory("MemAvailable"))
        self._private = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        self._taken: Counter[str] = Counter()  # of buffers, by kind of device

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Within it whoever takes more gets MemoryError. On the device's thread; it bounds the other threads too."""
        alloc, free = Allocator.alloc, Allocator.free
        before = resource.getrlimit(resource.RLIMIT_DATA)

        def counted_alloc(allocator: Any, size: int, options: Any = None) -> Any:
            taken = self._taken[_kind(allocator)] + size
            if taken > self.most:
                raise MemoryError(f"{taken} bytes of {_kind(allocator)} wanted, and {self.most} are allowed")
            found = alloc(allocator, size, options)
            self._count(allocator, size, before)
            return found

        def counted_free(allocator: Any, opaque: Any, size: int, options: Any = None) -> None:
            free(allocator, opaque, size, options)
            self._count(allocator, -size, before)

        Allocator.alloc, Allocator.free = counted_alloc, counted_free
        try:
            self._limit(before)
            yield
        finally:
            Allocator.alloc, Allocator.free = alloc, free
            resource.setrlimit(resource.RLIMIT_DATA, before)

    def _count(self, allocator: Any, size: int, before: tuple[int, int]) -> None:
        self._taken[_kind(allocator)] += size
        if _kind(allocator) == _HOST:
            self._limit(before)

    def _limit(self, before: tuple[int, int]) -> None:
        """What the buffers in the host's memory leave to all else there: RLIMIT_DATA does not count them."""
        left = self._private + self.most - max(0, self._taken[_HOST])
        soft = min(limit for limit in (left, *before) if limit != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))


def _kind(allocator: Any) -> str:
    return str(allocator.dev.device).partition(":")[0]
