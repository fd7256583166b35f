"""How a client's request gets into a peer's process, and how its answer comes back or does not.

The peer's part runs as a task of that process: it stands still while the process is frozen, and when the process
dies the client learns no more than that its connection broke. A client that goes away cancels it, as the API does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar

import trio

from peer.errors import BitinglipError
from peer.ports import Cluster
from peer.state.command import Request, StreamItem
from peer.state.event import Event
from simulations.world.kernel import Incarnation, World, _incarnation, blame

REFUSED_S: Final = 0.005  # until a client knows that nobody listens there
PIECES_MAX: Final = 8  # events or pieces of text on their way to a reader that does not read


T = TypeVar("T")


class NoAnswer(Exception):
    """Nobody listened (`sent` is False), the connection broke, or the client's patience ended."""

    def __init__(self, *, sent: bool) -> None:
        super().__init__(sent)
        self.sent = sent


class Broken(Exception):
    """Of a stream: nothing more comes."""


class _Call:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.answered = False
        self.answer: Any = None
        self.error: BitinglipError | None = None

    def break_off(self, how: str = "") -> None:
        self.done.set()
        self.scope.cancel()


class Door:
    """Where the peers' APIs are. `process_of` names the process that serves, None for the world itself."""

    def __init__(
        self,
        world: World,
        cluster_of: Callable[[str], Any],
        process_of: Callable[[str], Incarnation | None] | None = None,
    ) -> None:
        self._world = world
        self._cluster_of = cluster_of
        self._process_of = process_of or (lambda peer_id: None)

    async def ask(self, peer_id: str, request: Request, limit_s: float) -> Any:
        """Raises peer.errors.BitinglipError or NoAnswer."""

        async def carry_out(cluster: Cluster, call: _Call) -> None:
            call.answer = await cluster.call(request)
            call.answered = True

        call = await self._begin(peer_id, carry_out)
        try:
            with trio.move_on_after(limit_s):
                await call.done.wait()
        finally:
            call.break_off()
        if call.error is not None:
            raise call.error
        if not call.answered:
            raise NoAnswer(sent=True)
        return call.answer

    async def read_events(
        self, peer_id: str, since: int | None, take: Callable[[Event], float], limit_s: float
    ) -> None:
        """Hand over what comes; `take` says how long the reader is busy with it, in seconds.

        Raises what ports.Cluster.events does, NoAnswer(sent=False), Broken.
        """
        await self._read(peer_id, lambda cluster: cluster.events(since), take, limit_s)

    async def read_stream(
        self, peer_id: str, task_id: str, take: Callable[[StreamItem], float], limit_s: float
    ) -> None:
        """The same with ports.Cluster.stream."""
        await self._read(peer_id, lambda cluster: cluster.stream(task_id), take, limit_s)

    async def _read(
        self,
        peer_id: str,
        source: Callable[[Cluster], AbstractAsyncContextManager[AsyncIterator[T]]],
        take: Callable[[T], float],
        limit_s: float,
    ) -> None:
        send, receive = trio.open_memory_channel[T](PIECES_MAX)

        async def carry_out(cluster: Cluster, call: _Call) -> None:
            async with source(cluster) as items:
                async for item in items:
                    await send.send(item)

        call = await self._begin(peer_id, carry_out, send.close)
        try:
            with trio.move_on_after(limit_s) as patience, receive:
                async for item in receive:
                    busy_s = take(item)
                    if busy_s:
                        await trio.sleep(busy_s)
        finally:
            call.break_off()
        if call.error is not None:
            raise call.error
        if not patience.cancelled_caught:
            raise Broken

    async def _begin(
        self, peer_id: str, carry_out: Callable[[Any, _Call], Any], close: Callable[[], None] | None = None
    ) -> _Call:
        cluster = self._cluster_of(peer_id)
        if cluster is None:
            await trio.sleep(REFUSED_S)
            raise NoAnswer(sent=False)
        call = _Call()
        process = self._process_of(peer_id)

        def break_off(how: str) -> None:
            call.break_off()
            if close is not None:
                close()

        if process is not None:
            process.on_death(break_off)
        self._world.spawn(self._serve, process, cluster, call, carry_out, close)
        return call

    async def _serve(
        self,
        process: Incarnation | None,
        cluster: Any,
        call: _Call,
        carry_out: Callable[[Any, _Call], Any],
        close: Callable[[], None] | None,
    ) -> None:
        _incarnation.set(process)  # from here on this is that process' task
        try:
            with call.scope:
                await trio.lowlevel.checkpoint()
                if process is None or process.alive:
                    await carry_out(cluster, call)
        except BitinglipError as error:
            call.error = error
        except Exception as error:  # whatever a handler raises otherwise is a bug, here or there
            if isinstance(error, (trio.BrokenResourceError, trio.ClosedResourceError)) and call.done.is_set():
                return  # its reader has gone
            if process is None or process.alive:
                self._world.fail(blame(error, self._world.now()))
        finally:
            if process is None or process.alive:
                call.done.set()
            if close is not None:
                close()
