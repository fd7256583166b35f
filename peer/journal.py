"""The journal of events: written by the leader with the changes they tell of, read by whoever subscribes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import trio

from peer import limits
from peer.errors import Compacted, Overloaded, Unavailable
from peer.ports import Store
from peer.state.event import Event
from peer.state.record import decode, prefix_end

_PREFIX = "event/"
_PAGE = 500


class Journal:
    """Durable events by their number; `publish` wakes the subscribers once they are durable."""

    def __init__(self, store: Store, last: int, *, behind_max: int = limits.EVENTS_BEHIND_MAX) -> None:
        self._store = store
        self._last = last  # the newest published event
        self._behind_max = behind_max
        self._readers: dict[trio.MemorySendChannel[Event], None] = {}
        self._ended = ""

    @property
    def last(self) -> int:
        """The newest published event's number."""
        return self._last

    def end(self, why: str) -> None:
        """This peer leads no more: readers get Unavailable after what was published, and follow another leader."""
        self._ended = why
        for reader in self._readers:
            reader.close()
        self._readers.clear()

    def publish(self, events: Sequence[Event]) -> None:
        """Hand durable events on. A reader that does not keep up loses its place and is told so."""
        for event in events:
            self._last = event.id
            for reader in list(self._readers):
                try:
                    reader.send_nowait(event)
                except trio.WouldBlock:
                    del self._readers[reader]
                    reader.close()

    @asynccontextmanager
    async def subscribe(self, since: int | None) -> AsyncIterator[AsyncIterator[Event]]:
        """Every event after `since`, then new ones, each once and in order; None: new ones only.

        Raises Compacted on entry if an event after `since` is no longer kept; from the iterator Overloaded when the
        reader is more than the bound behind, Unavailable when the journal has ended.
        """
        if self._ended:
            raise Unavailable(self._ended, code="not_leading", retry_after_s=1.0)
        send, receive = trio.open_memory_channel[Event](self._behind_max)
        self._readers[send] = None
        published = self._last  # later ones come through the channel
        start = published if since is None else since
        try:
            if start < published:
                await self._require(start + 1)
            async with aclosing(self._events(start, published, receive)) as events:
                yield events
        finally:
            self._readers.pop(send, None)
            send.close()
            receive.close()

    async def _require(self, first: int) -> None:
        page = await self._store.range(_PREFIX, prefix_end(_PREFIX), limit=1, keys_only=True)
        oldest = int(page.items[0].key.removeprefix(_PREFIX)) if page.items else self._last + 1
        if first < oldest:
            raise Compacted(
                f"events before {oldest} are no longer kept; read the state anew and follow from there",
                details={"oldest": oldest},
            )

    async def _events(
        self, since: int, published: int, receive: trio.MemoryReceiveChannel[Event]
    ) -> AsyncGenerator[Event, None]:
        """From the store up to what was published at the beginning, then from the channel."""
        sent = since
        while sent < published:
            page = await self._store.range(f"{_PREFIX}{sent + 1:016d}", prefix_end(_PREFIX), limit=_PAGE)
            for item in page.items:
                event = decode(Event, item.value)
                if event.id > published:
                    break
                if event.id != sent + 1:
                    raise Compacted(f"events after {sent} went while they were read")
                sent = event.id
                yield event
            if not page.items:
                raise Compacted(f"events after {sent} went while they were read")
        async for event in receive:
            yield event
        if self._ended:
            raise Unavailable(self._ended, code="not_leading", retry_after_s=1.0)
        raise Overloaded(f"this reader is more than {self._behind_max} events behind", code="slow_reader")
