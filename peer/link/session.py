"""One connection between two peers in use: frames go out in order, pings keep it alive, silence ends it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final

import trio

from peer import limits
from peer.errors import Unavailable
from peer.link import wire
from peer.ports import Connection

_PING = wire.encode(wire.Ping())
_BURST_BYTES: Final = 64 * 1024  # what stands in line goes out together, up to so much
_PUT_MAX: Final = limits.FRAMES_WAITING_MAX // 2  # in line; the rest is for what cannot wait


class Session:
    """`post` never waits, `put` waits for room. Either raises Unavailable once the session is broken."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._send, self._outbox = trio.open_memory_channel[bytes](limits.FRAMES_WAITING_MAX)
        self._room = trio.lowlevel.ParkingLot()
        self._heard_at = trio.current_time()
        self._broken = ""
        self._over = trio.Event()

    @property
    def peer_id(self) -> str:
        return self._connection.peer_id

    @property
    def why(self) -> str:
        """Why it has ended; "" while it has not."""
        return self._broken

    def post(self, frame: wire.Frame) -> None:
        """Put a frame in line at once. Who has too much in line is cut off: nothing is left out in between."""
        data = self._encode(frame)
        try:
            self._send.send_nowait(data)
        except trio.WouldBlock:
            self.end(f"{self.peer_id} does not read")
            raise self._is_broken() from None

    async def put(self, frame: wire.Frame) -> None:
        """Put a frame in line when there is room, and leave some to `post`."""
        data = self._encode(frame)
        await trio.lowlevel.checkpoint()
        while not self._broken and self._outbox.statistics().current_buffer_used >= _PUT_MAX:
            await self._room.park()
        if self._broken:
            raise self._is_broken()
        self._send.send_nowait(data)

    def _encode(self, frame: wire.Frame) -> bytes:
        if self._broken:
            raise self._is_broken()
        data = wire.encode(frame)
        if len(data) > limits.FRAME_BYTES_MAX:
            raise Unavailable(f"a {type(frame).__name__} of {len(data)} bytes is too large", code="too_large")
        return data

    def _is_broken(self) -> Unavailable:
        return Unavailable(self._broken, code="link_broken", retry_after_s=1.0)

    def end(self, why: str) -> None:
        """Break it; `serve` returns."""
        if not self._broken:
            self._broken = why
            self._over.set()
            self._outbox.close()
            self._room.unpark_all()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[AsyncIterator[wire.Frame]]:
        """While open, frames go out, and come in from the iterator, which ends with the session."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            nursery.start_soon(self._close_when_over, nursery.cancel_scope)
            try:
                async with aclosing(self._frames()) as frames:
                    yield frames
            except Unavailable as error:
                self.end(error.message)
            finally:
                self.end("this side has ended it")
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):  # does not wait, by its contract
                    await self._connection.aclose()

    async def _close_when_over(self, scope: trio.CancelScope) -> None:
        await self._over.wait()
        scope.cancel()

    async def _frames(self) -> AsyncGenerator[wire.Frame, None]:
        while True:
            data = await self._connection.receive()
            self._heard_at = trio.current_time()
            if data != _PING:
                yield wire.decode(data)

    async def _write(self) -> None:
        while True:
            data, due = _PING, trio.current_time() + limits.PING_S
            try:
                with trio.move_on_at(due):
                    data = await self._outbox.receive()
            except trio.ClosedResourceError:
                return
            self._room.unpark()
            now = trio.current_time()
            if (
                now - due > limits.PING_S
            ):  # this peer itself was held up, and heard nothing, whatever was said
                self._heard_at += now - due
            if now - self._heard_at > limits.LINK_SILENT_S:
                self.end(f"nothing heard from {self.peer_id} for {limits.LINK_SILENT_S:g} s")
                return
            with trio.move_on_after(limits.LINK_SILENT_S) as patience:
                try:
                    await self._connection.send(data, *self._more(_BURST_BYTES - len(data)))
                except Unavailable as error:
                    self.end(error.message)
                    return
            if patience.cancelled_caught:
                self.end(f"{self.peer_id} has not read for {limits.LINK_SILENT_S:g} s")
                return

    def _more(self, nbytes: int) -> list[bytes]:
        """What else is in line, until there are so many bytes or more."""
        found: list[bytes] = []
        with suppress(trio.WouldBlock, trio.ClosedResourceError):
            while nbytes > 0:
                data = self._outbox.receive_nowait()
                self._room.unpark()
                found.append(data)
                nbytes -= len(data)
        return found


async def receive(connection: Connection) -> bytes:
    """The first frame of a connection. Raises Unavailable when none comes within limits.LINK_SILENT_S."""
    with trio.move_on_after(limits.LINK_SILENT_S):
        return await connection.receive()
    raise Unavailable(
        f"nothing heard from {connection.peer_id} for {limits.LINK_SILENT_S:g} s", code="link_silent"
    )
