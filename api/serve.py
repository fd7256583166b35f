"""The HTTP server: binds, accepts, and ends within bounds whatever its clients do."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import time
from typing import Any
from wsgiref.handlers import format_date_time

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.worker_context import WorkerContext

from api import wire
from api.app import ApiApp
from peer.config import Api as ApiConfig
from peer.config import Config
from peer.errors import ConfigError
from peer.ports import Clock

BACKLOG = 1_024
CONNECTIONS_MAX = 4_096
HEAD_BYTES_MAX = 32 * 1024
REQUESTS_PER_CONNECTION_MAX = 100_000
MESSAGE_BYTES_MAX = 64 * 1024  # of a WebSocket client's message
GRACE_S = 3.0  # after `shutdown`, requests that are being answered have so long
REAP_S = 0.5
TCP_USER_TIMEOUT_MS = 15_000  # data that the client's kernel does not acknowledge


class Settings(HypercornConfig):  # type: ignore[misc]
    """hypercorn's configuration; the date is written once a second, not once an answer."""

    include_server_header = False
    errorlog = None
    h11_max_incomplete_size = HEAD_BYTES_MAX
    keep_alive_max_requests = REQUESTS_PER_CONNECTION_MAX
    websocket_max_message_size = MESSAGE_BYTES_MAX
    websocket_ping_interval = wire.PING_S
    _second = 0
    _headers: tuple[tuple[bytes, bytes], ...] = ()

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._headers = ((b"date", format_date_time(second).encode("ascii")),)
        return list(self._headers)


class Context(WorkerContext):  # type: ignore[misc]
    """What hypercorn's protocols share, and the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(None)
        self.clock = clock


class Server:
    """The open connections and what they share."""

    def __init__(self, app: ApiApp) -> None:
        self.app = app
        self.log: Any = structlog.get_logger("bitinglip.api").bind()
        self.settings = Settings()
        self.context = Context(app.api.clock)
        self.connections: set[wire.Connection] = set()
        self.stopping = False
        self.empty = trio.Event()

    async def handle(self, stream: Any) -> None:
        """Serve one connection; beyond CONNECTIONS_MAX refuse it in words."""
        if len(self.connections) >= CONNECTIONS_MAX:
            await self._refuse(stream)
            return
        connection = wire.Connection(self, stream)
        self.connections.add(connection)
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)
            if self.stopping and not self.connections:
                self.empty.set()

    async def _refuse(self, stream: Any) -> None:
        if not isinstance(stream, trio.SSLStream):
            _, body, headers = wire.error_answer(503, self.context.clock)
            head = b"".join(b"%s: %s\r\n" % header for header in headers)
            with trio.move_on_after(1.0):
                with contextlib.suppress(trio.BrokenResourceError, OSError):
                    await stream.send_all(b"HTTP/1.1 503 \r\n" + head + b"\r\n" + body)
        await trio.aclose_forcefully(stream)

    async def reap(self) -> None:
        """Hang up on connections that have been idle, or slow with a request's head, for too long."""
        while True:
            await trio.sleep(REAP_S)
            now = trio.current_time()
            for connection in tuple(self.connections):
                if connection.idle_until is not None and connection.idle_until < now:
                    connection.hang_up(linger=False)

    async def stop(self) -> None:
        """Returns within GRACE_S; no connection can send or receive after."""
        self.stopping = True
        self.app.api.stop()
        await self.context.terminated.set()
        if self.connections:
            for connection in tuple(self.connections):
                if connection.idle_until is not None:
                    connection.hang_up(linger=False)
            with trio.move_on_after(GRACE_S):
                await self.empty.wait()
        for connection in tuple(self.connections):
            connection.abort()


async def serve(
    app: ApiApp,
    config: Config,
    *,
    shutdown: trio.Event,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `shutdown`; `task_status` gets the bound (host, port).

    Raises ConfigError when it may not or cannot bind. Ends at most GRACE_S and a little after `shutdown`.
    """
    context = _tls(config.api)
    listening = bind(config.api)
    listener: Any = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    if context is not None:
        listener = trio.SSLListener(listener, context, https_compatible=True)
    server = Server(app)
    lifespan = Lifespan(ASGIWrapper(app), server.settings, {})
    async with trio.open_nursery() as lifespan_nursery:
        await lifespan_nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        async with trio.open_nursery() as handlers:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(server.reap)
                accepting.start_soon(_accept, server, listener, handlers)
                host, port = listening.getsockname()[:2]
                task_status.started((host, port))
                await shutdown.wait()
                accepting.cancel_scope.cancel()
            await server.stop()
            handlers.cancel_scope.cancel()
        await lifespan.wait_for_shutdown()
        lifespan_nursery.cancel_scope.cancel()


async def _accept(server: Server, listener: Any, handlers: trio.Nursery) -> None:
    await trio.serve_listeners(server.handle, [listener], handler_nursery=handlers)


def _tls(api: ApiConfig) -> ssl.SSLContext | None:
    if api.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(api.tls.certificate, api.tls.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"api.tls: {api.tls.certificate} and {api.tls.key} cannot be used: {error}"
        ) from None
    return context


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[host]:port". Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(
            f"api.bind: {text!r} is not of the form host:port, like 127.0.0.1:8000 or [::1]:8000"
        )
    return host, int(port)


def bind(api: ApiConfig) -> socket.socket:
    """A listening socket. Raises ConfigError: not allowed without TLS, or not possible."""
    host, port = split_address(api.bind)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"api.bind: {host!r} cannot be resolved: {error}") from None
    family, kind, protocol, _, address = found[0]
    loopback = all(ipaddress.ip_address(str(item[4][0]).partition("%")[0]).is_loopback for item in found)
    if not loopback and api.tls is None and not api.insecure:
        raise ConfigError(
            f"api.bind: {api.bind} can be reached from other hosts, and API keys would cross the network in"
            " the clear. Set api.tls.certificate and api.tls.key, or bind 127.0.0.1, or say"
            " api.insecure: true"
        )
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(f"api.bind: cannot listen on {api.bind}: {error.strerror or error}") from None
    return listening
