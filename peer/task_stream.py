"""A task's text for one client of any peer: the leader says which attempt runs and where, that peer gives the tokens,
and the recorded result has the last word."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Final

import structlog
import trio

from peer.errors import BitinglipError, Unavailable
from peer.relay import TokenRelay
from peer.state.command import GetTask, StreamItem, TaskView
from peer.state.task import TERMINAL, Status, stage
from peer.streams import Stream, with_end

log = structlog.get_logger("streams")

_WAIT_S: Final = 10.0  # of one question for the next stage
_AGAIN_S: Final = (0.1, 5.0)  # from the first to the longest pause before tokens are fetched again

Ask = Callable[[GetTask], Awaitable[TaskView]]


@asynccontextmanager
async def task_stream(task_id: str, ask: Ask, relay: TokenRelay) -> AsyncIterator[AsyncIterator[StreamItem]]:
    """What ports.Cluster.stream is. `ask` gets the leader's answer, or raises BitinglipError when it has waited for one
    too long: on entry that is raised, later it comes from the iterator, after the text that there is."""
    reading = _Reading(await ask(GetTask(task_id=task_id)), ask, relay)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading.run, nursery)
            async with aclosing(with_end(reading.stream.items(), reading.end)) as items:
                yield items
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:  # what the caller raised comes out as it was
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None


class _Reading:
    def __init__(self, view: TaskView, ask: Ask, relay: TokenRelay) -> None:
        self.stream = Stream()  # what the client has and what is ready for it
        self._view = view
        self._ask = ask
        self._relay = relay

    async def end(self) -> TaskView:
        return self._view

    async def run(self, nursery: trio.Nursery) -> None:
        """Until the task is finished and its text whole, or nobody can say what became of it."""
        try:
            while self._view.task.status not in TERMINAL:
                await self._stage(nursery)
        except BitinglipError as error:
            self.stream.break_off(error)
        else:
            self.stream.finish(self._view)

    async def _stage(self, nursery: trio.Nursery) -> None:
        """To the end of the attempt that runs, or to the beginning of the next."""
        task = self._view.task
        waits = task.status is Status.QUEUED
        if self.stream.attempt:  # else nothing was given that could be void
            self.stream.restart(task.attempt + waits, task.requeued_because)
        copying = trio.CancelScope()
        if not waits and self._view.peer_id:
            nursery.start_soon(self._copy, self._view, copying)
        try:
            self._view = await self._next(stage(task))
        finally:
            copying.cancel()

    async def _next(self, past: int) -> TaskView:
        task_id = self._view.task.task_id
        while True:
            view = await self._ask(GetTask(task_id=task_id, wait_s=_WAIT_S, past=past))
            if view.task.status in TERMINAL or stage(view.task) > past:
                return view

    async def _copy(self, view: TaskView, scope: trio.CancelScope) -> None:
        """The attempt's tokens, again and again while its peer cannot be reached: without them the text comes at the
        end."""
        task, (pause_s, pause_s_max) = view.task, _AGAIN_S
        with scope:
            while True:
                tokens = self.stream.tokens
                try:
                    await self._relay.copy(view.peer_id, task.task_id, task.attempt, self.stream)
                    return
                except Unavailable as error:
                    log.info("stream_broke", task_id=task.task_id, peer_id=view.peer_id, why=error.message)
                if self.stream.tokens > tokens:
                    pause_s = _AGAIN_S[0]
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, pause_s_max)
