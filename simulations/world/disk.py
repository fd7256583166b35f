"""The small files of a host: what is durable, what only looks so, and every way in which writing fails.

`write_durably` is what the product does with a temporary file, fsync, and rename: all or nothing. `append` and `sync`
are for what is written in place: what was not synced survives the end of the process, not that of the host, after
which a part of it may be there. Calls are synchronous, as in the product: a slow disk freezes the calling process at
its next checkpoint, and what dies meanwhile may or may not have written. A failed fsync leaves the data unsynced, to
be tried again (Linux would pretend that a second one succeeds). Not modelled: latent corruption, directories, sizes.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import trio

from simulations.errors import SimulatorError
from simulations.world.kernel import Incarnation, World, current_incarnation


@dataclass
class _Write:
    """One that is not done before `done_at`; `before` is what the file was."""

    name: str
    before: bytes | None
    done_at: float


class SimDisk:
    """One host's, across its lives. A dead process's calls raise OSError and do nothing."""

    def __init__(self, world: World, peer_id: str) -> None:
        self._world = world
        self._peer_id = peer_id
        self._rng = world.rng(f"{peer_id}/disk")
        self._synced: dict[str, bytes] = {}
        self._tails: dict[str, bytes] = {}  # appended, not synced
        self._pending: list[_Write] = []
        self._watched: Incarnation | None = None
        self._full = False
        self._fsync_errors = 0
        self._torn = 0
        self._slow_s = 0.0
        self._slow_until = 0.0

    # ---------------------------------------------------------------- what processes do

    def read(self, name: str) -> bytes | None:
        """The file as the kernel shows it; None if there is none."""
        if name not in self._synced and name not in self._tails:
            return None
        return self._synced.get(name, b"") + self._tails.get(name, b"")

    def write_durably(self, name: str, data: bytes) -> None:
        """Replace the file. On OSError it is as it was."""
        process = self._begin()
        if self._takes_torn():
            self._kill(process)
        self._fsync()
        before = self.read(name)
        self._synced[name] = bytes(data)
        self._tails.pop(name, None)
        self._waits(process, name, before)

    def append(self, name: str, data: bytes) -> None:
        """At the file's end, not yet durable."""
        process = self._begin()
        if self._takes_torn():
            self._tails[name] = self._tails.get(name, b"") + data[: self._rng.randrange(len(data) + 1)]
            self._kill(process)
        self._tails[name] = self._tails.get(name, b"") + data

    def sync(self, name: str) -> None:
        """What was appended is durable on return."""
        process = self._begin()
        self._fsync()
        before = self._synced.get(name)
        self._synced[name] = self._synced.get(name, b"") + self._tails.pop(name, b"")
        self._waits(process, name, before)

    def delete(self, name: str) -> None:
        """Nothing if there is none."""
        self._begin()
        self._synced.pop(name, None)
        self._tails.pop(name, None)

    # ---------------------------------------------------------------- faults

    def fill(self, full: bool) -> None:
        """Nothing can be written while it is full."""
        self._full = full

    def fsync_fails(self, times: int) -> None:
        self._fsync_errors += times

    def tear(self, times: int) -> None:
        """The process is killed in the middle of so many of the coming writes."""
        self._torn += times

    def slow(self, seconds: float, for_s: float) -> None:
        """Each durable write blocks its process for so many seconds."""
        self._slow_s = seconds
        self._slow_until = trio.current_time() + for_s

    def lose(self) -> None:
        """A new, empty disk. The host must be down."""
        if self._watched is not None and self._watched.alive:
            raise SimulatorError(f"{self._watched.name} runs on the disk that is lost")
        self._world.count("disk: lost")
        self._synced.clear()
        self._tails.clear()
        self._pending.clear()

    def mend(self) -> None:
        """End every fault."""
        self._full = False
        self._fsync_errors = self._torn = 0
        self._slow_until = 0.0

    # ---------------------------------------------------------------- how

    def _begin(self) -> Incarnation | None:
        """The process that calls, which must live; its death is watched. None is the world itself."""
        process = current_incarnation()
        if process is not None:
            if not process.alive:
                raise OSError(errno.EIO, f"{process.name} is dead")
            if process.peer_id != self._peer_id:
                raise SimulatorError(f"{process.name} uses the disk of {self._peer_id}")
            if self._watched is not process:
                self._watched = process
                process.on_death(self._died)
        if self._full:
            self._world.count("disk: full")
            raise OSError(errno.ENOSPC, "no space left on device")
        return process

    def _fsync(self) -> None:
        if self._fsync_errors:
            self._fsync_errors -= 1
            self._world.count("disk: fsync error")
            raise OSError(errno.EIO, "fsync failed")

    def _takes_torn(self) -> bool:
        if not self._torn:
            return False
        self._torn -= 1
        self._world.count("disk: torn write")
        return True

    def _kill(self, process: Incarnation | None) -> None:
        if process is not None:
            process.crash()
        raise OSError(errno.EIO, "killed while writing")

    def _waits(self, process: Incarnation | None, name: str, before: bytes | None) -> None:
        now = trio.current_time()
        self._pending = [each for each in self._pending if each.done_at > now]
        if process is not None and now < self._slow_until:
            self._world.count("disk: slow write")
            begins = max([now, *(each.done_at for each in self._pending)])
            self._pending.append(_Write(name, before, begins + self._slow_s))
            process.freeze_for(begins + self._slow_s - now, "slow disk")

    def _died(self, how: str) -> None:
        """Of the writes under way the first few are done; of what was never synced, after a loss of power, a part."""
        now = trio.current_time()
        pending = [each for each in self._pending if each.done_at > now]
        done = self._rng.randint(0, len(pending))
        for write in reversed(pending[done:]):
            self._world.count("disk: a write was cut short")
            if write.before is None:
                self._synced.pop(write.name, None)
            else:
                self._synced[write.name] = write.before
        self._pending.clear()
        if how == "power":
            for name, tail in self._tails.items():
                kept = tail[: self._rng.randrange(len(tail) + 1)]
                if name in self._synced or kept:
                    self._synced[name] = self._synced.get(name, b"") + kept
            self._tails.clear()
