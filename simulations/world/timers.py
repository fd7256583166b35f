"""Virtual time: a clock for trio's loop that jumps to the next moment, and waits that need no cancel scope.

A sleep by trio's own means is a scope with a deadline, that cancels what sleeps for ever within it. Most of what a
world does is to wait, so its sleeps are entries in the clock's own line instead, at half the price.
"""

from __future__ import annotations

import heapq
from math import inf
from typing import Any

import trio
import trio._core._run as trio_run
from trio.lowlevel import Abort, Task

from simulations.errors import SimulatorError

POLL_EVERY = 64  # rounds of the loop: nothing real is waited for but Ctrl-C


class Timer:
    """What is to wake a task. `task` is None once it was woken."""

    __slots__ = ("at", "task")

    def __init__(self, at: float, task: Task) -> None:
        self.at = at
        self.task: Task | None = task

    def wake(self) -> None:
        if self.task is not None:
            task, self.task = self.task, None
            trio.lowlevel.reschedule(task)


class VirtualClock(trio.abc.Clock):
    """Begins at 0.0 and stands still until nobody is runnable; then it jumps to what is due next."""

    def __init__(self) -> None:
        self._now = 0.0
        self._line: list[tuple[float, int, Timer]] = []
        self._number = 0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """trio asks when nobody is runnable, and for the next deadline of a scope: this is where time passes."""
        line = self._line
        while line and line[0][2].task is None:
            heapq.heappop(line)
        due = min(deadline, line[0][0]) if line else deadline
        if due == inf or trio_run.GLOBAL_RUN_CONTEXT.runner.waiting_for_idle:
            return inf
        self._now = max(self._now, due)
        while line and line[0][0] <= self._now:
            heapq.heappop(line)[2].wake()
        return 0.0

    def set(self, timer: Timer, at: float) -> None:
        """Wake it then, if nothing has woken it before."""
        timer.at = at
        if at < inf:
            self._number += 1
            heapq.heappush(self._line, (at, self._number, timer))


def the_clock() -> VirtualClock:
    clock = trio.lowlevel.current_clock()
    if not isinstance(clock, VirtualClock):
        raise SimulatorError("this needs a world's own clock")
    return clock


async def sleep(seconds: float) -> None:
    """As trio.sleep."""
    if seconds < 0.0:
        raise ValueError("`seconds` must be non-negative")
    await sleep_until(trio.current_time() + seconds)


async def sleep_until(deadline: float) -> None:
    """As trio.sleep_until."""
    clock = the_clock()
    if deadline <= clock.current_time():
        await trio.lowlevel.checkpoint()
        return
    timer = Timer(inf, trio.lowlevel.current_task())
    clock.set(timer, deadline)

    def abort(_: Any) -> Abort:
        timer.task = None
        return Abort.SUCCEEDED

    await trio.lowlevel.wait_task_rescheduled(abort)


class Bell:
    """Tasks wait here for its ring, or for a moment that may be brought forward meanwhile."""

    def __init__(self) -> None:
        self._timers: list[Timer] = []

    def __len__(self) -> int:
        """How many wait."""
        return len(self._timers)

    async def wait(self, until: float = inf) -> None:
        """Returns at once, but for a checkpoint, if that is over."""
        clock = the_clock()
        if until <= clock.current_time():
            await trio.lowlevel.checkpoint()
            return
        timer = Timer(inf, trio.lowlevel.current_task())
        clock.set(timer, until)
        self._timers.append(timer)

        def abort(_: Any) -> Abort:
            timer.task = None
            return Abort.SUCCEEDED

        try:
            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            if timer in self._timers:  # it was not the ring
                self._timers.remove(timer)

    def ring(self) -> None:
        """Everybody goes on."""
        timers, self._timers = self._timers, []
        for timer in timers:
            timer.wake()

    def ring_by(self, at: float) -> None:
        """Everybody goes on then at the latest."""
        for timer in self._timers:
            if at < timer.at:
                the_clock().set(timer, at)


class RarelyPolled:
    """trio's I/O manager, which is asked for real events now and then only: no task of a world waits for any."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._rounds = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def get_events(self, timeout: float) -> Any:
        self._rounds += 1
        if timeout > 0.0 or self._rounds % POLL_EVERY == 0:
            return self._manager.get_events(timeout)
        return ()

    def process_events(self, events: Any) -> None:
        if events:
            self._manager.process_events(events)
