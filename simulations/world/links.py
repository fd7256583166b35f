"""The state of the links between hosts: which way is open, how lossy, how slow; faults are laid over each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from simulations.errors import SimulatorError
from simulations.world.kernel import World

FLAP_S = (0.3, 3.0)  # a flapping fault is on, or off, for so long at a time
LOSS_MAX = 0.9


@dataclass(frozen=True)
class Link:
    """One direction between two hosts as it is now. `loss` is of a frame's packets, `factor` stretches latency."""

    is_open: bool
    loss: float
    factor: float


class Trouble:
    """One fault on the links that `on` names. It is there from its making until `end`."""

    def __init__(
        self, links: Links, on: Callable[[str, str], bool], cut: bool, loss: float, factor: float
    ) -> None:
        if not 0.0 <= loss <= LOSS_MAX or factor < 1.0:
            raise SimulatorError(f"loss {loss}, factor {factor}")
        self.on = on
        self.cut = cut
        self.loss = loss
        self.factor = factor
        self.active = True
        self.ended = False
        self._links = links

    def end(self) -> None:
        """Over; again is nothing."""
        if not self.ended:
            self.ended = True
            self._links.remove(self)

    def flap(self, active: bool) -> None:
        if not self.ended and self.active != active:
            self.active = active
            self._links.changed()


class Links:
    """Every link by (from, to). `watchers` hear of each change, after it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.rng("links")
        self._troubles: list[Trouble] = []
        self._down: dict[str, None] = {}
        self._cache: dict[tuple[str, str], Link] = {}
        self.watchers: list[Callable[[], None]] = []

    def link(self, source: str, target: str) -> Link:
        link = self._cache.get((source, target))
        if link is None:
            link = self._cache[source, target] = self._compose(source, target)
        return link

    def is_open(self, source: str, target: str) -> bool:
        return (self._cache.get((source, target)) or self.link(source, target)).is_open

    def both_open(self, one: str, other: str) -> bool:
        return self.link(one, other).is_open and self.link(other, one).is_open

    @property
    def all_open(self) -> bool:
        return not self._down and not any(each.cut and each.active for each in self._troubles)

    def host_down(self, peer_id: str) -> None:
        """The host has no power: it sends and answers nothing."""
        if peer_id not in self._down:
            self._down[peer_id] = None
            self.changed()

    def host_up(self, peer_id: str) -> None:
        if peer_id in self._down:
            del self._down[peer_id]
            self.changed()

    def add(
        self,
        on: Callable[[str, str], bool],
        *,
        cut: bool = False,
        loss: float = 0.0,
        factor: float = 1.0,
        for_s: float = 0.0,
        flapping: bool = False,
    ) -> Trouble:
        """`for_s` 0: until it is ended. `flapping`: now on, now off, FLAP_S each."""
        trouble = Trouble(self, on, cut, loss, factor)
        self._troubles.append(trouble)
        self.changed()
        if flapping:
            self._world.spawn(self._flap, trouble)
        if for_s > 0.0:
            self._world.spawn(self._end_later, trouble, for_s)
        return trouble

    def remove(self, trouble: Trouble) -> None:
        self._troubles.remove(trouble)
        self.changed()

    def mend(self) -> None:
        """End every trouble; hosts without power stay so."""
        for trouble in self._troubles:
            trouble.ended = True
        self._troubles.clear()
        self.changed()

    def changed(self) -> None:
        self._cache.clear()
        for watcher in self.watchers:
            watcher()

    def _compose(self, source: str, target: str) -> Link:
        is_open = source not in self._down and target not in self._down
        kept, factor = 1.0, 1.0
        if source != target:
            for trouble in self._troubles:
                if trouble.active and trouble.on(source, target):
                    is_open = is_open and not trouble.cut
                    kept *= 1.0 - trouble.loss
                    factor *= trouble.factor
        return Link(is_open, min(1.0 - kept, LOSS_MAX), factor)

    async def _flap(self, trouble: Trouble) -> None:
        while not trouble.ended:
            await trio.sleep(self._rng.uniform(*FLAP_S))
            trouble.flap(not trouble.active)

    async def _end_later(self, trouble: Trouble, seconds: float) -> None:
        await trio.sleep(seconds)
        trouble.end()
