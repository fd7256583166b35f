"""peer.ports.Network over TCP and TLS 1.3, where both sides show a certificate of the cluster's own CA.

After the handshake the side that listens says in one short frame whether it takes the connection: an empty frame, or
why not. TLS alone would let the dialler believe that it is connected before its certificate has been looked at.
"""

from __future__ import annotations

import errno
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Final

import structlog
import trio
from trio import TASK_STATUS_IGNORED, TaskStatus

from peer import limits
from peer.adapters.links.certificates import ENROL_ALPN, LINK_ALPN, Credentials, Subject, subject_of
from peer.adapters.links.tls_frames import FrameStream, Tls, tune
from peer.errors import Unauthorized, Unavailable
from peer.ports import REFUSED, TURNED_AWAY, Connection
from peer.settings import split_bind

log = structlog.get_logger("peer")

PORT_DEFAULT: Final = 8001
GIVE_UP_S: Final = 0.98 * limits.DIAL_S_MAX
HANDSHAKE_S_MAX: Final = 2.0  # by then the dialler has given up
HANDSHAKES_MAX: Final = 64  # at once, of callers who have proven nothing yet
CONNECTIONS_MAX: Final = 4_096
CONNECTIONS_PER_PEER_MAX: Final = limits.STREAMS_MAX + 16  # each stream of tokens has its own
BACKLOG: Final = 128
VERDICT_BYTES_MAX: Final = 512
LOGGED_PER_S: Final = 5  # refused handshakes; the rest is counted

EnrolHandler = Callable[[Tls, str], Awaitable[None]]
"""Serves one host that wants to join: its stream, and its IP address."""


class TlsConnection:
    """peer.ports.Connection: one side."""

    def __init__(self, frames: FrameStream, subject: Subject, held: dict[TlsConnection, None]) -> None:
        """`held`: those of this peer that are not over, this one among them."""
        self.peer_id = subject.peer_id
        self.serial = subject.serial
        self._frames = frames
        self._held = held
        held[self] = None

    async def send(self, *frames: bytes) -> None:
        """See peer.ports.Connection. A send that is cancelled half-way breaks the connection."""
        try:
            await self._frames.send(*frames)
        finally:
            self._tidy()

    async def receive(self) -> bytes:
        """See peer.ports.Connection."""
        try:
            return await self._frames.receive()
        finally:
            self._tidy()

    async def aclose(self) -> None:
        """See peer.ports.Connection. Does not wait, and closes even if it is cancelled."""
        self.end("this side has closed it")
        await trio.lowlevel.checkpoint()

    def end(self, why: str) -> None:
        self._frames.end(why)
        self._tidy()

    def _tidy(self) -> None:
        if self._frames.over:
            self._held.pop(self, None)


class TlsNetwork:
    """The network of one peer.

    `enrol` serves hosts that have no certificate yet; None refuses them.
    """

    def __init__(self, bind: str, credentials: Credentials, *, enrol: EnrolHandler | None = None) -> None:
        """`bind`: HOST:PORT, port 0 for a free one. Raises ConfigError on credentials that cannot be used."""
        self._host, self._port = split_bind(bind)
        self._enrol = enrol
        self._held: dict[TlsConnection, None] = {}
        self._revoked: frozenset[str] = frozenset()
        self._revoked_serials: frozenset[str] = frozenset()
        self._handshakes: dict[trio.CancelScope, None] = {}  # the oldest first
        self._refusals = _Refusals()
        self.address = ""  # HOST:PORT that it listens at
        self.renew(credentials)

    @property
    def connections(self) -> int:
        """Those that are open."""
        return len(self._held)

    def renew(self, credentials: Credentials) -> None:
        """From now on show this certificate; connections that are open go on. Raises ConfigError."""
        server, client = credentials.server_context(), credentials.client_context()
        self._server, self._client, self._me = server, client, credentials.subject

    def revoke(self, peer_ids: Collection[str], serials: Collection[str] = ()) -> None:
        """All peers, and all single certificates, that are revoked: what is open to them ends at once."""
        self._revoked, self._revoked_serials = frozenset(peer_ids), frozenset(serials)
        for connection in list(self._held):
            if self._is_revoked(connection.peer_id, connection.serial):
                log.warning("revoked_peer_cut_off", peer_id=connection.peer_id)
                connection.end(f"{connection.peer_id} has been revoked")

    def close(self) -> None:
        """End every connection now. Does not wait; to stop listening cancel `listen`."""
        for connection in list(self._held):
            connection.end("this side has closed it")

    # ---------------------------------------------------------------- dialling

    async def dial(self, peer_id: str, address: str) -> Connection:
        """See peer.ports.Network."""
        if peer_id in self._revoked:
            raise Unavailable(f"{peer_id} has been revoked")
        try:
            host, port = split_bind(address)
        except ValueError as error:
            raise Unavailable(f"{peer_id} cannot be reached: {error}") from None
        with trio.move_on_after(GIVE_UP_S):
            return await self._dial(peer_id, address, host, port)
        raise Unavailable(f"{peer_id} does not answer at {address}")

    async def _dial(self, peer_id: str, address: str, host: str, port: int) -> Connection:
        try:
            transport = await trio.open_tcp_stream(host, port)
        except OSError as error:
            refused = _below(error).errno == errno.ECONNREFUSED
            raise Unavailable(
                f"{peer_id} cannot be reached at {address}: {_why(error)}", code=REFUSED if refused else ""
            ) from None
        connection = None
        try:
            _tune(transport)
            stream: Tls = trio.SSLStream(transport, self._client, https_compatible=True)
            try:
                await stream.do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise Unavailable(f"{peer_id} at {address}: {_handshake_failed(error)}") from None
            subject = self._proven(stream)
            if subject.peer_id != peer_id:
                raise Unavailable(f"{subject.peer_id} answers at {address} in place of {peer_id}")
            frames = FrameStream(stream, peer_id, frame_bytes_max=VERDICT_BYTES_MAX)
            await self._await_verdict(frames)
            self._proven(stream)  # it may have been revoked meanwhile
            frames.frame_bytes_max = limits.FRAME_BYTES_MAX
            connection = TlsConnection(frames, subject, self._held)
            return connection
        except Unauthorized as error:
            raise Unavailable(f"{peer_id} at {address}: {error.message}") from None
        finally:
            if connection is None:
                transport.socket.close()

    async def _await_verdict(self, frames: FrameStream) -> None:
        """Raises Unavailable unless the other side takes this connection."""
        try:
            refusal = (await frames.receive()).decode(errors="replace")
        except Unavailable as error:
            raise Unavailable(
                f"{error.message}: it did not take this host's certificate, which may be of another cluster, "
                "have expired, or not hold by its clock"
            ) from None
        if refusal:
            raise Unavailable(f"{frames.who} has refused the connection: {refusal}", code=TURNED_AWAY)

    # ---------------------------------------------------------------- listening

    async def listen(
        self,
        accept: Callable[[Connection], Awaitable[None]],
        *,
        task_status: TaskStatus[None] = TASK_STATUS_IGNORED,
    ) -> None:
        """See peer.ports.Network. Raises OSError if it cannot listen."""
        listeners = await trio.open_tcp_listeners(self._port, host=self._host, backlog=BACKLOG)
        name, port = listeners[0].socket.getsockname()[:2]
        self.address = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

        async def serve(transport: trio.SocketStream) -> None:
            await self._serve(transport, accept)

        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(trio.serve_listeners, serve, listeners)
                task_status.started()
        finally:
            for listener in listeners:
                listener.socket.close()

    async def _serve(
        self, transport: trio.SocketStream, accept: Callable[[Connection], Awaitable[None]]
    ) -> None:
        try:
            source = str(transport.socket.getpeername()[0])
        except OSError:
            return  # it has gone already
        _tune(transport)
        stream: Tls = trio.SSLStream(transport, self._server, server_side=True, https_compatible=True)
        try:
            if not await self._shake_hands(stream, source):
                return
            if stream.selected_alpn_protocol() == ENROL_ALPN:
                await self._serve_enrolment(stream, source)
                return
            connection = await self._admit(stream, source)
            if connection is not None:
                try:
                    await accept(connection)
                finally:
                    connection.end("this side has closed it")
        except Exception:  # a bug in what serves one caller ends no peer
            log.exception("serving_failed", source=source)
        finally:
            transport.socket.close()

    async def _shake_hands(self, stream: Tls, source: str) -> bool:
        """Whether it came to an end in time. When there are too many the oldest is given up: honest ones are quick."""
        while len(self._handshakes) >= HANDSHAKES_MAX:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()
        with trio.move_on_after(HANDSHAKE_S_MAX) as scope:
            self._handshakes[scope] = None
            try:
                await stream.do_handshake()
                return True
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._refusals.note(source, _handshake_failed(error))
            finally:
                self._handshakes.pop(scope, None)
        if scope.cancelled_caught:
            self._refusals.note(source, "the handshake was not finished in time")
        return False

    async def _admit(self, stream: Tls, source: str) -> TlsConnection | None:
        """The connection, if the caller is a peer of this cluster that may come in; otherwise it is told why not."""
        frames = FrameStream(stream, source)
        connection = None
        refusal = ""
        try:
            subject = self._proven(stream)
        except Unauthorized as error:
            refusal = error.message
        else:
            frames.who = subject.peer_id
            of_peer = sum(each.peer_id == subject.peer_id for each in self._held)
            if of_peer >= CONNECTIONS_PER_PEER_MAX:
                refusal = f"{subject.peer_id} has {of_peer} connections open, which is the most"
            elif len(self._held) >= CONNECTIONS_MAX:
                refusal = f"there are {CONNECTIONS_MAX} connections, which is the most"
            else:
                connection = TlsConnection(frames, subject, self._held)
        if refusal:
            self._refusals.note(source, refusal)
        with trio.move_on_after(HANDSHAKE_S_MAX):
            try:
                await frames.send(refusal.encode()[:VERDICT_BYTES_MAX])
                return connection
            except Unavailable as error:
                self._refusals.note(source, error.message)
        if connection is not None:
            connection.end("it does not take the verdict")
        return None

    async def _serve_enrolment(self, stream: Tls, source: str) -> None:
        if self._enrol is None:
            self._refusals.note(source, "hosts cannot join through this peer")
        else:
            await self._enrol(stream, source)

    # ---------------------------------------------------------------- who it is

    def _proven(self, stream: Tls) -> Subject:
        """Whom the other side's certificate names, which the TLS library has verified. Raises Unauthorized."""
        if stream.selected_alpn_protocol() != LINK_ALPN:
            raise Unauthorized("it does not speak bitinglip's link protocol")
        shown = stream.getpeercert(binary_form=True)
        if shown is None:
            raise Unauthorized("it shows no certificate")
        subject = subject_of(shown)
        if subject.cluster != self._me.cluster:
            raise Unauthorized(
                f"{subject.peer_id} is of the cluster {subject.cluster!r}, not {self._me.cluster!r}"
            )
        if self._is_revoked(subject.peer_id, subject.serial):
            raise Unauthorized(f"{subject.peer_id} has been revoked")
        return subject

    def _is_revoked(self, peer_id: str, serial: str) -> bool:
        return peer_id in self._revoked or serial in self._revoked_serials


class _Refusals:
    """Notes in the log, at most LOGGED_PER_S: who knocks at the port must not fill the disk."""

    def __init__(self) -> None:
        self._second = -1
        self._counts: Counter[str] = Counter()

    def note(self, source: str, why: str) -> None:
        second = int(trio.current_time())
        if second != self._second:
            self._second = second
            self._counts["logged"] = 0
        if self._counts["logged"] < LOGGED_PER_S:
            self._counts["logged"] += 1
            log.info("caller_refused", source=source, why=why, unlogged=self._counts.pop("unlogged", 0))
        else:
            self._counts["unlogged"] += 1


def _tune(transport: trio.SocketStream) -> None:
    """As `tune`. A socket that is broken already says so when it is used."""
    try:
        tune(transport)
    except OSError as error:
        log.debug("socket_not_tuned", why=error.strerror)


def _why(error: OSError) -> str:
    inner = _below(error)
    return inner.strerror or str(inner)


def _below(error: OSError) -> OSError:
    """What the system said; trio gives one error for all the addresses of a name."""
    below: BaseException | None = error.__cause__
    while isinstance(below, BaseExceptionGroup):
        below = below.exceptions[0]
    return below if isinstance(below, OSError) else error


def _handshake_failed(error: BaseException) -> str:
    """Why a handshake failed, for people."""
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        what = cause.verify_message
        if "self-signed" in what or "issuer" in what or "signature" in what:
            return f"its certificate is not of this cluster's CA ({what})"
        if "expired" in what or "not yet valid" in what:
            return f"its certificate does not hold by this host's clock ({what})"
        return f"its certificate is refused ({what})"
    if isinstance(cause, ssl.SSLError):
        reason = (cause.reason or str(cause)).replace("_", " ").lower()
        if "eof" in reason or isinstance(cause, ssl.SSLEOFError):
            return "it ended the handshake: it may not trust this host's certificate, or its clock differs"
        return f"no TLS handshake came about ({reason})"
    return "it ended the connection in the handshake"
