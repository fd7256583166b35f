"""The text of running attempts on its way to readers: appended to by executors, read from the beginning.

One list a task. With nobody listening a piece costs an append; a reader gets all that is ready as one item.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import trio

from peer import limits
from peer.errors import BitinglipError
from peer.ports import Clock
from peer.state.command import StreamEnd, StreamItem, StreamRestart, StreamToken, TaskView
from peer.state.task import Logprobs

_UNSAID = "the attempt before ended without a result"


class Stream:
    """One task's text. `live`: its attempt may give more."""

    __slots__ = (
        "_begun",
        "_closed",
        "_counts",
        "_ended",
        "_error",
        "_logprobs",
        "_reason",
        "_texts",
        "_wake",
        "attempt",
        "kept",
        "live",
        "readers",
        "tokens",
    )

    def __init__(self) -> None:
        self.attempt = 0
        self.tokens = 0  # of this attempt
        self.live = False
        self.readers = 0
        self.kept = False  # the hub's: it is in line to be forgotten
        self._begun = 0  # how often anew
        self._closed = 0  # the newest attempt that gives no more
        self._reason = ""  # why the attempt before this one is void
        self._texts: list[str] = []
        self._counts: list[int] = []
        self._logprobs: list[Logprobs] = []  # of the first tokens
        self._ended = False
        self._error: BitinglipError | None = None
        self._wake: trio.Event | None = None

    @property
    def ended(self) -> bool:
        return self._ended

    # ---------------------------------------------------------------- what is said

    def publish(self, attempt: int, text: str, count: int, logprobs: tuple[Logprobs, ...] = ()) -> None:
        """Append an attempt's text. A newer attempt voids what is there, an older one's text is dropped."""
        if self._ended or attempt < self.attempt:
            return
        if attempt != self.attempt:
            self._begin(attempt, _UNSAID)
        self.live = True
        self._texts.append(text)
        self._counts.append(count)
        self._logprobs += logprobs
        self.tokens += count
        self._notify()

    def take(self, token: StreamToken) -> bool:
        """Append what is new of another stream's item. False: something in between is missing."""
        if self._ended or token.attempt < self.attempt:
            return True
        known = self.tokens if token.attempt == self.attempt else 0
        if token.index == known:
            self.publish(token.attempt, token.text, token.count, token.logprobs)
        elif token.index or token.count < known:
            return False
        elif token.count > known:  # from the beginning, a second time
            text, logprobs = token.text[len(self._text()) :], token.logprobs[known:]
            self.publish(token.attempt, text, token.count - known, logprobs)
        return True

    def restart(self, attempt: int, reason: str) -> None:
        """`attempt` begins and voids what was before."""
        if attempt > self.attempt and not self._ended:
            self._begin(attempt, reason or _UNSAID)
            self._notify()

    def close(self, attempt: int) -> None:
        """This attempt gives no more."""
        self._closed = max(self._closed, attempt)
        if attempt == self.attempt:
            self.live = False
        self._notify()

    def end(self) -> None:
        """The task is finished: readers get the rest and then their end."""
        self._ended = True
        self.live = False
        self._notify()

    def finish(self, view: TaskView) -> None:
        """As `end`; what was given becomes the recorded text, whatever was missed of it."""
        result = view.result
        if result is None:
            if self.attempt:
                self.restart(view.task.attempt, view.task.requeued_because)
        else:
            given = self._text()
            if self.attempt and result.attempt != self.attempt:
                self._begin(result.attempt, view.task.requeued_because or _UNSAID)
            elif not result.generated_text.startswith(given):
                self._begin(result.attempt, "another text was recorded than was given")
            rest = result.generated_text[len(self._text()) :]
            if rest or not (self._texts or result.arrays):
                more = max(0, result.tokens_generated - self.tokens)
                self.publish(result.attempt, rest, more, result.logprobs[self.tokens :])
        self.end()

    def break_off(self, error: BitinglipError) -> None:
        """Readers get what is there and then this error."""
        self._error = error
        self.end()

    def _begin(self, attempt: int, reason: str) -> None:
        self._begun += 1
        self._reason = reason
        self.attempt = attempt
        self.live = False
        self._texts, self._counts, self._logprobs, self.tokens = [], [], [], 0

    def _text(self) -> str:
        return "".join(self._texts)

    def _notify(self) -> None:
        if self._wake is not None:
            self._wake.set()
            self._wake = None

    # ---------------------------------------------------------------- what is read

    async def items(self) -> AsyncGenerator[StreamToken | StreamRestart, None]:
        """The current attempt's text from its beginning, and each later one's, as it comes, to the end."""
        begun, attempt, at, index = self._begun, self.attempt, 0, 0
        while True:
            if self._begun != begun:
                if attempt:
                    yield StreamRestart(attempt=self.attempt, reason=self._reason)
                begun, attempt, at, index = self._begun, self.attempt, 0, 0
            elif at < len(self._texts):
                token = self._since(at, index)
                at, index = len(self._texts), index + token.count
                yield token
            elif self._ended:
                if self._error is not None:
                    raise self._error
                return
            else:
                await self._more()

    async def attempt_items(self, attempt: int) -> AsyncGenerator[StreamToken, None]:
        """One attempt's text from its beginning, as it comes, until it gives no more."""
        at, index = 0, 0
        while True:
            if self.attempt == attempt and at < len(self._texts):
                token = self._since(at, index)
                at, index = len(self._texts), index + token.count
                yield token
            elif self._ended or self.attempt > attempt or self._closed >= attempt:
                return
            else:
                await self._more()

    def _since(self, at: int, index: int) -> StreamToken:
        text, count = "".join(self._texts[at:]), sum(self._counts[at:])
        logprobs = tuple(self._logprobs[index : index + count])
        return StreamToken(attempt=self.attempt, index=index, text=text, count=count, logprobs=logprobs)

    async def _more(self) -> None:
        if self._wake is None:
            self._wake = trio.Event()
        await self._wake.wait()


class StreamHub:
    """Streams by task. Those that give no more are kept for late readers, `kept_s` long and `kept_max` of them."""

    def __init__(
        self, clock: Clock, *, kept_s: float = limits.STREAM_KEPT_S, kept_max: int = limits.STREAMS_MAX
    ) -> None:
        self._clock = clock
        self._kept_s = kept_s
        self._kept_max = kept_max
        self._streams: dict[str, Stream] = {}
        self._kept: deque[tuple[float, str, Stream]] = deque()

    def __len__(self) -> int:
        return len(self._streams)

    def publish(
        self, task_id: str, attempt: int, text: str, count: int, logprobs: tuple[Logprobs, ...] = ()
    ) -> None:
        """Append an attempt's text. A newer attempt voids what is there, an older one's text is dropped."""
        stream = self._streams.get(task_id)
        if stream is None:
            stream = self._streams[task_id] = Stream()
        stream.publish(attempt, text, count, logprobs)

    def restart(self, task_id: str, attempt: int, reason: str) -> None:
        """`attempt` begins and voids what was before, if anything was published or is awaited."""
        stream = self._streams.get(task_id)
        if stream is not None:
            stream.restart(attempt, reason)
            self._keep(task_id, stream)

    def close(self, task_id: str, attempt: int) -> None:
        """The attempt gives no more here; another may, of which this peer need not hear."""
        stream = self._streams.get(task_id)
        if stream is not None:
            stream.close(attempt)
            self._keep(task_id, stream)

    def end(self, task_id: str) -> None:
        """The task is finished: readers get the rest and then their end."""
        stream = self._streams.get(task_id)
        if stream is not None:
            stream.end()
            self._keep(task_id, stream)
        self._purge()

    def tokens_so_far(self, task_id: str) -> int:
        """Of the current attempt; 0 if nothing is known of it here."""
        stream = self._streams.get(task_id)
        return stream.tokens if stream is not None else 0

    @asynccontextmanager
    async def subscribe(
        self, task_id: str
    ) -> AsyncIterator[AsyncGenerator[StreamToken | StreamRestart, None]]:
        """The current attempt's text from its beginning, as it comes, to `end`.

        May come before the first token: the caller makes sure that the task lives, or nothing ever ends it.
        """
        async with self._read(task_id) as stream, aclosing(stream.items()) as items:
            yield items

    @asynccontextmanager
    async def subscribe_attempt(
        self, task_id: str, attempt: int
    ) -> AsyncIterator[AsyncIterator[StreamToken]]:
        """One attempt's text from its beginning, as it comes, to `close`. Comes early as `subscribe` may."""
        async with self._read(task_id) as stream, aclosing(stream.attempt_items(attempt)) as items:
            yield items

    @asynccontextmanager
    async def _read(self, task_id: str) -> AsyncIterator[Stream]:
        stream = self._streams.get(task_id)
        if stream is None:
            stream = self._streams[task_id] = Stream()
        stream.readers += 1
        try:
            yield stream
        finally:
            stream.readers -= 1
            self._drop(task_id, stream)

    def _keep(self, task_id: str, stream: Stream) -> None:
        if not (stream.live or stream.kept):
            stream.kept = True
            self._kept.append((self._clock.now() + self._kept_s, task_id, stream))
        self._purge()

    def _purge(self) -> None:
        now = self._clock.now()
        while self._kept and (self._kept[0][0] <= now or len(self._kept) > self._kept_max):
            _, task_id, stream = self._kept.popleft()
            stream.kept = False
            self._drop(task_id, stream)

    def _drop(self, task_id: str, stream: Stream) -> None:
        """Forget it, unless it may give more, to late readers or to those who wait for the next attempt."""
        needed = stream.live or stream.kept or (stream.readers and not stream.ended)
        if not needed and self._streams.get(task_id) is stream:
            del self._streams[task_id]


async def with_end(
    items: AsyncGenerator[StreamToken | StreamRestart, None], view: Callable[[], Awaitable[TaskView]]
) -> AsyncGenerator[StreamItem, None]:
    """What a client gets: the items, and when they have ended the finished task."""
    async with aclosing(items):
        async for item in items:
            yield item
    yield StreamEnd(view=await view())
