"""HTTP/1.1 to one etcd member: kept-alive connections over a unix socket or TCP, bounded, for many tasks.

What a caller has to know of a failed request is whether it may have taken effect. A request is sent only when its last
byte was handed to the kernel: until then the member cannot have understood it, as the last byte closes its JSON.

    NotSent      it has no effect
    NoAnswer     it was sent, and how it ended is not known; TooLong: its answer is larger than is taken

Resource handling: a caller that is cancelled, or whose answer does not come, closes its connection, since an answer
that comes later would be taken for that of the next request. Addresses are `unix:PATH` or `HOST:PORT`.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import h11
import trio

CONNECTIONS_MAX: Final = 32  # for calls; more wait
STREAMS_MAX: Final = 64  # at once; each has a connection of its own
ANSWER_BYTES_MAX: Final = 20 * 1024 * 1024  # the largest request's keys and values in base64, and more
RECV_BYTES: Final = 256 * 1024
IDLE_S_MAX: Final = 60.0  # the member may close what is idle for some minutes
UNIX_PATH_BYTES_MAX: Final = 107


class NotSent(Exception):
    """The request had no effect."""


class NoAnswer(Exception):
    """The request was sent; its outcome is not known."""


class TooLong(NoAnswer):
    """The answer is larger than ANSWER_BYTES_MAX."""


class Answer(NamedTuple):
    status: int
    body: bytes


class _Broken(Exception):
    """The connection is of no more use."""


class _TooLong(_Broken):
    """What comes is more than is taken."""


class _Connection:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)
        self.idle_since = 0.0

    async def send(self, method: str, path: str, body: bytes) -> None:
        """Raises _Broken if not all of it was handed to the kernel."""
        headers = [("Host", "etcd"), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        parts = [
            self._http.send(h11.Request(method=method, target=path, headers=headers)),
            self._http.send(h11.Data(data=body)),
            self._http.send(h11.EndOfMessage()),
        ]
        try:
            await self._stream.send_all(b"".join(part for part in parts if part))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _Broken(str(error)) from error

    async def event(self) -> h11.Event:
        """What comes next. Raises _Broken."""
        try:
            event = self._http.next_event()
            while event is h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some(RECV_BYTES))
                event = self._http.next_event()
        except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _Broken(str(error)) from error
        if isinstance(event, h11.Event) and not isinstance(event, h11.ConnectionClosed):
            return event
        raise _Broken("the member has closed the connection")

    async def status(self) -> int:
        """Of the answer to what was sent."""
        while True:
            event = await self.event()
            if isinstance(event, h11.Response):
                return event.status_code

    async def rest(self) -> bytes:
        """The answer's body, which ends."""
        parts, nbytes = [], 0
        while not isinstance(event := await self.event(), h11.EndOfMessage):
            assert isinstance(event, h11.Data)
            parts.append(event.data)
            nbytes += len(event.data)
            if nbytes > ANSWER_BYTES_MAX:
                raise _TooLong(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
        return b"".join(parts)

    def reusable(self) -> bool:
        """Make it ready for a next request, if it can be."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        self.idle_since = trio.current_time()
        return True

    def fresh(self) -> bool:
        """Whether the other side has neither closed it nor sent what nobody asked for."""
        if trio.current_time() - self.idle_since > IDLE_S_MAX:
            return False
        poll = select.poll()
        poll.register(self._stream.socket.fileno(), select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        self._stream.socket.close()


class Lines(AsyncIterator[bytes]):
    """The lines of an answer that goes on. A cancelled wait loses none. Raises NoAnswer at its end."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._partial = bytearray()
        self._whole: deque[bytes] = deque()

    async def __anext__(self) -> bytes:
        while not self._whole:
            try:
                event = await self._connection.event()
            except _Broken as error:
                raise NoAnswer(str(error)) from error
            if isinstance(event, h11.EndOfMessage):
                raise NoAnswer("the member has ended its answer")
            assert isinstance(event, h11.Data)
            self._partial += event.data
            if b"\n" in event.data:
                *whole, rest = bytes(self._partial).split(b"\n")
                self._partial = bytearray(rest)
                self._whole.extend(line for line in whole if line)
            elif len(self._partial) > ANSWER_BYTES_MAX:
                raise NoAnswer(f"a line of more than {ANSWER_BYTES_MAX} bytes")
        return self._whole.popleft()


class HttpPool:
    """Connections to one address. Needs no nursery: what is idle is looked at when it is wanted again."""

    def __init__(self, address: str, *, connections_max: int = CONNECTIONS_MAX) -> None:
        self._address = address
        self._places = trio.Semaphore(connections_max)
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._streams = 0
        self._closed = False

    async def call(self, method: str, path: str, body: bytes, timeout_s: float) -> Answer:
        """One request and its whole answer. Raises NotSent, NoAnswer."""
        sent = False
        with trio.move_on_after(timeout_s):
            async with self._places:
                connection = await self._send(method, path, body)
                sent = True
                try:
                    answer = Answer(await connection.status(), await connection.rest())
                    self._give_back(connection)
                except _TooLong as error:
                    raise TooLong(str(error)) from error
                except _Broken as error:
                    raise NoAnswer(str(error)) from error
                finally:
                    self._drop(connection)
                return answer
        if sent:
            raise NoAnswer(f"no answer within {timeout_s:g} s")
        raise NotSent(f"it could not be sent within {timeout_s:g} s")

    @asynccontextmanager
    async def stream(self, path: str, body: bytes, timeout_s: float) -> AsyncIterator[tuple[int, Lines]]:
        """A request whose answer comes in lines, for as long as it takes: its status, and they.

        Raises NotSent, NoAnswer if it has not begun within the time.
        """
        if self._streams >= STREAMS_MAX:
            raise NotSent(f"{STREAMS_MAX} streams are open already")
        self._streams += 1
        connection = None
        try:
            with trio.move_on_after(timeout_s) as scope:
                connection = await self._send("POST", path, body)
                try:
                    status = await connection.status()
                except _Broken as error:
                    raise NoAnswer(str(error)) from error
            if scope.cancelled_caught or connection is None:
                raise NoAnswer(f"no answer within {timeout_s:g} s")
            yield status, Lines(connection)
        finally:
            self._streams -= 1
            if connection is not None:
                self._drop(connection)

    async def _send(self, method: str, path: str, body: bytes) -> _Connection:
        """A connection over which the whole request has gone. Raises NotSent."""
        while True:
            connection = self._take_idle()
            reused = connection is not None
            connection = connection or await self._dial()
            self._busy.add(connection)
            done = False
            try:
                await connection.send(method, path, body)
                done = True
            except _Broken as error:
                if not reused:
                    raise NotSent(str(error)) from error
            finally:
                if not done:
                    self._drop(connection)
            if done:
                return connection

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.fresh():
                return connection
            connection.close()
        return None

    async def _dial(self) -> _Connection:
        if self._closed:
            raise NotSent("the client is closed")
        try:
            if self._address.startswith("unix:"):
                stream = await _open_unix(self._address.removeprefix("unix:"))
            else:
                host, _, port = self._address.rpartition(":")
                stream = await trio.open_tcp_stream(host.strip("[]"), int(port))
        except OSError as error:
            raise NotSent(f"{self._address}: {error}") from error
        return _Connection(stream)

    def _give_back(self, connection: _Connection) -> None:
        if not self._closed and connection.reusable():
            self._busy.discard(connection)
            self._idle.append(connection)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._busy:
            self._busy.discard(connection)
            connection.close()

    def close(self) -> None:
        """Close every connection: who waits for an answer gets NoAnswer."""
        self._closed = True
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()
        self._busy.clear()


async def _open_unix(path: str) -> trio.SocketStream:
    """Also where the path is longer than the kernel takes: by a descriptor of its folder."""
    if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX:
        return await trio.open_unix_socket(path)
    folder, name = os.path.split(path)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return await trio.open_unix_socket(f"/proc/self/fd/{descriptor}/{name}")
    finally:
        os.close(descriptor)
