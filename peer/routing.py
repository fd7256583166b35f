"""The cluster as any peer's API sees it: requests go to whoever leads, here or over the link, and are held for a while
when nobody does."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Any, Final, Protocol

import trio

from peer import limits
from peer.errors import Unavailable
from peer.executor import Executor
from peer.follower import Follower, is_unsent
from peer.journal import Journal
from peer.leader import Leader
from peer.state.command import (
    GetTask,
    Query,
    Request,
    StreamEnd,
    StreamItem,
    StreamToken,
    SubmitTask,
    TaskView,
)
from peer.state.enrol import Enrol, Renew, RevokeHost
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.model import Model
from peer.state.task import TERMINAL

_PAUSE_S: Final = 0.1  # between two tries
_WAIT_S: Final = 10.0  # of one question for the end of a streamed task


class Leading(Protocol):
    """What this peer is at the moment; both None while another leads."""

    leader: Leader | None
    journal: Journal | None


class RoutedCluster:
    """Implements peer.ports.Cluster on every peer of a cluster."""

    def __init__(
        self, leading: Leading, follower: Follower, executor: Executor, catalogue: Mapping[str, Model]
    ) -> None:
        self._leading = leading
        self._follower = follower
        self._executor = executor
        self._catalogue = catalogue  # this peer's own, until a leader has told it of the cluster's
        self.not_ready = ""
        """Why requests are not to come here, "" if they are."""

    def ready(self) -> str:
        if self.not_ready:
            return self.not_ready
        if self._leading.leader is not None or self._follower.leader:
            return ""
        return "no leader is known to this peer at the moment"

    def key(self, key_id: str) -> ApiKey | None:
        leader = self._leading.leader
        return leader.key(key_id) if leader is not None else self._follower.keys.get(key_id)

    def models(self) -> Mapping[str, Model]:
        leader = self._leading.leader
        if leader is not None:
            return leader.models()
        return self._follower.catalogue or self._catalogue

    async def count_tokens(self, model_name: str, parameters: Mapping[str, Any]) -> tuple[int, int] | None:
        model = self.models().get(model_name)
        return None if model is None else await self._executor.count_tokens(model, parameters)

    # ---------------------------------------------------------------- requests

    async def call(self, request: Request) -> Any:
        """Carried out by the leader, once. What was certainly not carried out, and what may safely be repeated, is
        tried again until limits.HOLD_S_MAX have passed."""
        return await self._held(lambda: self._once(request), repeatable=_is_repeatable(request))

    async def _once(self, request: Request) -> Any:
        leader = self._leading.leader
        return await (leader.call(request) if leader is not None else self._follower.call(request))

    async def _held(self, attempt: Callable[[], Awaitable[Any]], *, repeatable: bool) -> Any:
        give_up_at = trio.current_time() + limits.HOLD_S_MAX
        while True:
            try:
                return await attempt()
            except Unavailable as error:
                again = is_unsent(error) or (repeatable and error.code == "ambiguous")
                if not again or trio.current_time() >= give_up_at:
                    raise
            with trio.move_on_after(_PAUSE_S):
                await self._follower.wait_for_change()

    # ---------------------------------------------------------------- events

    def events(self, since: int | None) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        return self._events(since)

    @asynccontextmanager
    async def _events(self, since: int | None) -> AsyncIterator[AsyncIterator[Event]]:
        """Goes on with the next leader where the last one stopped. Errors of the beginning come on entry."""
        source = await self._held(lambda: self._source(since), repeatable=True)
        async with aclosing(self._all_events(*source)) as events:
            yield events

    async def _source(self, since: int | None) -> tuple[int, AsyncGenerator[int | Event, None]]:
        """The number after which events follow, and those."""
        leading = self._leading.journal
        events = _local_events(leading, since) if leading is not None else self._follower.events(since)
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        assert isinstance(first, int)
        return first, events

    async def _all_events(
        self, last: int, events: AsyncGenerator[int | Event, None]
    ) -> AsyncGenerator[Event, None]:
        while True:
            try:
                async with aclosing(events):
                    async for event in events:
                        assert isinstance(event, Event)
                        last = event.id
                        yield event
            except Unavailable:
                pass
            _, events = await self._held(partial(self._source, last), repeatable=True)

    # ---------------------------------------------------------------- streams

    @asynccontextmanager
    async def stream(self, task_id: str) -> AsyncIterator[AsyncIterator[StreamItem]]:
        view: TaskView = await self.call(GetTask(task_id=task_id))
        async with aclosing(self._stream(view)) as items:
            yield items

    async def _stream(self, view: TaskView) -> AsyncGenerator[StreamItem, None]:
        while view.task.status not in TERMINAL:
            view = await self.call(GetTask(task_id=view.task.task_id, wait_s=_WAIT_S))
        if view.result is not None:
            yield StreamToken(
                attempt=view.result.attempt,
                index=0,
                text=view.result.generated_text,
                count=view.result.tokens_generated,
            )
        yield StreamEnd(view=view)


def _is_repeatable(request: Request) -> bool:
    """Whether doing it twice is as doing it once."""
    if isinstance(request, SubmitTask):
        return request.idempotency_key != ""
    return isinstance(request, Query | Enrol | Renew | RevokeHost)


async def _local_events(journal: Journal, since: int | None) -> AsyncGenerator[int | Event, None]:
    start = journal.last if since is None else since
    async with journal.subscribe(start) as events:
        yield start
        async for event in events:
            yield event
