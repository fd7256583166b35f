"""Frames over a TLS stream: 4 bytes of length, then that many. A length is checked before anything is read for it."""

from __future__ import annotations

import socket
from typing import Final

import trio

from peer import limits
from peer.errors import Unavailable

HEADER_BYTES: Final = 4
CHUNK_BYTES: Final = (
    256 * 1024
)  # encrypted at once: bounds what a stalled send holds, and how long others wait for it
USER_TIMEOUT_S: Final = 15.0  # bytes that are not acknowledged for so long break the connection
KEEPALIVE: Final = (5, 2, 5)  # seconds idle, seconds between probes, probes that may stay unanswered

Tls = trio.SSLStream[trio.SocketStream]


class FrameStream:
    """Frames in order, one way and the other; `who` is the other side in error messages.

    Any number of tasks may send and receive: they take turns, as a TLS stream has room for one of each.
    """

    def __init__(self, stream: Tls, who: str, *, frame_bytes_max: int = limits.FRAME_BYTES_MAX) -> None:
        self.who = who
        self.over = ""
        self.stream = stream
        self.frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()
        self._sending = trio.StrictFIFOLock()
        self._receiving = trio.StrictFIFOLock()

    async def send(self, *frames: bytes) -> None:
        """All in one go, which is much cheaper than one by one. Raises Unavailable once it is over, or if a frame is
        larger than the bound; then none is sent.

        To cancel it breaks the connection, unless nothing has been sent: a part of a frame may be on its way, and
        whatever followed would be read as its rest.
        """
        parts: list[bytes] = []
        for frame in frames:
            if len(frame) > self.frame_bytes_max:
                raise Unavailable(
                    f"a frame of {len(frame)} bytes is too large for {self.who}", code="too_large"
                )
            parts += (len(frame).to_bytes(HEADER_BYTES, "big"), frame)
        data = memoryview(b"".join(parts))
        async with self._sending:
            self.check()
            whole = False
            try:
                for start in range(0, len(data), CHUNK_BYTES):
                    await self.stream.send_all(data[start : start + CHUNK_BYTES])
                whole = True
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.end(_reason(error) or f"{self.who} does not take what is sent")
            finally:
                if not whole:
                    self.end("a send was given up in the middle of a frame")
        self.check()

    async def receive(self) -> bytes:
        """The next frame. Raises Unavailable once it is over; to cancel it loses nothing."""
        async with self._receiving:
            while True:
                self.check()
                frame = self._take()
                if frame is not None:
                    return frame
                try:
                    data = await self.stream.receive_some()
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    self.end(_reason(error) or f"{self.who} has broken it")
                else:
                    if data:
                        self._buffer += data
                    else:
                        half = " in the middle of a frame" if self._buffer else ""
                        self.end(f"{self.who} has ended the connection{half}")

    def end(self, why: str) -> None:
        """Close it now, whoever waits in it; the first reason stays. What the system took over may still arrive.

        The socket is closed beneath TLS: to say goodbye would mean to wait until the other side reads.
        """
        if not self.over:
            self.over = why
            self._buffer.clear()
            self.stream.transport_stream.socket.close()

    def check(self) -> None:
        """Raises Unavailable once it is over."""
        if self.over:
            raise Unavailable(f"connection to {self.who}: {self.over}", code="link_broken")

    def _take(self) -> bytes | None:
        """The first frame of the buffer if it is whole. Raises Unavailable if it says that it is too large."""
        if len(self._buffer) < HEADER_BYTES:
            return None
        size = int.from_bytes(self._buffer[:HEADER_BYTES], "big")
        if size > self.frame_bytes_max:
            self.end(f"{self.who} announced a frame of {size} bytes, at most are {self.frame_bytes_max}")
            self.check()
        if len(self._buffer) < HEADER_BYTES + size:
            return None
        frame = bytes(memoryview(self._buffer)[HEADER_BYTES : HEADER_BYTES + size])
        del self._buffer[: HEADER_BYTES + size]
        return frame


def tune(stream: trio.SocketStream) -> None:
    """Send at once, and notice within bounds that the other side has gone. Raises OSError on a broken socket."""
    idle_s, interval_s, probes = KEEPALIVE
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT_S * 1000)),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes),
    ):
        stream.setsockopt(level, option, value)


def _reason(error: BaseException) -> str:
    """What the system or the TLS library said, or "" where it said nothing."""
    cause = error.__cause__
    return str(getattr(cause, "reason", "") or getattr(cause, "strerror", "") or "").replace("_", " ").lower()
