"""What a process holds in memory, sampled from outside while it works."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import NamedTuple

SAMPLE_S = 0.02
_FIELDS = re.compile(r"Rss(Anon|Shmem|File):\s+(\d+) kB")


class Held(NamedTuple):
    """Bytes. A CPU device's buffers are shared memory; mapped files are the page cache's."""

    anonymous: int
    files: int
    shared: int

    @property
    def own(self) -> int:
        return self.anonymous + self.shared


def held(pid: int) -> Held:
    """Raises OSError when the process is gone."""
    found = dict(_FIELDS.findall(Path(f"/proc/{pid}/status").read_text()))
    return Held(*(int(found.get(name, 0)) * 1024 for name in ("Anon", "File", "Shmem")))


class Watched:
    """A block during which a process is sampled: how it was `before`, at most (`peak_own`) and `after`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = self.after = held(pid)
        self.peak_own = self.before.own

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while not self._done.wait(SAMPLE_S):
                self.peak_own = max(self.peak_own, held(self._pid).own)
            self.after = held(self._pid)
        except (OSError, ValueError):
            return
