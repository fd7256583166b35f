"""The text of running attempts on its way to readers: appended to by executors, read from the beginning.

One list a task. With nobody listening a piece costs an append; a reader gets all that is ready as one item.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import trio

from peer import limits
from peer.ports import Clock
from peer.state.command import StreamRestart, StreamToken


class _Stream:
    __slots__ = ("attempt", "counts", "ended", "readers", "reason", "texts", "tokens", "wake")

    def __init__(self) -> None:
        self.attempt = 0
        self.reason = ""  # why the attempt before this one is void
        self.texts: list[str] = []
        self.counts: list[int] = []
        self.tokens = 0
        self.ended = False
        self.readers = 0
        self.wake: trio.Event | None = None

    def notify(self) -> None:
        if self.wake is not None:
            self.wake.set()
            self.wake = None


class StreamHub:
    """Streams by task. Ended ones are kept for late readers, `kept_s` long and `kept_max` of them."""

    def __init__(
        self, clock: Clock, *, kept_s: float = limits.STREAM_KEPT_S, kept_max: int = limits.STREAMS_MAX
    ) -> None:
        self._clock = clock
        self._kept_s = kept_s
        self._kept_max = kept_max
        self._streams: dict[str, _Stream] = {}
        self._ended: deque[tuple[float, str, _Stream]] = deque()

    def __len__(self) -> int:
        return len(self._streams)

    def publish(self, task_id: str, attempt: int, text: str, count: int) -> None:
        """Append an attempt's text. A newer attempt voids what is there, an older one's text is dropped."""
        stream = self._streams.get(task_id)
        if stream is None:
            stream = self._streams[task_id] = _Stream()
        if attempt != stream.attempt:
            if attempt < stream.attempt:
                return
            self._begin(stream, attempt, "the attempt before ended without a result")
        if stream.ended:
            return
        stream.texts.append(text)
        stream.counts.append(count)
        stream.tokens += count
        if stream.wake is not None:
            stream.notify()

    def restart(self, task_id: str, attempt: int, reason: str) -> None:
        """`attempt` begins and voids what was before, if anything was published or is awaited."""
        stream = self._streams.get(task_id)
        if stream is not None and attempt > stream.attempt and not stream.ended:
            self._begin(stream, attempt, reason)
            stream.notify()

    def end(self, task_id: str) -> None:
        """The task is finished: readers get the rest and then their end."""
        stream = self._streams.get(task_id)
        if stream is not None and not stream.ended:
            stream.ended = True
            stream.notify()
            self._ended.append((self._clock.now() + self._kept_s, task_id, stream))
        self._purge()

    def tokens_so_far(self, task_id: str) -> int:
        """Of the current attempt; 0 if nothing is known of it here."""
        stream = self._streams.get(task_id)
        return stream.tokens if stream is not None else 0

    @asynccontextmanager
    async def subscribe(self, task_id: str) -> AsyncIterator[AsyncIterator[StreamToken | StreamRestart]]:
        """The current attempt's text from its beginning, as it comes, to `end`.

        May come before the first token: the caller makes sure that the task lives, or nothing ever ends it.
        """
        stream = self._streams.get(task_id)
        if stream is None:
            stream = self._streams[task_id] = _Stream()
        stream.readers += 1
        try:
            async with aclosing(_items(stream)) as items:
                yield items
        finally:
            stream.readers -= 1
            unused = not (stream.readers or stream.attempt or stream.ended)
            if unused and self._streams.get(task_id) is stream:
                del self._streams[task_id]

    def _begin(self, stream: _Stream, attempt: int, reason: str) -> None:
        stream.reason = reason
        stream.attempt = attempt
        stream.texts, stream.counts, stream.tokens = [], [], 0

    def _purge(self) -> None:
        now = self._clock.now()
        while self._ended and (self._ended[0][0] <= now or len(self._ended) > self._kept_max):
            _, task_id, stream = self._ended.popleft()
            if self._streams.get(task_id) is stream:
                del self._streams[task_id]


async def _items(stream: _Stream) -> AsyncGenerator[StreamToken | StreamRestart, None]:
    attempt, at, index = stream.attempt, 0, 0
    while True:
        if stream.attempt != attempt:
            if attempt:
                yield StreamRestart(attempt=stream.attempt, reason=stream.reason)
            attempt, at, index = stream.attempt, 0, 0
        elif at < len(stream.texts):
            text = "".join(stream.texts[at:])
            count = sum(stream.counts[at:])
            at, begun = len(stream.texts), index
            index += count
            yield StreamToken(attempt=attempt, index=begun, text=text, count=count)
        elif stream.ended:
            return
        else:
            if stream.wake is None:
                stream.wake = trio.Event()
            await stream.wake.wait()
