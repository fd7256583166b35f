"""From an ASGI request to a handler and back: a request is routed, authenticated, limited, read and answered.

It takes the place of Quart's own HTTP connection class: contexts, signals, sessions and werkzeug's routing
cost more than all the rest of a submission, and none of them is needed here. Handlers take a `Call` and
return a `Reply`, or write the answer piece by piece. What they raise becomes the JSON error of `api.errors`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
import trio

from api import errors
from peer import limits
from peer.errors import (
    BadRequest,
    BitinglipError,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    TooLarge,
    Unavailable,
    UnsupportedMediaType,
)
from peer.state.key import ApiKey

if TYPE_CHECKING:
    from api.app import Api

# every route can answer with these; others are named by the route
COMMON_ERRORS = (400, 401, 429, 500, 503)

T = TypeVar("T")
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:@-]{{0,{limits.NAME_CHARS_MAX - 1}}}\Z")
REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z")
QUERY_BYTES_MAX = 4_096
BODY_S_MAX = 30.0  # from the request's head to the end of its body
DRAIN_S_MAX = 2.0  # a refused body is read on for so long, so that the client gets to read the answer
DRAIN_BYTES_MAX = 16 * 1024 * 1024

LEAVING = "bitinglip.leaving"  # the server's ASGI extension that holds a request's Leaving
JSON = (b"content-type", b"application/json")
NO_STORE = (b"cache-control", b"no-store")


class Reply(msgspec.Struct):
    body: bytes
    status: int = 200
    headers: list[tuple[bytes, bytes]] = []
    content_type: bytes = b"application/json"


class Leaving:
    """Tells whoever waits for a client that it has gone: a callback costs far less than a task that watches."""

    def __init__(self) -> None:
        self._gone = False
        self._scope: trio.CancelScope | None = None

    def now(self) -> None:
        self._gone = True
        if self._scope is not None:
            self._scope.cancel()

    def cancels(self, scope: trio.CancelScope | None) -> None:
        """From now on this scope is cancelled when the client goes, at once if it has gone."""
        self._scope = scope
        if scope is not None and self._gone:
            scope.cancel()


class Call:
    """One request, as its handler sees it. `key` is None only where the route needs none."""

    def __init__(self, api: Api, receive: Receive, send: Send, leaving: Leaving) -> None:
        self.api = api
        self._leaving = leaving
        self._receive = receive
        self._send = send
        self.route: Route
        self.args: tuple[str, ...] = ()
        self.key: ApiKey | None = None
        self.headers: dict[bytes, bytes] = {}
        self.query: dict[str, str] = {}
        self.body = b""
        self.request_id = ""
        self.stale_s: float | None = None  # how old the answer is, if a client takes old ones
        self.started = False
        self.body_ended = False  # nothing of the body is left to read

    @property
    def caller(self) -> ApiKey:
        """The key of the client; a route that needs one has it."""
        assert self.key is not None
        return self.key

    async def unless_gone(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, which is cancelled when the client goes or the peer stops.

        Raises ClientGone, or Unavailable when the peer stops.
        """
        with trio.CancelScope() as scope:
            self._leaving.cancels(scope)
            self.api.waiting[scope] = None
            try:
                if not self.api.stopping.is_set():
                    return await work()
            finally:
                del self.api.waiting[scope]
                self._leaving.cancels(None)
        if self.api.stopping.is_set():
            raise Unavailable("The peer is stopping", retry_after_s=2.0)
        raise ClientGone

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin an answer that is written piece by piece."""
        self.started = True
        headers.append((b"x-request-id", self.request_id.encode("ascii")))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


class ClientGone(Exception):
    """Nobody is left to answer."""


Handler = Callable[[Call], Awaitable[Reply | None]]


class Route(msgspec.Struct, frozen=True):
    """A path and method, who may call it, and what `api.openapi` says of it."""

    method: str
    path: str  # "/tasks/{task_id}/stream"
    handler: Handler
    scope: str | None  # None: no key needed
    summary: str
    answer: Any = None  # type of the answer
    status: int = 200
    body: Any = None  # type of the request body
    body_optional: bool = False
    example: dict[str, Any] | None = None  # of a body
    query: tuple[Param, ...] = ()
    headers: tuple[Param, ...] = ()
    errors: tuple[int, ...] = ()
    content_type: str = "application/json"
    description: str = ""
    response_headers: tuple[Param, ...] = ()

    @property
    def query_names(self) -> frozenset[str]:
        return frozenset(param.name for param in self.query)


class Param(msgspec.Struct, frozen=True):
    """A query parameter or header, as OpenAPI describes it; `type` is what msgspec makes a schema of."""

    name: str
    type: Any
    description: str


class Router:
    """Routes by path. Paths without ids are looked up; the few with ids are matched by their segments."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self.routes = routes
        self._fixed: dict[str, dict[str, Route]] = {}
        self._open: dict[int, list[tuple[tuple[str, ...], dict[str, Route]]]] = {}
        self._query: dict[int, frozenset[str]] = {}
        for route in routes:
            self._methods(route.path)[route.method] = route

    def _methods(self, path: str) -> dict[str, Route]:
        if "{" not in path:
            return self._fixed.setdefault(path, {})
        segments = tuple(path[1:].split("/"))
        same_length = self._open.setdefault(len(segments), [])
        for known, methods in same_length:
            if known == segments:
                return methods
        same_length.append((segments, {}))
        return same_length[-1][1]

    def match(self, method: str, path: str) -> tuple[Route, tuple[str, ...]]:
        """The route and its ids. `path` is as it was sent. Raises NotFound, MethodNotAllowed."""
        methods = self._fixed.get(path)
        args: tuple[str, ...] = ()
        if methods is None:
            methods, args = self._match_open(path)
        route = methods.get(method)
        if route is not None:
            return route, args
        if method == "HEAD" and "GET" in methods and methods["GET"].content_type == "application/json":
            return methods["GET"], args
        allow = ", ".join(sorted(methods))
        raise MethodNotAllowed(
            f"{method[:20]} is not possible here; possible: {allow}", details={"allow": allow}
        )

    def _match_open(self, path: str) -> tuple[dict[str, Route], tuple[str, ...]]:
        segments = path[1:].split("/")
        for pattern, methods in self._open.get(len(segments), ()):
            args = []
            for want, have in zip(pattern, segments, strict=True):
                if want[0] != "{":
                    if want != have:
                        break
                    continue
                text = unquote_to_bytes(have).decode("latin-1") if "%" in have else have
                if not ID.match(text):
                    break
                args.append(text)
            else:
                return methods, tuple(args)
        raise NotFound("No such path", code="unknown_path")


def parse_query(raw: bytes, names: frozenset[str]) -> dict[str, str]:
    """Parameters of a query string. Raises BadRequest for what is unknown, given twice or not UTF-8."""
    if not raw:
        return {}
    if len(raw) > QUERY_BYTES_MAX:
        raise BadRequest("The query string is too long", details={"bytes_max": QUERY_BYTES_MAX})
    query: dict[str, str] = {}
    for pair in raw.split(b"&"):
        if not pair:
            continue
        raw_name, _, raw_value = pair.partition(b"=")
        try:
            name = unquote_to_bytes(raw_name.replace(b"+", b" ")).decode()
            value = unquote_to_bytes(raw_value.replace(b"+", b" ")).decode()
        except UnicodeDecodeError:
            raise BadRequest("The query string is not UTF-8") from None
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise BadRequest(
                f"Unknown query parameter {name[:64]!r}; known: {known}", details={"field": name[:64]}
            )
        if name in query:
            raise BadRequest(f"The query parameter {name!r} is given twice", details={"field": name})
        query[name] = value
    return query


_prefix = os.urandom(5).hex()
_numbers = count(1)


def new_request_id() -> str:
    return f"req-{_prefix}-{next(_numbers):x}"


class HttpConnection:
    """One HTTP request on an ASGI server; made by Quart for each."""

    def __init__(self, app: Any, scope: Mapping[str, Any]) -> None:
        self.api: Api = app.api
        self.scope = scope

    async def __call__(self, receive: Receive, send: Send) -> None:
        api, scope = self.api, self.scope
        call = Call(api, receive, send, scope["extensions"][LEAVING])
        extra: list[tuple[bytes, bytes]] = []
        began = api.clock.now()
        try:
            reply = await self._answer(call, extra)
        except BitinglipError as error:
            reply = self._error(call, error)
        except Exception as bug:  # a supervisor: whatever a handler has not foreseen is answered as 500
            cause = _only_cause(bug)
            if isinstance(cause, ClientGone):
                return
            if not isinstance(cause, BitinglipError):
                api.log.error("request failed", request_id=call.request_id, exc_info=bug)
                cause = errors.internal()
            reply = self._error(call, cause)
        if reply is None:
            api.log.debug("stream ended", path=scope["path"], request_id=call.request_id)
            return
        if call.started:  # too late for another status
            await call.finish()
            return
        body = reply.body
        headers = [
            (b"content-type", reply.content_type),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", call.request_id.encode("ascii")),
            NO_STORE,
            *extra,
            *reply.headers,
        ]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
        api.log.debug(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=reply.status,
            request_id=call.request_id,
            seconds=api.clock.now() - began,
        )

    async def _answer(self, call: Call, extra: list[tuple[bytes, bytes]]) -> Reply | None:
        """Everything between the head of the request and the handler's answer."""
        api, scope = call.api, self.scope
        headers = call.headers = dict(scope["headers"])
        wanted = headers.get(b"x-request-id")
        if wanted is not None and REQUEST_ID.match(wanted):
            call.request_id = wanted.decode("ascii")
        else:
            call.request_id = new_request_id()
        has_body = b"content-length" in headers or b"transfer-encoding" in headers
        try:
            call.route, call.args = route, _ = api.router.match(scope["method"], _path(scope["raw_path"]))
            if route.scope is not None:
                key = call.key = api.auth.bearer(headers.get(b"authorization"), route.scope)
                await api.limit(key, extra)
            query = scope["query_string"]
            if query:
                call.query = parse_query(query, api.query_names[id(route)])
            if has_body:
                await self._read_body(call)
        except BitinglipError:
            if has_body:
                await self._drain(call)
            raise
        return await route.handler(call)

    async def _read_body(self, call: Call) -> None:
        bound = call.api.config.api.body_bytes_max
        declared = call.headers.get(b"content-length", b"0")
        if len(declared) > 18 or int(declared) > bound:
            raise TooLarge(f"The body is larger than {bound} bytes", details={"bytes_max": bound})
        chunks: list[bytes] = []
        size = 0
        with trio.move_on_after(BODY_S_MAX) as scope:
            while True:
                message = await call._receive()
                if message["type"] != "http.request":
                    call.body_ended = True
                    raise BadRequest("The body ends early", code="truncated_body")
                data = message["body"]
                if data:
                    size += len(data)
                    if size > bound:
                        raise TooLarge(f"The body is larger than {bound} bytes", details={"bytes_max": bound})
                    chunks.append(data)
                if not message["more_body"]:
                    call.body_ended = True
                    break
        if scope.cancelled_caught:
            raise BadRequest(f"The body did not arrive within {BODY_S_MAX:.0f} s", code="body_timeout")
        if not size:
            return
        if call.route.body is None:
            if call.route.method == "GET":
                return
            raise BadRequest("This request takes no body", code="unexpected_body")
        content_type = call.headers.get(b"content-type", b"").split(b";", 1)[0].strip().lower()
        if content_type != b"application/json":
            raise UnsupportedMediaType("The body must be JSON: Content-Type: application/json")
        call.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _drain(self, call: Call) -> None:
        """Read on a little: closing at once would reset the connection under the answer."""
        size = 0
        with trio.move_on_after(DRAIN_S_MAX):
            while not call.body_ended and size < DRAIN_BYTES_MAX:
                message = await call._receive()
                if message["type"] != "http.request" or not message["more_body"]:
                    return
                size += len(message["body"])

    def _error(self, call: Call, error: BitinglipError) -> Reply:
        return Reply(
            errors.body(error, call.request_id, self.api.clock.wall()),
            error.status,
            errors.headers(error),
        )


def rate_limited(retry_after_s: int, limit: int) -> RateLimited:
    return RateLimited(
        f"The key's limit of {limit} requests is used up; try again in {retry_after_s} s",
        code="rate_limit_exceeded",
        details={"limit": limit, "retry_after_seconds": retry_after_s},
        retry_after_s=retry_after_s,
    )


def _path(raw: bytes) -> str:
    """The path as it was sent; an absolute-form target loses its scheme and host."""
    path = raw.decode("latin-1")
    if path[:1] != "/" and "://" in path:
        path = "/" + path.split("://", 1)[1].partition("/")[2]
    return path


def _only_cause(bug: BaseException) -> BaseException:
    """What is inside nested exception groups of one."""
    while isinstance(bug, BaseExceptionGroup) and len(bug.exceptions) == 1:
        bug = bug.exceptions[0]
    return bug


def query_int(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """An integer query parameter within its bounds. Raises BadRequest that names it."""
    text = query.get(name)
    if text is None:
        return default
    if re.fullmatch(r"-?[0-9]{1,18}", text) is None or not low <= int(text) <= high:
        raise BadRequest(
            f"{name} must be an integer from {low} to {high}",
            details={"field": name, "minimum": low, "maximum": high},
        )
    return int(text)


def query_float(query: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    """A number in a query parameter within its bounds. Raises BadRequest that names it."""
    text = query.get(name)
    if text is None:
        return default
    try:
        value = float(text) if len(text) <= 32 and text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise BadRequest(
            f"{name} must be a number from {low:g} to {high:g}",
            details={"field": name, "minimum": low, "maximum": high},
        )
    return value


def query_choice(query: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str | None:
    """One of a few words, or None. Raises BadRequest that names the parameter."""
    text = query.get(name)
    if text is not None and text not in choices:
        raise BadRequest(
            f"{name} must be one of {', '.join(choices)}", details={"field": name, "choices": list(choices)}
        )
    return text
