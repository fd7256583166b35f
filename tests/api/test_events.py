"""`/ws` over real WebSocket connections, good ones and bad ones."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from api import events_ws, wire
from peer.config import Limits
from peer.errors import Unavailable
from tests.api.conftest import RunningServer, eventually
from tests.api.fake_parts import token

BIG = "x" * 60_000


def open_socket(
    server: RunningServer, query: str = "", name: str | None = "read", **options: Any
) -> ClientConnection:
    if name is not None:
        options["additional_headers"] = {"Authorization": f"Bearer {token(name)}"}
    url = f"ws://{server.address[0]}:{server.address[1]}/ws{query}"
    made: ClientConnection = connect(url, open_timeout=10, close_timeout=1, **options)
    return made


def refusal(server: RunningServer, query: str = "", name: str | None = "read", **options: Any) -> Any:
    """Status and error of a handshake that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        open_socket(server, query, name, **options)
    response = caught.value.response
    error = json.loads(response.body or b"")["error"]
    assert error["request_id"] == response.headers["x-request-id"]
    return response.status_code, error, response.headers


def closing(connection: ClientConnection) -> tuple[int | None, str]:
    """Read until the server closes; its code and reason."""
    return until_closed(lambda: connection.recv(timeout=10))


def until_closed(work: Callable[[], Any]) -> tuple[int | None, str]:
    """Repeat until the server closes; its code and reason, (None, "") if neither could be read."""
    for _ in range(100_000):
        try:
            work()
        except ConnectionClosed as closed:
            return (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (None, "")
    raise AssertionError("the server does not close")


@pytest.fixture
def connection(server: RunningServer) -> Iterator[ClientConnection]:
    with open_socket(server) as made:
        eventually(lambda: server.app.api.sockets["read"])
        ready(server, made)
        yield made


def ready(server: RunningServer, connection: ClientConnection) -> None:
    """Events flow: what is emitted from now on arrives."""
    while True:
        server.do(server.cluster.emit, "model_unloaded")
        try:
            connection.recv(timeout=0.2)
        except TimeoutError:
            continue
        break
    while True:
        try:
            connection.recv(timeout=0.01)
        except TimeoutError:
            return


def test_the_documented_event(server: RunningServer, connection: ClientConnection) -> None:
    server.do(
        server.cluster.emit,
        "task_completed",
        task_id="task-12345",
        worker_id="worker-001",
        duration_s=3.21,
        success=True,
        used_bytes=8 * 2**30,
        load_s=45.25,
    )
    event = json.loads(connection.recv(timeout=10))
    assert event.pop("id") == len(server.cluster.journal)
    assert event == {
        "event": "task_completed",
        "timestamp": "2025-05-30T10:00:00Z",
        "data": {
            "task_id": "task-12345",
            "worker_id": "worker-001",
            "duration": "3.2s",
            "duration_seconds": 3.21,
            "success": True,
            "used": "8GB",
            "used_bytes": 8 * 2**30,
            "load_time": "45.2s",
            "load_time_seconds": 45.25,
        },
    }


def test_events_are_chosen(server: RunningServer) -> None:
    for name in ("task_failed", "model_loaded", "gpu_alert", "model_loaded"):
        server.do(server.cluster.emit, name)
    with open_socket(server, "?events=model_loaded,gpu_alert&since=0") as connection:
        assert [json.loads(connection.recv(timeout=10))["id"] for _ in range(3)] == [2, 3, 4]


def test_what_was_missed_comes_again(server: RunningServer) -> None:
    for _ in range(5):
        server.do(server.cluster.emit, "model_loaded")
    with open_socket(server, "?since=3") as connection:
        assert [json.loads(connection.recv(timeout=10))["id"] for _ in range(2)] == [4, 5]
        server.do(server.cluster.emit, "model_loaded")
        assert json.loads(connection.recv(timeout=10))["id"] == 6


def test_what_is_no_longer_kept(server: RunningServer) -> None:
    server.cluster.kept_from = 100
    with open_socket(server, "?since=3") as connection:
        assert json.loads(connection.recv(timeout=10))["error"]["code"] == "compacted"
        assert closing(connection)[0] == 4410


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("?events=task_completed,nonsense", "events"),
        ("?events=", "events"),
        ("?since=-1", "since"),
        ("?since=abc", "since"),
        ("?since=" + "9" * 30, "since"),
        ("?other=1", "other"),
        (f"?key={token('read')}", "key"),
        (f"?token={token('read')}", "token"),
    ],
)
def test_wrong_queries(server: RunningServer, query: str, field: str) -> None:
    status, error, _ = refusal(server, query)
    assert status == 400
    assert error["details"]["field"] == field


def test_a_key_is_needed(server: RunningServer) -> None:
    assert refusal(server, name=None)[0] == 401
    wrong = {"Authorization": "Bearer blk_read_" + "0" * 64}
    assert refusal(server, name=None, additional_headers=wrong)[0] == 401
    assert refusal(server, name=None, subprotocols=["bitinglip"])[0] == 401
    assert refusal(server, name=None, subprotocols=["bitinglip", "bearer.nonsense"])[0] == 401
    assert refusal(server, "?ticket=nonsense", name=None)[0] == 401


def test_the_key_as_subprotocol(server: RunningServer) -> None:
    with open_socket(server, name=None, subprotocols=["bitinglip", f"bearer.{token('read')}"]) as connection:
        assert connection.subprotocol == "bitinglip"
        ready(server, connection)


def test_tickets(server: RunningServer) -> None:
    headers = {"Authorization": f"Bearer {token('read')}"}

    def ticket() -> str:
        answer = httpx.post(server.url + "/ws/ticket", headers=headers)
        assert answer.status_code == 201
        assert answer.json()["expires_in"] == 30
        return str(answer.json()["ticket"])

    first = ticket()
    with open_socket(server, f"?ticket={first}", name=None) as connection:
        ready(server, connection)
    assert refusal(server, f"?ticket={first}", name=None)[0] == 401
    late = ticket()
    server.clock.offset += 30
    assert refusal(server, f"?ticket={late}", name=None)[0] == 401


def test_ten_per_client(server: RunningServer) -> None:
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(open_socket(server))
        status, error, headers = refusal(server)
        assert (status, error["code"]) == (429, "too_many_websockets")
        assert int(headers["retry-after"]) >= 1
        stack.enter_context(open_socket(server, name="submit"))
    eventually(lambda: not server.app.api.sockets.total())
    with open_socket(server):
        pass


def test_the_limit_can_be_configured(start_server: Any) -> None:
    server = start_server(limits=Limits(websockets_per_client=1))
    with open_socket(server):
        assert refusal(server)[0] == 429


def test_other_paths_are_404(server: RunningServer) -> None:
    with pytest.raises(InvalidStatus) as caught:
        connect(f"ws://{server.address[0]}:{server.address[1]}/tasks", open_timeout=10)
    assert caught.value.response.status_code == 404
    assert json.loads(caught.value.response.body or b"")["error"]["code"] == "unknown_path"


def test_a_revoked_key_closes_it(server: RunningServer, connection: ClientConnection) -> None:
    del server.cluster.keys["read"]
    assert closing(connection)[0] == 1008


def test_what_clients_send_is_ignored(server: RunningServer, connection: ClientConnection) -> None:
    connection.send("")
    connection.send(b"")
    connection.send("hello")
    connection.send(b"\x00\xff" * 100)
    connection.send(["in ", "pieces"])
    assert connection.ping().wait(10)
    server.do(server.cluster.emit, "gpu_alert")
    assert json.loads(connection.recv(timeout=10))["event"] == "gpu_alert"


def test_too_large_a_message(server: RunningServer, connection: ClientConnection) -> None:
    connection.send("x" * 70_000)
    assert closing(connection)[0] == 1009
    eventually(lambda: not server.app.api.sockets.total())


def test_a_flood(server: RunningServer, connection: ClientConnection) -> None:
    assert until_closed(lambda: connection.send("x"))[0] in (1008, None)
    eventually(lambda: not server.app.api.sockets.total())


def test_a_flood_of_pings(server: RunningServer, connection: ClientConnection) -> None:
    assert until_closed(connection.ping)[0] in (1008, None)
    eventually(lambda: not server.app.api.sockets.total())


def test_no_compression(server: RunningServer) -> None:
    with open_socket(server, compression="deflate") as connection:
        assert connection.response is not None
        assert "Sec-WebSocket-Extensions" not in connection.response.headers


def test_the_cluster_cannot_serve(server: RunningServer, connection: ClientConnection) -> None:
    server.cluster.failure = Unavailable("no leader")
    server.do(server.cluster.notify)
    assert closing(connection) == (1013, "no leader")


def test_a_reader_that_is_too_slow(server: RunningServer, connection: ClientConnection) -> None:
    server.cluster.behind_max = 5

    def burst() -> None:
        for _ in range(50):
            server.cluster.emit("gpu_alert")

    server.do(burst)
    assert closing(connection)[0] == 4408


def raw_handshake(server: RunningServer, extra: bytes = b"") -> socket.socket:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    raw.settimeout(10)
    raw.connect(server.address)
    raw.sendall(
        b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Authorization: Bearer " + token("read").encode() + b"\r\n\r\n" + extra
    )
    return raw


def test_a_client_that_never_reads(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SEND_S_MAX", 0.3)
    with raw_handshake(server) as raw:
        assert raw.recv(12) == b"HTTP/1.1 101"
        eventually(lambda: server.app.api.sockets["read"])

        def gone() -> bool:
            server.do(server.cluster.emit, "gpu_alert", text=BIG)
            return not server.app.api.sockets.total()

        eventually(gone)
    eventually(lambda: not server.app.api.sockets.total())


def test_frames_before_the_handshake_is_answered(server: RunningServer) -> None:
    with raw_handshake(server, b"\x81\x80\x00\x00\x00\x00" * 3) as raw:
        while raw.recv(65_536):
            pass
    eventually(lambda: not server.app.api.sockets.total())


def test_broken_frames(server: RunningServer) -> None:
    with raw_handshake(server) as raw:
        assert raw.recv(12) == b"HTTP/1.1 101"
        eventually(lambda: server.app.api.sockets["read"])
        raw.sendall(b"\xff\xff\xff\xff\xff\xff")
        while raw.recv(65_536):
            pass
    eventually(lambda: not server.app.api.sockets.total())


def test_a_client_that_vanishes(server: RunningServer) -> None:
    raw = raw_handshake(server)
    assert raw.recv(12) == b"HTTP/1.1 101"
    eventually(lambda: server.app.api.sockets["read"])
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()
    eventually(lambda: not server.app.api.sockets.total())


def test_the_peer_stops(server: RunningServer, connection: ClientConnection) -> None:
    server.do(server.app.api.stop)
    assert closing(connection)[0] == 1001


def test_key_check_is_frequent() -> None:
    assert events_ws.KEY_CHECK_S <= 1.0
