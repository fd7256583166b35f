"""The client's half of HTTP to etcd: what was sent and what was not, and who gets which answer. No etcd is needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from peer.adapters.stores.etcd_client import AnswerTooLarge, EtcdClient, decoder, failure
from peer.adapters.stores.etcd_http import HttpPool, NotSent
from peer.errors import (
    Ambiguous,
    Compacted,
    Conflict,
    NotFound,
    StoreBroken,
    StoreError,
    TooLarge,
    Unavailable,
)

Serve = Callable[[trio.SocketStream], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


async def listen(nursery: trio.Nursery, serve: Serve) -> str:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, [listener])
    return f"127.0.0.1:{listener.socket.getsockname()[1]}"


async def request(stream: trio.SocketStream) -> bytes:
    """One whole request with a body of at least two bytes that ends in }; b"" at the end."""
    data = b""
    while not data.endswith(b"}"):
        more = await stream.receive_some()
        if not more:
            return b""
        data += bytes(more)
    return data


async def test_connections_are_kept_and_bounded(nursery: trio.Nursery) -> None:
    opened, at_once, most = 0, 0, 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal opened, at_once, most
        opened += 1
        while await request(stream):
            at_once += 1
            most = max(most, at_once)
            await trio.sleep(0.001)
            at_once -= 1
            await stream.send_all(OK)

    pool = HttpPool(await listen(nursery, serve), connections_max=4)

    async def ask() -> None:
        for _ in range(5):
            assert (await pool.call("POST", "/", b"{}", 5.0)).body == b"{}"

    async with trio.open_nursery() as askers:
        for _ in range(20):
            askers.start_soon(ask)
    assert opened == most == 4
    pool.close()
    with pytest.raises(NotSent):
        await pool.call("POST", "/", b"{}", 5.0)
    nursery.cancel_scope.cancel()


async def test_a_connection_that_was_closed_meanwhile_is_replaced(nursery: trio.Nursery) -> None:
    opened = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal opened
        opened += 1
        await request(stream)
        await stream.send_all(OK)
        await stream.aclose()

    pool = HttpPool(await listen(nursery, serve))
    for _ in range(3):
        assert (await pool.call("POST", "/", b"{}", 5.0)).status == 200
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert opened == 3
    pool.close()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}", b"\x00garbage\r\n\r\n"]
)
async def test_what_was_sent_and_not_answered_is_ambiguous_for_writes(
    answer: bytes, nursery: trio.Nursery
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await request(stream)
        await stream.send_all(answer)
        await stream.aclose()

    client = EtcdClient(await listen(nursery, serve))
    with pytest.raises(Ambiguous):
        await client.call("kv/txn", {}, decoder(dict), writes=True)
    with pytest.raises(Unavailable):
        await client.call("kv/range", {}, decoder(dict), writes=False)
    client.close()
    nursery.cancel_scope.cancel()


async def test_a_silent_member_is_given_up_in_time(nursery: trio.Nursery, autojump_clock: Any) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    client = EtcdClient(await listen(nursery, serve), call_s_max=2.0)
    with pytest.raises(Ambiguous, match="2 s"):
        await client.call("kv/txn", {}, decoder(dict), writes=True)
    with pytest.raises(Unavailable, match="2 s"):
        await client.call("kv/range", {}, decoder(dict), writes=False)
    # a request that does not fit into the socket's buffers was not sent
    with pytest.raises(Unavailable):
        await client.call("kv/txn", {"key": "x" * 64_000_000}, decoder(dict), writes=True)
    client.close()
    nursery.cancel_scope.cancel()


async def test_nobody_there(tmp_path: Any) -> None:
    for address in ("127.0.0.1:1", f"unix:{tmp_path}/none", f"unix:{tmp_path}/{'long/' * 40}none"):
        with pytest.raises(Unavailable):
            await EtcdClient(address).call("kv/txn", {}, decoder(dict), writes=True)


async def test_a_cancelled_callers_answer_is_nobody_elses(nursery: trio.Nursery) -> None:
    go_on = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        while data := await request(stream):
            if b"slow" in data:
                await go_on.wait()
            body = data.rpartition(b"\r\n\r\n")[2]
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    client = EtcdClient(await listen(nursery, serve))
    with trio.move_on_after(0.05):
        await client.call("x", {"a": "slow"}, decoder(dict), writes=True)
    go_on.set()
    for number in range(5):
        assert await client.call("x", {"a": number}, decoder(dict), writes=True) == {"a": number}
    client.close()
    nursery.cancel_scope.cancel()


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("message", "code", "of_write", "of_read"),
    [
        ("etcdserver: request timed out", 14, Ambiguous, Unavailable),
        (
            "etcdserver: request timed out, possibly due to previous leader failure",
            14,
            Ambiguous,
            Unavailable,
        ),
        ("etcdserver: request timed out, possibly due to connection lost", 14, Ambiguous, Unavailable),
        ("etcdserver: leader changed", 14, Ambiguous, Unavailable),
        ("etcdserver: server stopped", 14, Ambiguous, Unavailable),
        ("context deadline exceeded", 4, Ambiguous, Unavailable),
        ("transport is closing", 14, Ambiguous, Unavailable),
        ("etcdserver: no leader", 14, Unavailable, Unavailable),
        ("etcdserver: too many requests", 8, Unavailable, Unavailable),
        ("raft proposal dropped", 2, Unavailable, Unavailable),
        ("etcdserver: rpc not supported for learner", 9, Unavailable, Unavailable),
        ("etcdserver: mvcc: database space exceeded", 8, Ambiguous, Unavailable),
        ("etcdserver: request is too large", 3, TooLarge, AnswerTooLarge),
        ("etcdserver: too many operations in txn request", 3, TooLarge, AnswerTooLarge),
        ("grpc: received message larger than max (5 vs. 4)", 8, TooLarge, AnswerTooLarge),
        ("etcdserver: requested lease not found", 5, NotFound, NotFound),
        ("etcdserver: mvcc: required revision has been compacted", 11, Compacted, Compacted),
        ("etcdserver: corrupt cluster", 15, StoreBroken, StoreBroken),
        ("etcdserver: bad leader transferee", 9, Conflict, Conflict),
        ("etcdserver: key is not provided", 3, StoreError, StoreError),
    ],
)
def test_what_etcds_errors_mean(
    message: str, code: int, of_write: type[Exception], of_read: type[Exception]
) -> None:
    old = f'{{"error":"{message}","message":"{message}","code":{code}}}'
    new = f'{{"code":{code},"message":"{message}","details":[]}}'
    streamed = f'{{"error":{{"grpc_code":{code},"http_code":503,"message":"{message}"}}}}'
    for body in (old, new, streamed):
        assert type(failure(503, body.encode(), writes=True)) is of_write
        assert type(failure(503, body.encode(), writes=False)) is of_read


def test_what_is_not_etcd() -> None:
    assert type(failure(404, b"404 page not found", writes=True)) is StoreError
    assert type(failure(502, b"<html>", writes=True)) is Ambiguous
    assert type(failure(502, b"<html>", writes=False)) is Unavailable
