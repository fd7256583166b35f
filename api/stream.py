"""A task's text as server-sent events, token by token, from its beginning to its end."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import trio

from api import errors, logprobs, schemas_live
from api.http import Call, Reply, Route
from api.tasks import detail, ended_at_stop
from peer import limits
from peer.errors import BitinglipError, Overloaded, Unauthorized, Unavailable
from peer.state.command import StreamEnd, StreamItem, StreamRestart, StreamToken

_encode = msgspec.json.Encoder().encode

BUFFERED_MAX = 256  # items between the cluster and the client
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


def message(item: StreamItem) -> bytes:
    """One server-sent event."""
    if isinstance(item, StreamToken):
        data = _encode(
            schemas_live.TokenData(
                index=item.index,
                text=item.text,
                count=item.count,
                attempt=item.attempt,
                logprobs=logprobs.shown(item.logprobs),
            )
        )
        return b"event: token\ndata: " + data + b"\n\n"
    if isinstance(item, StreamRestart):
        restart = schemas_live.RestartData(attempt=item.attempt, reason=item.reason)
        return b"event: restart\ndata: " + _encode(restart) + b"\n\n"
    return b"event: done\ndata: " + _encode(detail(item.view)) + b"\n\n"


async def stream(call: Call) -> Reply | None:
    """Answers only when the task is known, so that an unknown one is a plain 404."""
    api = call.api
    if api.streams >= limits.STREAMS_MAX:
        raise Overloaded("Too many streams are open", retry_after_s=5.0)
    api.streams += 1
    try:
        async with api.cluster.stream(call.args[0]) as items:
            await call.start(200, list(HEADERS))
            await call.write(b": stream of a task\n\n")
            try:
                await call.unless_gone(lambda: _send_all(call, items))
            except* BitinglipError as group:
                ended = await ended_at_stop(call, call.args[0])
                last = _broken(call, group.exceptions[0]) if ended is None else message(StreamEnd(view=ended))
                await call.write(last)
    finally:
        api.streams -= 1
    await call.finish()
    return None


def _broken(call: Call, cause: BaseException) -> bytes:
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    error = cause if isinstance(cause, BitinglipError) else errors.internal()
    return b"event: error\ndata: " + errors.body(error, call.request_id, call.api.clock.wall()) + b"\n\n"


async def _send_all(call: Call, items: AsyncIterator[StreamItem]) -> None:
    """Forward until the end. A pump waits on the cluster, so that no heartbeat cancels its iterator."""
    to_client, ready = trio.open_memory_channel[StreamItem](BUFFERED_MAX)

    async def pump() -> None:
        async for item in items:
            await to_client.send(item)
        await to_client.aclose()  # not when it fails: the failure ends the stream then

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump)
        while True:
            with trio.move_on_after(limits.STREAM_IDLE_S_MAX) as idle:
                try:
                    item = await ready.receive()
                except trio.EndOfChannel:
                    raise Unavailable(
                        "The stream broke off; the task goes on", code="stream_broken"
                    ) from None
            if idle.cancelled_caught:
                if not call.api.auth.in_force(call.caller.key_id, "read"):
                    raise Unauthorized("The API key is no longer valid")
                await call.write(b": keep-alive\n\n")
                continue
            pieces = [message(item)]
            while not isinstance(item, StreamEnd):
                try:
                    item = ready.receive_nowait()
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
                pieces.append(message(item))
            await call.write(b"".join(pieces))
            if isinstance(item, StreamEnd):
                nursery.cancel_scope.cancel()
                return


ROUTES = (
    Route(
        "GET",
        "/tasks/{task_id}/stream",
        stream,
        "read",
        "A task's text as it is generated",
        description=(
            "Server-sent events: `token` {index, text, count, attempt}; `restart` {attempt, reason} when an"
            " attempt ended without a result and the text before it is void; at the end `done` with the task,"
            " or `error` with an error body when the stream breaks off."
        ),
        errors=(404,),
        content_type="text/event-stream",
    ),
)
