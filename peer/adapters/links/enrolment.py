"""How a new host gets in: over TLS, under the protocol ENROL_ALPN, on the port of the link.

The side that listens sends the CA's certificate first. The host compares it with the digest in its token, and comes
again trusting that CA alone: only a host with a certificate of that CA is ever sent the token's secret.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import structlog
import trio

from peer import errors, limits
from peer.adapters.links import certificates
from peer.adapters.links.certificates import ENROL_ALPN
from peer.adapters.links.own_addresses import own_names
from peer.adapters.links.tls_frames import FrameStream, Tls
from peer.errors import BadRequest, BitinglipError, Overloaded, RateLimited, Unauthorized, Unavailable
from peer.ports import Clock
from peer.state import enrol as records
from peer.state.base import Record
from peer.state.enrol import Enrol, Enrolled

log = structlog.get_logger("peer")

FRAME_BYTES_MAX: Final = 64 * 1024
ASK_S_MAX: Final = 5.0  # from the handshake to the request
ASKING_MAX: Final = 32  # connections that have not asked yet; the oldest goes first
ANSWERING_MAX: Final = 8
TRIES_MAX: Final = 5  # refused requests in TRIES_S, of one address
TRIES_ALL_MAX: Final = 60  # of all
TRIES_S: Final = 60.0
REPLY_S_MAX: Final = 5.0
CONNECT_S_MAX: Final = 10.0
JOIN_S_MAX: Final = limits.COMMAND_S_MAX + REPLY_S_MAX


class Ask(Record, frozen=True, tag="ask"):
    token_id: str
    secret: str
    peer_id: str
    csr: str
    addresses: tuple[str, ...] = ()


class Taken(Record, frozen=True, tag="taken"):
    enrolled: Enrolled


class Refused(Record, frozen=True, tag="refused"):
    """A peer.errors.BitinglipError, by the name of its class."""

    kind: str
    code: str
    message: str
    retry_after_s: float | None = None


_encode = msgspec.msgpack.Encoder().encode
_ask = msgspec.msgpack.Decoder(Ask).decode
_answer = msgspec.msgpack.Decoder(Taken | Refused).decode

# ---------------------------------------------------------------- the side that is asked


class EnrolmentServer:
    """Serves new hosts on a peer: it checks the form of what they ask and hands it over to who decides."""

    def __init__(self, ca_pem: str, admit: Callable[[Enrol], Awaitable[Enrolled]], clock: Clock) -> None:
        """`admit` has the leader decide, and the answer signed; it raises BitinglipError."""
        self._ca_der = certificates.der_of(ca_pem)
        self._admit = admit
        self._asking: dict[trio.CancelScope, None] = {}  # the oldest first
        self._answering = 0
        self._tries = _Tries(clock)

    async def serve(self, stream: Tls, source: str) -> None:
        """tls_network.EnrolHandler."""
        frames = FrameStream(stream, source, frame_bytes_max=FRAME_BYTES_MAX)
        try:
            request = await self._read(frames)
            if request is None:
                return
            answer = await self._answer(request, source)
            with trio.move_on_after(REPLY_S_MAX):
                await frames.send(_encode(answer))
                await (
                    frames.receive()
                )  # the other side closes when it has read: to close first might lose the answer
        except Unavailable as error:
            log.debug("enrolment_ended", source=source, why=error.message)
        finally:
            frames.end("this side has closed it")

    async def _read(self, frames: FrameStream) -> bytes | None:
        """What is asked; None if nothing is in time. Raises Unavailable."""
        while len(self._asking) >= ASKING_MAX:
            oldest = next(iter(self._asking))
            del self._asking[oldest]
            oldest.cancel()
        with trio.move_on_after(ASK_S_MAX) as scope:
            self._asking[scope] = None
            try:
                await frames.send(self._ca_der)
                return await frames.receive()
            finally:
                self._asking.pop(scope, None)
        return None

    async def _answer(self, request: bytes, source: str) -> Taken | Refused:
        try:
            if self._answering >= ANSWERING_MAX:
                raise Overloaded("too many hosts join at once", retry_after_s=2.0)
            with self._tries.of(source):
                self._answering += 1
                try:
                    enrolled = await self._decide(request)
                finally:
                    self._answering -= 1
        except BitinglipError as error:
            # Those are not bounded, as the others are by the tries: they must not fill the disk.
            note = log.debug if isinstance(error, (RateLimited, Overloaded)) else log.warning
            note("enrolment_refused", source=source, why=error.message, code=error.code)
            return Refused(
                kind=type(error).__name__,
                code=error.code,
                message=error.message,
                retry_after_s=error.retry_after_s,
            )
        log.info("enrolled", source=source, peer_id=enrolled.peer_id)
        return Taken(enrolled=enrolled)

    async def _decide(self, request: bytes) -> Enrolled:
        try:
            ask = _ask(request)
        except msgspec.DecodeError as error:
            raise BadRequest(f"the request to join was not understood: {error}") from None
        if not records.is_token_id(ask.token_id) or len(ask.csr) > records.CSR_CHARS_MAX:
            raise BadRequest("the request to join is not usable")
        command = Enrol(
            token_id=ask.token_id,
            secret_sha256=records.digest(ask.secret),
            peer_id=ask.peer_id,
            csr=ask.csr,
            key_sha256=certificates.requested_key_sha256(ask.csr),
            addresses=ask.addresses,
        )
        with trio.move_on_after(limits.COMMAND_S_MAX):
            return await self._admit(command)
        raise Unavailable("no leader answered in time; try again", retry_after_s=2.0)


class _Tries:
    """How often was asked in vain lately. Secrets are too long to guess: this bounds the leader's work for nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._latest: deque[tuple[float, str]] = deque()  # no more than TRIES_ALL_MAX

    def of(self, source: str) -> _Try:
        """Counts unless it ends well. Raises RateLimited on entry."""
        now, network = self._clock.now(), _network(source)
        while self._latest and self._latest[0][0] <= now - TRIES_S:
            self._latest.popleft()
        mine = sum(1 for _, each in self._latest if each == network)
        if mine >= TRIES_MAX or len(self._latest) >= TRIES_ALL_MAX:
            raise RateLimited(
                "too many requests to join were refused lately; wait a minute", retry_after_s=TRIES_S
            )
        entry = (now, network)
        self._latest.append(entry)
        return _Try(self._latest, entry)


class _Try:
    def __init__(self, latest: deque[tuple[float, str]], entry: tuple[float, str]) -> None:
        self._latest, self._entry = latest, entry

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if (kind is None or issubclass(kind, (Unavailable, Overloaded))) and self._entry in self._latest:
            self._latest.remove(self._entry)


def _network(source: str) -> str:
    """Whom an address belongs to: who has one IPv6 address has 2**64 of them."""
    try:
        address = ipaddress.ip_address(source.partition("%")[0])
    except ValueError:
        return source
    if address.version == 4:
        return source
    return str(ipaddress.ip_network((address, 64), strict=False))


# ---------------------------------------------------------------- the side that asks


async def join(
    host: str,
    port: int,
    token: str,
    *,
    peer_id: str,
    key_pem: str,
    now: float,
    addresses: tuple[str, ...] = (),
) -> Enrolled:
    """Ask the peer at that address to let this host in; checked, and not yet written down.

    `addresses`: what the certificate shall speak for; none: the address that this host is seen at from there, and its
    name.
    May be asked again with the same key. Raises Unauthorized (nothing was sent if its code is "wrong_ca"), BadRequest,
    Conflict, RateLimited, Overloaded, Unavailable.
    """
    parts = records.split_token(token.strip())
    if parts is None:
        raise BadRequest("that is no join token; `bitinglip token` on a host of the cluster prints one")
    token_id, secret, ca_sha256 = parts
    with trio.move_on_after(JOIN_S_MAX):
        ca_pem = await _fetch_ca(host, port, ca_sha256)
        frames, local = await _connect(host, port, _enrolling(certificates.trusting(ca_pem)))
        try:
            cluster = certificates.subject_of(_shown(frames.stream)).cluster
            await frames.receive()  # the CA again
            ask = Ask(
                token_id=token_id,
                secret=secret,
                peer_id=peer_id,
                csr=certificates.request(key_pem),
                addresses=addresses or (local, *await own_names()),
            )
            await frames.send(_encode(ask))
            enrolled = _understood(await frames.receive())
        finally:
            frames.end("this side has closed it")
        _check(enrolled, cluster, ca_sha256)
        subject = certificates.check_issued(enrolled.certificate, enrolled.ca, key_pem, now)
        if (subject.cluster, subject.peer_id) != (cluster, peer_id):
            raise Unauthorized(f"the certificate that came is for {subject.peer_id} of {subject.cluster!r}")
        return enrolled
    raise Unavailable(f"{host}:{port} did not answer in {JOIN_S_MAX:g} s; try again with the same token")


async def _fetch_ca(host: str, port: int, ca_sha256: str) -> str:
    """The CA's certificate, PEM, if it is the token's. Raises Unauthorized, Unavailable."""
    frames, _ = await _connect(host, port, certificates.trusting_nobody_yet())
    try:
        with trio.move_on_after(CONNECT_S_MAX):
            der = await frames.receive()
            if not records.same(certificates.ca_sha256_of(der), ca_sha256):
                raise _wrong_ca(host, port, "it shows another CA than the token's")
            return certificates.pem_of(der)
        raise Unavailable(f"{host}:{port} does not answer")
    finally:
        frames.end("this side has closed it")


async def _connect(host: str, port: int, context: ssl.SSLContext) -> tuple[FrameStream, str]:
    """Frames to that address under ENROL_ALPN, and this host's own address there. Raises Unauthorized, Unavailable."""
    with trio.move_on_after(CONNECT_S_MAX):
        try:
            transport = await trio.open_tcp_stream(host, port)
        except OSError as error:
            raise Unavailable(f"{host}:{port} cannot be reached: {error.strerror or error}") from None
        stream: Tls = trio.SSLStream(transport, context, https_compatible=True)
        done = False
        try:
            await stream.do_handshake()
            if stream.selected_alpn_protocol() != ENROL_ALPN:
                raise Unavailable(f"what answers at {host}:{port} is no peer's link port")
            local = str(transport.socket.getsockname()[0]).partition("%")[0]
            done = True
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            cause = error.__cause__
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise _not_trusted(host, port, cause.verify_message) from None
            raise Unavailable(f"what answers at {host}:{port} is no peer's link port") from None
        finally:
            if not done:
                transport.socket.close()
        return FrameStream(stream, f"{host}:{port}", frame_bytes_max=FRAME_BYTES_MAX), local
    raise Unavailable(f"{host}:{port} does not answer")


def _enrolling(context: ssl.SSLContext) -> ssl.SSLContext:
    context.set_alpn_protocols([ENROL_ALPN])
    return context


def _shown(stream: Tls) -> bytes:
    shown: bytes | None = stream.getpeercert(binary_form=True)
    return shown or b""


def _wrong_ca(host: str, port: int, why: str) -> Unauthorized:
    return Unauthorized(
        f"{host}:{port} is not a host of the token's cluster ({why}). The token's secret was not sent. Is the address "
        "right, and was the token copied whole?",
        code="wrong_ca",
    )


def _not_trusted(host: str, port: int, why: str) -> Unauthorized:
    if "expired" in why or "not yet valid" in why:
        return Unauthorized(
            f"the certificate of {host}:{port} does not hold by this host's clock ({why}): set the clocks right. "
            "The token's secret was not sent.",
            code="clock_skew",
        )
    return _wrong_ca(host, port, why)


def _understood(answer: bytes) -> Enrolled:
    try:
        found = _answer(answer)
    except msgspec.DecodeError as error:
        raise Unavailable(f"the answer was not understood: {error}", code="wire_error") from None
    if isinstance(found, Taken):
        return found.enrolled
    kind = getattr(errors, found.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, BitinglipError)):
        kind = BitinglipError
    raise kind(found.message, code=found.code, retry_after_s=found.retry_after_s)


def _check(enrolled: Enrolled, cluster: str, ca_sha256: str) -> None:
    """Raises Unauthorized if the answer speaks of another cluster than who gave it."""
    if enrolled.cluster != cluster:
        raise Unauthorized(f"the answer is of the cluster {enrolled.cluster!r}, who gave it of {cluster!r}")
    if not records.same(certificates.ca_sha256_of(certificates.der_of(enrolled.ca)), ca_sha256):
        raise Unauthorized("the answer brings another CA than the token's", code="wrong_ca")
