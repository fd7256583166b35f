"""A simulated engine: the real supervisor (peer.adapters.devices.engine_process) over a process that is only a model.

Starting, watching, restarting with backoff, quarantine and the order of what a worker is told are the peer's own
code. Replaced are the process, its socket and the tasks that serve them: one task an engine, which sleeps until the
process has something to do, a message comes or the silence has lasted too long.

A frozen peer's engine does nothing until the thaw and is then late with everything; a real one would go on, and its
peer would hear of that at the thaw too. What the real one leaves to chance is left to chance here: whether the
watchdog, late itself, looks before the messages that have come in the meantime.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import replace
from typing import Any, Literal, Protocol

import trio

from peer.adapters.devices.engine_process import WATCH_S, EngineLimits, EngineProcess, _End
from peer.engines import Device
from peer.ports import Clock
from simulations.world.cards import Profile, SimCard
from simulations.world.engine_work import EXIT_FAULT, Faults, Work, Wrong

REAP_S = (0.005, 0.05)  # from a process' end until its peer has collected it


class Life(Protocol):
    """What an engine needs of its peer's incarnation."""

    @property
    def alive(self) -> bool: ...


class _Process:
    """In the place of a subprocess.Popen: only its number is asked for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


class SimEngine(EngineProcess):
    """Implements peer.engines.EngineHandle."""

    def __init__(
        self,
        incarnation: Life,
        worker_id: str,
        card: SimCard,
        clock: Clock,
        rng: random.Random,
        profile: Profile,
        *,
        allowed: EngineLimits | None = None,
    ) -> None:
        device: Device = card.device
        super().__init__(
            worker_id, device, clock, slots_max=profile.slots_max, allowed=allowed or EngineLimits()
        )
        self.card = card
        self.faults = Faults()
        self.lives = 0
        self._incarnation = incarnation
        self._rng = rng
        self._profile = profile
        self._inbox: deque[Any] = deque()
        self._work: Work | None = None
        self._garbage = False
        self._early = False

    @property
    def alive(self) -> bool:
        """Whether a process holds the device: it dies with its peer's."""
        return self._work is not None and self._incarnation.alive

    # ------------------------------------------------------------ faults

    def die(self, status: int = EXIT_FAULT) -> None:
        """The process exits. Nothing happens if there is none."""
        if self._work is not None and self._work.exited is None:
            self._work.exited = status
            self._out_wake.set()

    def hang(self, for_s: float = math.inf) -> None:
        """It reads and says nothing, in this life only; the watchdog ends that if it lasts."""
        self.faults.hung_until = trio.current_time() + for_s
        self._out_wake.set()

    def slow(self, factor: float, for_s: float) -> None:
        self.faults.slow_factor, self.faults.slow_until = factor, trio.current_time() + for_s

    def ignore_cancel(self, for_s: float) -> None:
        self.faults.cancels_ignored_until = trio.current_time() + for_s

    def load_fails(self, times: int = 1) -> None:
        """The next loads fail half way: bad_model_file."""
        self.faults.loads_failing += times

    def out_of_memory_next_load(self, times: int = 1) -> None:
        self.faults.loads_without_memory += times

    def runs_fail(self, times: int = 1) -> None:
        """The next runs fail before they start: out_of_memory, retryable."""
        self.faults.runs_failing += times

    def self_test_fails(self, times: int = 1) -> None:
        """At the next starts the device computes wrongly. It is then in error until a restart is asked for."""
        self.faults.self_tests_failing += times

    def answers_wrong(self, kind: Wrong, times: int = 1) -> None:
        """The next results come twice, after a cancel, too late (5 s), or with some for a run that there is not."""
        self.faults.wrong[kind] = self.faults.wrong.get(kind, 0) + times

    def babbles(self, kind: Literal["garbage", "early"] = "garbage") -> None:
        """Bytes that are not the protocol; or, at the next start, a message before it is ready."""
        self._garbage |= kind == "garbage"
        self._early |= kind == "early"
        self._out_wake.set()

    def mend(self) -> None:
        """End every fault; what it has led to goes its way. One that hangs answers again."""
        mended = replace(Faults(), late_s=self.faults.late_s)
        self.faults.__dict__.update(mended.__dict__)
        self._garbage = self._early = False
        self._out_wake.set()

    # ------------------------------------------------------------ instead of a process

    def _queue(self, message: Any) -> None:
        self._inbox.append(message)
        self._out_frames += 1
        self._out_wake.set()

    def _finish(self, kind: Literal["died", "unusable", "restart", "stop"], reason: str) -> None:
        super()._finish(kind, reason)
        self._out_wake.set()

    async def _live(self) -> _End:
        """One life of a process, to its end and until the device is free."""
        if self._away_since is None:
            self._away_since = self._clock.now()
        self.lives += 1
        process: Any = _Process(1000 + self.lives)
        self._process = process
        self._begin_life()
        self._inbox.clear()
        self.faults.hung_until = -1.0
        slots, now = self._profile.slots_max, trio.current_time()
        self._work = work = Work(self._profile, self.card, self._rng, self.faults, slots, now)
        self.card.begin(self)
        try:
            await self._serve(work)
            end = self._end
            assert end is not None
            if end.kind in ("restart", "stop", "unusable") and work.exited is None:
                await self._exit()
            elif end.kind == "died":
                await trio.sleep(self._rng.uniform(*REAP_S))
            return end
        finally:
            self.card.end(self)
            self._work = self._process = None

    async def _exit(self) -> None:
        """As asked; one that hangs is killed when its time is up."""
        asked = trio.current_time()
        took_s = self._rng.uniform(*self._profile.exit_s)
        while (now := trio.current_time()) < asked + self._allowed.stop_s_max:
            ready = max(asked, self.faults.hung_until) + took_s
            if now >= ready:
                return
            self._out_wake = trio.Event()  # a hang may be mended
            with trio.move_on_at(min(ready, asked + self._allowed.stop_s_max)):
                await self._out_wake.wait()

    async def _serve(self, work: Work) -> None:
        planned = trio.current_time()
        while self._end is None:
            now = trio.current_time()
            late_s = max(0.0, now - planned)
            if late_s > WATCH_S and self._rng.random() < 0.5:
                self._look(now, late_s)
                late_s = 0.0
            self._hear(work, now)
            self._look(now, late_s)
            if self._end is not None:
                return
            planned = min(work.due(), self._heard_at + self._silence_s_max() + WATCH_S)
            with trio.move_on_at(planned):
                await self._out_wake.wait()
            self._out_wake = trio.Event()

    def _hear(self, work: Work, now: float) -> None:
        if self._end is not None:
            return
        waiting = len(self._inbox)
        batch = work.advance(now, self._inbox)
        self._out_frames -= waiting - len(self._inbox)
        if self._early:
            self._early = False
            self._finish("died", "it sent Heartbeat before it was ready")
        if batch and self._end is None:
            self._take(batch)
        if self._garbage:
            self._garbage = False
            self._finish("died", "it sent bytes that are not the protocol: simulated")
        if work.exited is not None:
            self._finish("died", f"it exited with status {work.exited}")
