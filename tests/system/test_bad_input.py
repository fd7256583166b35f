"""Bytes that no honest client sends, against the full product: a clear error each time, and nothing else happens.

Before and after each test a task runs to its end, the tasks known before are still there, and over the whole
module the peer's memory stays where it was.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.process.peers import Peer, Peers, poll, submission
from tests.process.traffic import socket_url

pytestmark = pytest.mark.process

GROWTH_BYTES_MAX = 40 * 1024 * 1024
ANSWER_S_MAX = 10.0
BODY_BYTES_MAX = 256 * 1024
IDLE = 300
FLOOD = 3_000


@pytest.fixture(scope="module")
def peer(peers: Peers) -> Iterator[Peer]:
    """Warmed up: its memory is measured when caches are filled, and once more at the end."""
    made = peers.start({"api": {"body_bytes_max": BODY_BYTES_MAX}, "engine": {"fake": {"tokens_per_s": 500}}})
    made.await_workers()
    for number in range(50):
        assert made.submit(f"warm {number}", wait_s=20)["status"] == "completed"
    post(made, json.dumps(submission("w" * (BODY_BYTES_MAX - 1_000))).encode())
    before = made.rss_bytes()
    yield made
    grown = made.rss_bytes() - before
    assert grown < GROWTH_BYTES_MAX, f"the peer has grown by {grown / 1e6:.1f} MB"
    assert "Traceback" not in made.log()


@pytest.fixture(autouse=True)
def canary(peer: Peer) -> Iterator[None]:
    """A task made before survives, and one made after completes."""
    before = peer.submit("before", wait_s=20)
    assert before["status"] == "completed"
    process = peer.pid
    yield
    peer.check()
    assert peer.pid == process
    assert peer.task(before["task_id"]) == before
    assert peer.submit("after", wait_s=20)["status"] == "completed"


def dial(peer: Peer) -> socket.socket:
    address = urlsplit(peer.url)
    return socket.create_connection((address.hostname or "", address.port or 0), timeout=ANSWER_S_MAX)


def head(peer: Peer, method: str, target: str, *lines: str) -> bytes:
    fields = ["Host: peer", f"Authorization: Bearer {peer.key}", *lines]
    return "\r\n".join([f"{method} {target} HTTP/1.1", *fields, "", ""]).encode("latin-1")


def read_answer(sock: socket.socket) -> tuple[int, Any]:
    """Status and JSON body of one answer; (0, None) if the connection ended without one."""
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            piece = sock.recv(65_536)
        except ConnectionResetError:
            piece = b""
        if not piece:
            assert not data, data
            return 0, None
        data += piece
    start, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in start.split(b"\r\n")[1:])
    assert fields[b"content-type"] == b"application/json", start
    while len(body) < int(fields[b"content-length"]):
        body += sock.recv(65_536)
    return int(start.split()[1]), json.loads(body)


def exchange(peer: Peer, data: bytes, *, end: bool = False) -> tuple[int, Any]:
    """Send bytes on a new connection, half-close it if `end`, and read the answer."""
    with closing(dial(peer)) as sock:
        send_quietly(sock, data)  # it may be refused before all is sent, and the answer be there
        if end:
            sock.shutdown(socket.SHUT_WR)
        return read_answer(sock)


def post(
    peer: Peer, body: bytes, *, path: str = "/tasks", length: int | None = None, end: bool = False
) -> Any:
    size = len(body) if length is None else length
    lines = ("Content-Type: application/json", f"Content-Length: {size}")
    return exchange(peer, head(peer, "POST", path, *lines) + body, end=end)


def refused(answer: tuple[int, Any], *statuses: int) -> dict[str, Any]:
    """It is one of these errors, in the documented form."""
    status, body = answer
    assert status in statuses, answer
    error: dict[str, Any] = body["error"]
    assert error.keys() >= {"code", "type", "message", "details", "request_id", "timestamp"}
    assert body["detail"] == error["message"] != ""
    return error


def a_body(**changes: Any) -> bytes:
    return json.dumps(submission("x") | changes).encode()


PROMPT = b'{"task_type":"text_generation","model_name":"echo","parameters":{"prompt":%s}}'
BODIES: dict[str, bytes] = {
    "truncated JSON": a_body()[:-5],
    "not JSON": b"task=1",
    "empty": b"",
    "null": b"null",
    "an array": b"[]",
    "a string": b'"x"',
    "NUL between": b"{\x00}",
    "raw NUL in a text": PROMPT % b'"a\x00b"',
    "not UTF-8": PROMPT % b'"\xff\xfe"',
    "half a surrogate as bytes": PROMPT % b'"\xed\xa0\x80"',
    "UTF-16": a_body().decode().encode("utf-16"),
    "number for a text": PROMPT % b"1",
    "object for a text": PROMPT % b"{}",
    "text for an object": a_body(parameters="x"),
    "deep array": PROMPT % (b"[" * 100_000 + b"]" * 100_000),
    "deep object": b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
    "twice": b'{"task_type":"text_generation","task_type":"text_generation",' + a_body()[1:],
    "twice, inside": PROMPT % b'"x","prompt":"y"',
    "huge integer": a_body().replace(b'"max_tokens": 8000', b'"max_tokens": ' + b"9" * 5_000),
    "huge exponent": a_body().replace(b'"max_tokens": 8000', b'"max_tokens": 1e999999'),
    "not a number": a_body().replace(b'"max_tokens": 8000', b'"max_tokens": NaN'),
    "negative": a_body(timeout=-1),
    "huge timeout": a_body(timeout=1e300),
    "unknown field": a_body(surprise=1),
    "long model name": a_body(model_name="m" * 10_000),
    "trailing data": a_body() + b"{}",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(peer: Peer, name: str) -> None:
    refused(post(peer, BODIES[name]), 400)


@pytest.mark.parametrize(
    "model",
    [
        "../echo",
        "..%2fecho",
        "echo\x00",
        "/etc/passwd",
        "écho",
        "‮echo",
        "echo\n",
        "%00",
        " echo",
        "ECHO",
        "💥",
    ],
)
def test_model_names(peer: Peer, model: str) -> None:
    error = refused(post(peer, a_body(model_name=model)), 400, 404)
    assert "passwd" not in json.dumps(error["details"].get("nearest", ""))
    body = json.dumps({"model_name": model, "worker_ids": [model]}).encode()
    for path in ("/models/assign", "/models/unload"):
        refused(post(peer, body, path=path), 400, 404)


@pytest.mark.parametrize(
    "target",
    [
        "/tasks/..%2f..%2fadmin.key",
        "/tasks/../../etc/passwd",
        "/tasks/%00",
        "/tasks/task%00",
        "/tasks/%ff%fe",
        "/tasks/" + "a" * 5_000,
        "/tasks/%F0%9F%92%A5",
        "/tasks/a%2fb",
        "/tasks/a%0d%0aSet-Cookie:x",
        "/workers/..%2f",
        "/workers/%2e%2e/restart",
        "//tasks",
        "/tasks/?",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/tasks?limit=99999999999999999999",
        "/tasks?limit=1&limit=2",
        "/tasks?offset=-1",
        "/tasks?status=%00",
        "/tasks?worker_id=../x",
        "/tasks?x=" + "y" * 10_000,
        "/cluster/metrics?timeframe=1h%00",
    ],
)
def test_paths_and_queries(peer: Peer, target: str) -> None:
    refused(exchange(peer, head(peer, "GET", target)), 400, 404, 405)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 50 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"POST /tasks HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /tasks HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"POST /tasks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /live\x00z HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_not_http(peer: Peer, data: bytes) -> None:
    answer = exchange(peer, data)
    if answer != (0, None):  # some of it may be too broken to answer
        refused(answer, 400, 401, 404)


def test_a_body_that_is_too_large_is_refused_unread(peer: Peer) -> None:
    refused(post(peer, b"", length=10 * 1024**3), 413)
    refused(post(peer, b" " * (BODY_BYTES_MAX + 1)), 413)
    chunked = head(peer, "POST", "/tasks", "Content-Type: application/json", "Transfer-Encoding: chunked")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    refused(exchange(peer, chunked + chunk * (2 + BODY_BYTES_MAX // 0x10000) + b"0\r\n\r\n"), 413)


def test_a_truncated_body_makes_no_task(peer: Peer) -> None:
    total = peer.get("/tasks")["total"]
    answer = post(peer, a_body(), length=len(a_body()) + 10, end=True)
    if answer != (0, None):
        refused(answer, 400)
    with closing(dial(peer)) as sock:
        sock.sendall(
            head(peer, "POST", "/tasks", "Content-Type: application/json", "Content-Length: 500") + b"{"
        )
    assert peer.get("/tasks")["total"] == total


def test_half_closed_clients_get_their_answer(peer: Peer) -> None:
    status, body = post(peer, a_body(), end=True)
    assert status == 201
    assert peer.task(body["task_id"], wait_s=20)["status"] == "completed"


def test_slow_and_idle_clients_are_in_nobodys_way(peer: Peer) -> None:
    """Heads and bodies that never end, and connections that say nothing: others are served at once."""
    unfinished = head(peer, "POST", "/tasks", "Content-Type: application/json", "Content-Length: 99")
    with ExitStack() as stack:
        held = [stack.enter_context(closing(dial(peer))) for _ in range(IDLE)]
        for number, sock in enumerate(held):
            if number % 3 == 0:
                sock.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\nX-Slow: ")
            elif number % 3 == 1:
                sock.sendall(unfinished + b"{")
        began = time.monotonic()
        for number in range(5):
            for sock in held[::10]:
                send_quietly(sock, b"x")
            assert peer.submit(f"meanwhile {number}", wait_s=10)["status"] == "completed"
        assert time.monotonic() - began < ANSWER_S_MAX
        # a head that does not end is given up; a body has longer
        assert closed_within(held[0], 15.0)


def send_quietly(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        sock.sendall(data)


def closed_within(sock: socket.socket, within_s: float) -> bool:
    sock.settimeout(within_s)
    try:
        while sock.recv(65_536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_clients_that_never_read(peer: Peer) -> None:
    """Lists, a stream and events asked for again and again by clients with tiny buffers that take nothing."""
    text = " ".join(["word"] * 4_000)
    long = peer.submit(text)["task_id"]
    with ExitStack() as stack:
        for number in range(20):
            sock = stack.enter_context(closing(socket.socket()))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            address = urlsplit(peer.url)
            sock.connect((address.hostname or "", address.port or 0))
            if number % 2:
                send_quietly(sock, head(peer, "GET", "/tasks?limit=500") * 50)
            else:
                send_quietly(sock, head(peer, "GET", f"/tasks/{long}/stream"))
        assert peer.submit("meanwhile", wait_s=10)["status"] == "completed"
        assert peer.task(long, wait_s=30)["status"] == "completed"


def test_clients_that_vanish(peer: Peer) -> None:
    """A reset in the middle of a request, a wait or a stream."""
    long = peer.submit(" ".join(["word"] * 1_000))["task_id"]
    for number in range(60):
        with closing(dial(peer)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            target = (f"/tasks/{long}/stream", f"/tasks/{long}?wait=30", "/ws")[number % 3]
            sock.sendall(head(peer, "GET", target))
    assert peer.task(long, wait_s=30)["status"] == "completed"


def receive_for_ever(websocket: ClientConnection) -> None:
    while True:
        websocket.recv(ANSWER_S_MAX)


def test_a_flood_over_a_websocket_is_cut_off_or_ignored(peer: Peer) -> None:
    url, headers = f"{socket_url(peer.url)}/ws", peer.headers
    with connect(url, additional_headers=headers) as flood:
        flood.send("x" * 100_000)  # more than a message may have
        with pytest.raises(ConnectionClosed):
            receive_for_ever(flood)
    try:
        with connect(url, additional_headers=headers) as flood:
            for _ in range(FLOOD):
                flood.send("x")
    except ConnectionClosed:
        pass
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(connect(url, additional_headers=headers))
        with pytest.raises(InvalidStatus) as too_many, connect(url, additional_headers=headers):
            pass
        assert too_many.value.response.status_code == 429

    def free_again() -> bool:
        try:
            with connect(url, additional_headers=headers):
                return True
        except InvalidStatus:
            return False

    poll("the places are free again", free_again)
