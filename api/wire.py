"""hypercorn's protocol machines on this server's connections, with the bounds that hypercorn's own lack.

What differs from hypercorn's trio worker, and why:
- a send is bounded: a client that does not read is cut off, and cannot hold up the server's end;
- the head and the first piece of an answer go out in one send;
- one reaper for all connections instead of a task per idle one, which costs a task per request;
- messages to the application never block its own answer (hypercorn's channel can, when a body was not read);
- no HTTP/2 upgrade, no WebSocket compression (a small frame could inflate without bound), a bound on what
  WebSocket clients send;
- errors that are answered before the application is reached are JSON too.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import h11
import trio
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.events import Body, StreamClosed
from hypercorn.protocol.events import Request as StreamRequest
from hypercorn.protocol.events import Response as StreamResponse
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import ASGIWebsocketState, FrameTooLargeError, WSStream
from hypercorn.typing import ConnectionState as RequestState
from hypercorn.utils import parse_socket_addr
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Message, Ping
from wsproto.utilities import RemoteProtocolError

from api import errors
from api.http import LEAVING, Leaving, new_request_id
from peer.errors import BadRequest, BitinglipError, Overloaded
from peer.ports import Clock

if TYPE_CHECKING:
    from api.serve import Server

RECEIVE_BYTES = 65_536
MAILBOX_MAX = 16  # pieces of a body, or WebSocket messages, that wait for the application
HANDSHAKE_S_MAX = 10.0
HEAD_S_MAX = 10.0  # from the connection to the end of the first request's head
KEEP_ALIVE_S = 30.0  # from an answer to the end of the next request's head
LINGER_S_MAX = 1.0  # a closed connection is read on, so that the last answer is not reset away
PING_S = 20.0
SEND_S_MAX = 10.0  # one send; then the client is taken for gone
FRAMES_MAX = 200  # WebSocket frames that a client may send per FRAMES_WINDOW_S
FRAMES_WINDOW_S = 10.0

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s
_OWN_ERROR = [(b"content-length", b"0"), (b"connection", b"close")]  # how hypercorn answers an error
_MESSAGES = {431: "The head of the request is too large"}


class Mailbox:
    """What a connection hands to the application. Bodies and messages wait for room; a disconnect never does,
    and nothing waits once the application has finished."""

    def __init__(self) -> None:
        self._messages: deque[Any] = deque()
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()
        self._finished = False
        self.leaving = Leaving()

    async def put(self, message: Mapping[str, Any]) -> None:
        leaving = message["type"].endswith(".disconnect")
        if leaving:
            self.leaving.now()
        while len(self._messages) >= MAILBOX_MAX and not leaving and not self._finished:
            await self._writers.park()
        if not self._finished:
            self._messages.append(message)
            self._readers.unpark()

    async def get(self) -> Any:
        while not self._messages:
            await self._readers.park()
        message = self._messages.popleft()
        self._writers.unpark()
        return message

    def finish(self) -> None:
        self._finished = True
        self._messages.clear()
        self._writers.unpark_all()


class Applications:
    """Runs the application for the streams of one connection (hypercorn's task group)."""

    def __init__(self, nursery: trio.Nursery, log: Any) -> None:
        self._nursery = nursery
        self._log = log

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Any:
        mailbox = Mailbox()
        scope["extensions"] = {**scope.get("extensions", {}), LEAVING: mailbox.leaving}
        self._nursery.start_soon(self._run, app, scope, mailbox, send)
        return mailbox.put

    def spawn(self, task: Callable[..., Awaitable[None]], *args: Any) -> None:
        self._nursery.start_soon(task, *args)

    async def _run(self, app: Any, scope: Any, mailbox: Mailbox, send: Any) -> None:
        try:
            await app(scope, mailbox.get, send)
        except Exception as bug:  # a supervisor: hypercorn answers 500 if nothing was answered yet
            self._log.error("application failed", exc_info=bug)
        finally:
            mailbox.finish()
        await send(None)


class WebSocketStream(WSStream):  # type: ignore[misc]
    """A WebSocket whose client may send only so much."""

    frames = 0
    window_ends = 0.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gone = trio.Event()

    async def handle(self, event: Any) -> None:
        refused = not self.closed and not isinstance(event, StreamClosed)
        await super().handle(event)
        if self.closed:
            self.gone.set()
            if refused:  # by hypercorn, which neither tells the application nor hangs up
                if self.app_put is not None:
                    await self.app_put({"type": "websocket.disconnect", "code": 1002})
                await self.send(StreamClosed(stream_id=self.stream_id))

    async def _send_pings(self) -> None:
        while not self.gone.is_set():
            await self._send_wsproto_event(Ping())
            with trio.move_on_after(PING_S):
                await self.gone.wait()

    async def _handle_events(self) -> None:
        try:
            for event in self.connection.events():
                if await self._handle_event(event):
                    return
        except RemoteProtocolError as error:
            await self._cut(1002, str(error)[:100])

    async def _handle_event(self, event: Any) -> bool:
        """True when the connection is over."""
        if not isinstance(event, CloseConnection) and self._floods():
            await self._cut(1008, "too many messages")
            return True
        if isinstance(event, Message):
            try:
                self.buffer.extend(event)
            except FrameTooLargeError:
                await self._cut(1009, "the message is too large")
                return True
            if event.message_finished:
                await self.app_put(self.buffer.to_message())
                self.buffer.clear()
        elif isinstance(event, Ping):
            await self._send_wsproto_event(event.response())
        elif isinstance(event, CloseConnection):
            if self.connection.state is ConnectionState.REMOTE_CLOSING:
                await self._send_wsproto_event(event.response())
            await self.send(StreamClosed(stream_id=self.stream_id))
            return True
        return False

    def _floods(self) -> bool:
        now = trio.current_time()
        if now >= self.window_ends:
            self.window_ends, self.frames = now + FRAMES_WINDOW_S, 0
        self.frames += 1
        return self.frames > FRAMES_MAX

    async def _cut(self, code: int, reason: str) -> None:
        """Say why and hang up; nothing that the client sends is read any more."""
        self.state = ASGIWebsocketState.CLOSED
        await self._send_wsproto_event(CloseConnection(code=code, reason=reason))
        await self.send(StreamClosed(stream_id=self.stream_id))


class Protocol(H11Protocol):  # type: ignore[misc]
    """HTTP/1.1 and WebSocket over one connection."""

    connection: Any
    held = b""  # the head of an answer, until its first piece comes

    async def _check_protocol(self, event: h11.Request) -> None:
        """hypercorn would switch to HTTP/2 here."""

    async def _create_stream(self, request: h11.Request) -> None:
        headers = list(request.headers)
        upgrade, connection = b"", b""
        for name, value in headers:
            if name == b"upgrade":
                upgrade = value
            elif name == b"connection":
                connection += b"," + value
        kind = HTTPStream
        if (
            upgrade.strip().lower() == b"websocket"
            and request.method == b"GET"
            and b"upgrade" in [token.strip() for token in connection.lower().split(b",")]
        ):
            kind = WebSocketStream
            headers = [item for item in headers if item[0] != b"sec-websocket-extensions"]
        self.stream = kind(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        if kind is WebSocketStream:
            self.connection = H11WSConnection(self.connection)
        await self.stream.handle(
            StreamRequest(
                stream_id=STREAM_ID,
                headers=headers,
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1

    async def stream_send(self, event: Any) -> None:
        if isinstance(event, StreamResponse) and event.headers == _OWN_ERROR:
            status, body, headers = error_answer(event.status_code, self.context.clock)
            event = StreamResponse(stream_id=event.stream_id, status_code=status, headers=headers)
            await super().stream_send(event)
            event = Body(stream_id=STREAM_ID, data=body)
        await super().stream_send(event)

    async def _send_h11_event(self, event: Any) -> None:
        try:
            data: bytes = self.connection.send(event) or b""
        except h11.LocalProtocolError:
            if self.connection.their_state is not h11.ERROR:
                raise
            return
        if type(event) is h11.Response:
            self.held = data
            return
        if self.held:
            data = self.held + data
            self.held = b""
        if data:
            await self.send(RawData(data=data))

    async def _send_error_response(self, status_code: int) -> None:
        status, body, headers = error_answer(status_code, self.context.clock)
        await self._send_h11_event(h11.Response(status_code=status, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


def error_answer(status: int, clock: Clock) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """Status, body and headers of an error that never reached the application.

    h11 has finer statuses than the API's contract; they become 400.
    """
    if status == 503:
        error: BitinglipError = Overloaded("Too many connections are open")
    elif status == 500:
        error = errors.internal()
    else:
        error = BadRequest(_MESSAGES.get(status, "The request is not valid HTTP"), code="malformed_request")
    request_id = new_request_id()
    body = errors.body(error, request_id, clock.wall())
    return (
        error.status,
        body,
        [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id.encode("ascii")),
            (b"connection", b"close"),
            *errors.headers(error),
        ],
    )


class Connection:
    """One client's connection, from its handshake to its end."""

    def __init__(self, server: Server, stream: Any) -> None:
        self.server = server
        self.stream = stream
        self.reading = trio.CancelScope()
        self.idle_until: float | None = trio.current_time() + HEAD_S_MAX  # None: a request is being served
        self.protocol: Protocol
        self._sending = trio.Lock()
        self._lost = False  # nothing can be sent any more
        self._left = False  # the client has closed its side
        self._lingers = True
        self._shaking = False  # in its TLS handshake

    async def run(self) -> None:
        """Serve until either side ends it. Never raises, except when it is cancelled."""
        try:
            await self._serve()
        except OSError:
            pass
        except Exception as bug:  # a supervisor: one connection must not take the others with it
            self.server.log.error("connection failed", exc_info=bug)
        finally:
            await self._close()

    def hang_up(self, *, linger: bool = True) -> None:
        """Read no more; what is being answered is answered still."""
        if self._shaking:
            self.abort()
            return
        self._lingers = linger
        self.reading.cancel()

    def abort(self) -> None:
        """End it now, whatever is on the way."""
        self._lost = True
        transport = getattr(self.stream, "transport_stream", self.stream)
        if transport.socket.fileno() >= 0:
            transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            transport.socket.close()
        self.reading.cancel()

    async def _serve(self) -> None:
        tls = isinstance(self.stream, trio.SSLStream)
        transport = self.stream.transport_stream if tls else self.stream
        if tls:
            self._shaking = True
            with trio.move_on_after(HANDSHAKE_S_MAX) as handshake:
                try:
                    await self.stream.do_handshake()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._lost = True
            self._shaking = False
            if handshake.cancelled_caught or self._lost:
                self._lost = True
                return
        family = transport.socket.family
        client = parse_socket_addr(family, transport.socket.getpeername())
        local = parse_socket_addr(family, transport.socket.getsockname())
        server = self.server
        async with trio.open_nursery() as nursery:
            self.protocol = Protocol(
                server.app,
                server.settings,
                server.context,
                Applications(nursery, server.log),
                RequestState({}),
                tls,
                client,
                local,
                self.send,
            )
            with self.reading:
                await self._read()
            await self.protocol.handle(Closed())

    async def _read(self) -> None:
        receive = self.stream.receive_some
        handle = self.protocol.handle
        while True:
            try:
                data = await receive(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._lost = True
                return
            await handle(RawData(data=bytes(data)))
            if not data:
                self._left = True
                return

    async def send(self, event: Any) -> None:
        """What the protocol wants: bytes sent, the connection closed, its idleness noted."""
        if isinstance(event, RawData):
            if not await self._send_all(event.data):
                self.abort()
                await self.protocol.handle(Closed())
        elif isinstance(event, Closed):
            await self.protocol.handle(Closed())
            self.hang_up()
        elif isinstance(event, Updated):
            self.idle_until = trio.current_time() + KEEP_ALIVE_S if event.idle else None

    async def _send_all(self, data: bytes) -> bool:
        """False when the client cannot be reached or does not read."""
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if self._lost:
                return False
            # shielded: half a message would spoil all that follow
            with trio.CancelScope(shield=True, deadline=trio.current_time() + SEND_S_MAX) as bound:
                await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        finally:
            self._sending.release()
        return not bound.cancelled_caught

    async def _close(self) -> None:
        """Let the client read what was sent, then close."""
        try:
            if (
                self._lingers
                and not self._lost
                and not self._left
                and isinstance(self.stream, trio.SocketStream)
            ):
                with trio.move_on_after(LINGER_S_MAX):
                    await self.stream.send_eof()
                    while await self.stream.receive_some(RECEIVE_BYTES):
                        pass
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
        finally:
            await trio.aclose_forcefully(self.stream)
