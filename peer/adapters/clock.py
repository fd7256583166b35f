"""The host's own time and randomness."""

from __future__ import annotations

import random
import secrets
import time

import trio


class SystemClock:
    """`peer.ports.Clock` over CLOCK_BOOTTIME, which goes on while the host is suspended.

    The wall clock is read once. A step of it (NTP, an operator) later on is not followed: times that the
    peer writes down keep their order and distance until it restarts.
    """

    def __init__(self) -> None:
        self._wall_minus_now = time.time() - self.now()

    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        return self._wall_minus_now + self.now()

    async def sleep(self, seconds: float) -> None:
        """Suspended time does not count here: who waits for a moment looks at `now` again."""
        await trio.sleep(max(seconds, 0.0))


class SystemEntropy:
    """`peer.ports.Entropy` from the operating system."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def token(self, nbytes: int) -> str:
        return secrets.token_hex(nbytes)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)
