"""`/ws`: the cluster's events as they happen, and those that were missed.

Close codes: 1001 the peer stops, 1008 the key no longer holds, 1013 the cluster cannot serve now, 4408 the
reader was too slow, 4410 the events after `since` are no longer kept. (A flood or a too large message is
closed with 1008 or 1009 by `api.wire`.) What clients send is read and ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import trio
from msgspec import Meta
from quart import Response, websocket
from werkzeug.exceptions import HTTPException

from api import errors, format, schemas_live
from api.http import REQUEST_ID, Call, Param, Reply, Route, new_request_id, parse_query
from peer import limits
from peer.errors import (
    BadRequest,
    BitinglipError,
    Compacted,
    NotFound,
    Overloaded,
    Unauthorized,
)
from peer.state.event import EVENT_NAMES, Event
from peer.state.key import ApiKey
from peer.state.quota import Client, KeepTicket, RedeemTicket

if TYPE_CHECKING:
    from api.app import Api, ApiApp

_encode = msgspec.json.Encoder(enc_hook=str).encode

SUBPROTOCOL = "bitinglip"
BEARER = "bearer."
QUERY = frozenset({"events", "since", "ticket", "key", "token", "api_key", "access_token"})
_NAMES = "|".join(EVENT_NAMES)
NEVER_IN_URL = ("key", "token", "api_key", "access_token")
TIMES = {"load_s": "load_time"}  # as the reference calls it elsewhere
KEY_CHECK_S = 1.0  # how soon a revoked key closes its sockets

Close = tuple[int, str]


def data_view(data: dict[str, Any]) -> dict[str, Any]:
    """An event's data: seconds and bytes stay as numbers and are also given as the documented texts."""
    shown: dict[str, Any] = {}
    for name, value in data.items():
        if value is None and name.endswith("_s"):  # never measured: the task never started
            base = TIMES.get(name, name[:-2])
            shown[base] = shown[base + "_seconds"] = None
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and name.endswith("_s"):
            base = TIMES.get(name, name[:-2])
            shown[base] = format.duration(value)
            shown[base + "_seconds"] = value
        elif number and name == "duration":
            shown[name] = format.duration(value)
            shown["duration_seconds"] = value
        elif number and name.endswith("_bytes"):
            shown[name[:-6]] = format.memory(value)
            shown[name] = value
        elif number and name.endswith("_at"):
            shown[name] = format.timestamp(value)
        else:
            shown[name] = value
    return shown


def view(event: Event) -> schemas_live.ClusterEvent:
    return schemas_live.ClusterEvent(
        id=event.id,
        event=event.event,
        timestamp=format.timestamp(event.timestamp),
        data=data_view(event.data),
    )


class Asked(msgspec.Struct, frozen=True):
    """What a handshake asks for; `names` None means every event."""

    names: frozenset[str] | None
    since: int | None
    ticket: str


def parse(raw: bytes) -> Asked:
    """The query of a handshake. Raises BadRequest."""
    query = parse_query(raw, QUERY)
    for name in NEVER_IN_URL:
        if name in query:
            raise BadRequest(
                "An API key must not be in a URL: use the Authorization header, Sec-WebSocket-Protocol, or a"
                " ticket from POST /ws/ticket",
                details={"field": name},
            )
    names: frozenset[str] | None = None
    if "events" in query:
        names = frozenset(query["events"].split(","))
        unknown = sorted(names - set(EVENT_NAMES))
        if unknown:
            raise BadRequest(
                f"Unknown event {unknown[0][:64]!r}; known: {', '.join(EVENT_NAMES)}",
                details={"field": "events", "unknown": [name[:64] for name in unknown[:10]]},
            )
    since: int | None = None
    if "since" in query:
        text = query["since"]
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise BadRequest("since must be the id of an event", details={"field": "since"})
        since = int(text)
    return Asked(names=names, since=since, ticket=query.get("ticket", ""))


async def authenticate(api: Api, asked: Asked, header: str | None, subprotocols: list[str]) -> ApiKey:
    """The key of a handshake: by ticket, header, or subprotocol. Raises Unauthorized."""
    if asked.ticket:
        key = api.cluster.key(await api.cluster.call(RedeemTicket(ticket=asked.ticket)))
        if key is None:
            raise Unauthorized("The API key is not valid")
        api.auth.check(key, "read")
        return key
    if header is None:
        for offered in subprotocols:
            if offered.startswith(BEARER):
                return api.auth.token(offered[len(BEARER) :].encode("latin-1", "replace"), "read")
    return api.auth.bearer(None if header is None else header.encode("latin-1", "replace"), "read")


async def admit(api: Api, key: ApiKey, headers: list[tuple[bytes, bytes]]) -> None:
    """Raises RateLimited, or Overloaded when this peer has too many sockets."""
    await api.limit(key, headers)
    if api.sockets.total() >= limits.WEBSOCKETS_MAX:
        raise Overloaded("Too many WebSocket connections are open", retry_after_s=5.0)


async def serve_events(app: ApiApp) -> Response | None:
    """One WebSocket from handshake to close."""
    api = app.api
    headers: list[tuple[bytes, bytes]] = []
    request_id = _request_id()
    try:
        asked = parse(websocket.query_string)
        offered = websocket.requested_subprotocols
        key = await authenticate(api, asked, websocket.headers.get("Authorization"), offered)
        await admit(api, key, headers)
    except BitinglipError as error:
        return refusal(api, error, request_id, headers)
    api.sockets[key.key_id] += 1
    try:
        return await _serve(api, key, asked, request_id, headers)
    finally:
        api.sockets[key.key_id] -= 1
        if not api.sockets[key.key_id]:
            del api.sockets[key.key_id]


async def _serve(
    api: Api, key: ApiKey, asked: Asked, request_id: str, headers: list[tuple[bytes, bytes]]
) -> Response | None:
    """Whoever reads events has a WebSocket, as the cluster counts them: so reading begins before the handshake ends."""
    client = Client(key_id=key.key_id, sockets_max=api.config.limits.websockets_per_client)
    async with AsyncExitStack() as stack:
        events: AsyncIterator[Event] | Compacted
        try:
            events = await stack.enter_async_context(api.cluster.events(asked.since, client))
        except Compacted as error:
            events = error  # it is told so over the WebSocket
        except BitinglipError as error:
            return refusal(api, error, request_id, headers)
        api.log.debug("websocket opened", request_id=request_id, key_id=key.key_id)
        await websocket.accept(
            headers={"X-Request-ID": request_id},
            subprotocol=SUBPROTOCOL if SUBPROTOCOL in websocket.requested_subprotocols else None,
        )
        if isinstance(events, Compacted):
            code, reason = await _no_longer_kept(api, events)
        else:
            code, reason = await _until_closed(api, key.key_id, asked, events)
        api.log.debug("websocket closed", request_id=request_id, code=code, reason=reason)
        await websocket.close(code, reason)
    return None


async def _no_longer_kept(api: Api, error: Compacted) -> Close:
    await websocket.send(errors.body(error, "", api.clock.wall()).decode())
    return 4410, "the events after since are no longer kept"


async def _until_closed(api: Api, key_id: str, asked: Asked, events: AsyncIterator[Event]) -> Close:
    """Forward events until there is a reason to close. The client's own closing cancels this."""
    closing: list[Close] = []
    async with trio.open_nursery() as nursery:

        async def run(work: Callable[[], Awaitable[Close]]) -> None:
            closing.append(await work())
            nursery.cancel_scope.cancel()

        async def read() -> Close:
            while True:
                await websocket.receive()

        async def watch_key() -> Close:
            while api.auth.in_force(key_id, "read"):  # noqa: ASYNC110 - keys have no event to wait for
                await trio.sleep(KEY_CHECK_S)
            return 1008, "the API key no longer holds"

        async def watch_stop() -> Close:
            await api.stopping.wait()
            return 1001, "the peer is stopping"

        async def forward() -> Close:
            return await _forward(api, asked, events)

        for work in (read, watch_key, watch_stop, forward):
            nursery.start_soon(run, work)
    return closing[0]


async def _forward(api: Api, asked: Asked, events: AsyncIterator[Event]) -> Close:
    names = asked.names
    try:
        async for event in events:
            if names is None or event.event in names:
                await websocket.send(_encode(view(event)).decode())
    except Compacted as error:
        return await _no_longer_kept(api, error)
    except Overloaded:
        return 4408, "the reader is too slow"
    except BitinglipError as error:
        return 1013, error.message[:100]
    return 1013, "no more events"


def _request_id() -> str:
    wanted = websocket.headers.get("X-Request-ID", "")
    return wanted if wanted.isascii() and REQUEST_ID.match(wanted.encode()) else new_request_id()


def refusal(api: Api, error: BitinglipError, request_id: str, headers: list[tuple[bytes, bytes]]) -> Response:
    """An HTTP answer in place of a WebSocket."""
    answer = Response(
        errors.body(error, request_id, api.clock.wall()), status=error.status, content_type="application/json"
    )
    answer.headers["X-Request-ID"] = request_id
    for name, value in (*headers, *errors.headers(error)):
        answer.headers[name.decode()] = value.decode()
    return answer


async def needs_upgrade(call: Call) -> Reply:
    raise NotFound("This path speaks WebSocket only", code="upgrade_required")


async def ticket(call: Call) -> Reply:
    api = call.api
    text = secrets.token_urlsafe(24)
    await api.cluster.call(KeepTicket(ticket=text, key_id=call.caller.key_id))
    made = schemas_live.Ticket(
        ticket=text,
        expires_in=int(limits.TICKET_S),
        expires_at=format.timestamp(api.clock.wall() + limits.TICKET_S),
    )
    return Reply(_encode(made), 201)


def register(app: ApiApp) -> None:
    """Add the WebSocket to the app; other WebSocket paths are answered with 404."""

    async def events() -> Response | None:
        return await serve_events(app)

    async def refused(error: HTTPException) -> Response:
        return refusal(app.api, NotFound("No such path", code="unknown_path"), _request_id(), [])

    app.websocket("/ws")(events)
    app.register_error_handler(HTTPException, refused)


ROUTES = (
    Route(
        "GET",
        "/ws",
        needs_upgrade,
        "read",
        "Events as they happen (WebSocket)",
        schemas_live.ClusterEvent,
        101,
        description=(
            "A WebSocket. Authenticate by the Authorization header, by the subprotocols"
            " `bitinglip, bearer.<api_key>`, or by a one-time ticket. Each message is one event. Close codes:"
            " 1001 the peer stops, 1008 the key no longer holds or the client floods, 1009 a message is too"
            " large, 1013 try again later, 4408 the reader is too slow, 4410 the events after `since` are no"
            " longer kept."
        ),
        query=(
            Param(
                "events",
                Annotated[str, Meta(pattern=f"^({_NAMES})(,({_NAMES}))*$")],
                "Only these events, separated by commas",
            ),
            Param("since", Annotated[int, Meta(ge=0, lt=10**18)], "Begin with the event after this id"),
            Param("ticket", str, "A ticket from POST /ws/ticket"),
        ),
        errors=(404,),
    ),
    Route("POST", "/ws/ticket", ticket, "read", "A one-time ticket for a WebSocket", schemas_live.Ticket, 201),
)
