"""Readers of the journal: each goes on where it was, at another peer when one fails, and notices what is missing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import trio

from peer.errors import BitinglipError, Compacted
from peer.state.event import Event
from simulations.world.calls import Broken, Door, NoAnswer
from simulations.world.history import retry_after
from simulations.world.kernel import World

PAUSE_S_MAX: Final = 2.0
QUIET_S: Final = 1.0  # at the end: nothing comes for so long, so that all has been read
LAST_READ_S_MAX: Final = 60.0


class EventReaders:
    """`oldest` names the first event that is still kept; None: all are."""

    def __init__(
        self,
        world: World,
        door: Door,
        peers: Sequence[str],
        rng: random.Random,
        oldest: Callable[[], int] | None,
    ) -> None:
        self.checks: Counter[str] = Counter()
        self.sometimes: Counter[str] = Counter()
        self.newest = 0  # that anybody has seen
        self._world = world
        self._door = door
        self._peers = peers
        self._rng = rng
        self._oldest = oldest or (lambda: 1)
        self._seen: dict[int, tuple[str, str]] = {}

    async def follow(self, peer_id: str, since: int | None, for_s: float, busy_s: float) -> None:
        """For so long, being busy for `busy_s` with each event."""
        reader = _Reader(self, since, busy_s)
        end_at = trio.current_time() + for_s
        while (left_s := end_at - trio.current_time()) > 0.0:
            await reader.read(peer_id, left_s)
            peer_id = self._rng.choice(self._peers)

    async def read_all(self) -> None:
        """From the beginning to the newest that anybody has seen, at two peers; after the faults."""
        for peer_id in self._rng.sample(self._peers, min(2, len(self._peers))):
            reader = _Reader(self, self._oldest() - 1, 0.0)
            give_up_at = trio.current_time() + LAST_READ_S_MAX
            while reader.last is None or reader.last < self.newest:
                if trio.current_time() >= give_up_at:
                    self._world.violated(
                        "events_arrive",
                        f"{peer_id} gave events up to {reader.last}, others up to {self.newest}",
                    )
                if reader.last is None:
                    reader.last = self._oldest() - 1
                await reader.read(peer_id, QUIET_S)
            self.checks["events_arrive"] += 1

    # ------------------------------------------------------------ for its readers

    def took(self, last: int | None, event: Event) -> None:
        """`last` is the number of the event before it, None if this is the first."""
        self.checks["events_without_gap"] += 1
        if last is not None and event.id != last + 1:
            what = "gap" if event.id > last + 1 else "repeat"
            self._world.violated("events_without_gap", f"a {what}: event {event.id} came after {last}")
        told = (event.event, repr(sorted(event.data.items())))
        self.checks["events_never_change"] += 1
        if self._seen.setdefault(event.id, told) != told:
            text = f"event {event.id} was {self._seen[event.id]}, now {told}"
            self._world.violated("events_never_change", text)
        self.newest = max(self.newest, event.id)

    def compacted(self, since: int | None) -> None:
        self.checks["compacted_only_if_so"] += 1
        self.sometimes["events_compacted"] += 1
        if since is None or since + 1 >= self._oldest():
            text = f"events after {since} were refused, and {self._oldest()} is still kept"
            self._world.violated("compacted_only_if_so", text)

    async def pause(self, error: BaseException) -> None:
        self.sometimes["events_resumed"] += 1
        await trio.sleep(retry_after(error, PAUSE_S_MAX) * self._rng.uniform(0.2, 1.0))

    async def read_some(self, peer_id: str, reader: _Reader, limit_s: float) -> None:
        await self._door.read_events(peer_id, reader.last, reader.take, limit_s)


class _Reader:
    def __init__(self, readers: EventReaders, since: int | None, busy_s: float) -> None:
        self.last = since
        self._readers = readers
        self._busy_s = busy_s

    def take(self, event: Event) -> float:
        self._readers.took(self.last, event)
        self.last = event.id
        return self._busy_s

    async def read(self, peer_id: str, limit_s: float) -> None:
        """Until something goes wrong, or the time is up."""
        try:
            await self._readers.read_some(peer_id, self, limit_s)
        except Compacted:
            self._readers.compacted(self.last)
            self.last = None
        except (BitinglipError, NoAnswer, Broken) as error:
            with trio.move_on_after(limit_s):
                await self._readers.pause(error)
