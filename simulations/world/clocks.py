"""Time and chance as a peer sees them: a clock that runs a little fast or slow, a wall clock that may be wrong.

`now` counts from the host's boot and never jumps. `wall` is anchored when a process starts, as the port promises: a
host's wall clock that is set meanwhile is seen by its next life only. Timeouts that the product hands to trio itself
(`trio.move_on_after`) run on true time; only what goes through the Clock port drifts. A frozen process needs nothing
here: time goes on without it.
"""

from __future__ import annotations

import random

import trio

from simulations.errors import SimulatorError
from simulations.world.kernel import Incarnation

WALL_START_S = 1_767_225_600.0  # 2026-01-01T00:00:00Z: the wall clock of a right host as a run begins
DRIFT_MAX = 0.01
OVERSHOOT_S = 50e-6  # real timers end late, never early


class HostClock:
    """A host's clock, which outlives its processes. `drift` 0.0002: 200 ppm fast; `wall_error_s`: how wrong it is."""

    def __init__(self, rng: random.Random, *, drift: float = 0.0, wall_error_s: float = 0.0) -> None:
        self._boot_s = rng.uniform(1_000.0, 10_000_000.0)
        self._began_s = trio.current_time()
        self._drift = 0.0
        self.wall_error_s = wall_error_s
        self.set_drift(drift)

    def set_drift(self, drift: float) -> None:
        """From now on, without a jump."""
        if abs(drift) > DRIFT_MAX:
            raise SimulatorError(f"drift {drift} is beyond {DRIFT_MAX}")
        self._boot_s = self.boottime()
        self._began_s = trio.current_time()
        self._drift = drift

    def jump_wall(self, seconds: float) -> None:
        """The wall clock is set; processes that run keep the time they were anchored to."""
        self.wall_error_s += seconds

    def mend(self) -> None:
        """A right clock from here on; for the wall, from the next life on."""
        self.set_drift(0.0)
        self.wall_error_s = 0.0

    def boottime(self) -> float:
        return self._boot_s + (trio.current_time() - self._began_s) * (1.0 + self._drift)

    def true_seconds(self, seconds: float) -> float:
        """How long it takes until this clock has advanced by so many seconds."""
        return seconds / (1.0 + self._drift)

    def port(self, incarnation: Incarnation) -> SimClock:
        return SimClock(incarnation, self)


class SimClock:
    """peer.ports.Clock of one life."""

    def __init__(self, incarnation: Incarnation, host: HostClock) -> None:
        self._incarnation = incarnation
        self._host = host
        self._anchor_now = host.boottime()
        self._anchor_wall = WALL_START_S + trio.current_time() + host.wall_error_s

    def now(self) -> float:
        return self._host.boottime()

    def wall(self) -> float:
        return self._anchor_wall + (self._host.boottime() - self._anchor_now)

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0.0:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(self._host.true_seconds(seconds) + OVERSHOOT_S)


class SimEntropy:
    """peer.ports.Entropy from a seeded source."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def token(self, nbytes: int) -> str:
        return self._rng.randbytes(nbytes).hex()

    def uniform(self, low: float, high: float) -> float:
        return self._rng.uniform(low, high)
