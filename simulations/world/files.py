"""Simulated model files of one host: fetched at a rate, at times slowly or not at all."""

from __future__ import annotations

import trio

from peer.engines import FetchError, Progress
from peer.state.model import Model
from simulations.world.cards import GIB

STEPS = 5  # of a fetch: so often its progress is told


class SimFiles:
    """peer.engines.ModelFiles. One a host: what is on its disk outlives the peer's process."""

    def __init__(self, bytes_per_s: float = GIB / 2) -> None:
        self.on_disk: dict[str, None] = {}
        self._bytes_per_s = bytes_per_s
        self._failing = 0
        self._slow_until = -1.0
        self._slow_factor = 1.0

    # ------------------------------------------------------------ faults

    def fetch_fails(self, times: int = 1) -> None:
        """The next fetches fail half way."""
        self._failing += times

    def slow(self, factor: float, for_s: float) -> None:
        self._slow_factor, self._slow_until = factor, trio.current_time() + for_s

    def lose_disk(self) -> None:
        self.on_disk.clear()

    def mend(self) -> None:
        self._failing, self._slow_until = 0, -1.0

    # ------------------------------------------------------------ ModelFiles

    def local(self, model: Model) -> str | None:
        return _path(model) if model.name in self.on_disk else None

    async def fetch(self, model: Model, progress: Progress) -> str:
        if model.name in self.on_disk:
            return _path(model)
        failing = self._failing > 0
        self._failing -= failing
        size = model.size_bytes or GIB
        for step in range(STEPS):
            progress("fetch", size * step // STEPS, size)
            if failing and step >= STEPS // 2:
                raise FetchError("download_failed", f"{model.name} cannot be fetched: the server went away")
            slowdown = self._slow_factor if trio.current_time() < self._slow_until else 1.0
            await trio.sleep(size / STEPS / self._bytes_per_s * slowdown)
        self.on_disk[model.name] = None
        return _path(model)


def _path(model: Model) -> str:
    return f"/models/{model.name}"
