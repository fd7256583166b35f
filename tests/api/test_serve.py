"""The server itself: binding, slow and stuck clients, bodies, stopping."""

from __future__ import annotations

import json
import resource
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from api import http, serve, wire
from peer.config import Api, Tls
from peer.errors import ConfigError
from peer.state import command
from tests.api.conftest import RunningServer, eventually, submission
from tests.api.fake_parts import token
from tests.api.test_refusals import check_error, exchange

HEAD = f"POST /tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('admin')}\r\n".encode()


def test_binding_to_the_network_must_be_meant() -> None:
    with pytest.raises(ConfigError, match=r"api\.insecure: true"):
        serve.bind(Api(bind="0.0.0.0:0"))
    with pytest.raises(ConfigError, match="in the clear"):
        serve.bind(Api(bind="[::]:0"))
    serve.bind(Api(bind="0.0.0.0:0", insecure=True)).close()
    serve.bind(Api(bind="localhost:0")).close()


@pytest.mark.parametrize(
    "text", ["", "8000", ":8000", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "::1:80", "a:70000"]
)
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match=r"api\.bind"):
        serve.bind(Api(bind=text))


def test_a_taken_port_is_said() -> None:
    with serve.bind(Api(bind="127.0.0.1:0")) as taken, pytest.raises(ConfigError, match="cannot listen"):
        serve.bind(Api(bind=f"127.0.0.1:{taken.getsockname()[1]}"))


def test_socket_options() -> None:
    with serve.bind(Api(bind="127.0.0.1:0")) as listening:
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == serve.TCP_USER_TIMEOUT_MS


def test_ipv6(start_server: Any) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    assert serve.split_address("[::1]:8000") == ("::1", 8000)


@pytest.fixture
def certificate(tmp_path: Path) -> Tls:
    made = Tls(certificate=str(tmp_path / "cert.pem"), key=str(tmp_path / "key.pem"))
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-keyout", made.key, "-out", made.certificate, "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return made


def test_tls(start_server: Any, certificate: Tls) -> None:
    server = start_server(tls=certificate)
    trust = ssl.create_default_context(cafile=certificate.certificate)
    answer = httpx.get(server.url + "/livez", verify=trust)
    assert answer.json() == {"status": "ok"}
    with httpx.Client(base_url=server.url) as strict, pytest.raises(httpx.ConnectError):
        strict.get("/livez")
    with socket.create_connection(server.address):
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < serve.GRACE_S


def test_tls_files_that_are_missing(start_server: Any) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        start_server(tls=Tls(certificate="/nowhere", key="/nowhere"))
    assert caught.group_contains(ConfigError, match=r"api\.tls")


def test_a_body_in_chunks(server: RunningServer) -> None:
    body = json.dumps(submission()).encode()
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7)
    )
    head = HEAD + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert exchange(server, head + chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 201 ")


def test_a_body_in_pieces(server: RunningServer) -> None:
    body = json.dumps(submission()).encode()
    head = HEAD + b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    with socket.create_connection(server.address, timeout=10) as raw:
        for byte in head + body:
            raw.send(bytes([byte]))
        assert raw.recv(13) == b"HTTP/1.1 201 "


def test_a_large_body_that_is_allowed(client: httpx.Client, server: RunningServer) -> None:
    messages = [{"role": "user", "content": "x" * 999_000} for _ in range(3)]
    assert client.post("/tasks", json=submission(parameters={"messages": messages})).status_code == 201


def test_too_large_bodies(start_server: Any) -> None:
    server = start_server(body_bytes_max=10_000)
    headers = {"Authorization": f"Bearer {token('admin')}", "Content-Type": "application/json"}
    check_error(httpx.post(server.url + "/tasks", content=b"x" * 10_001, headers=headers), 413)
    check_error(httpx.post(server.url + "/tasks", content=b"x" * 3_000_000, headers=headers), 413)
    check_error(httpx.post(server.url + "/tasks", content=iter([b"x" * 999] * 3_000), headers=headers), 413)
    declared = HEAD + b"Content-Type: application/json\r\nContent-Length: " + b"9" * 20 + b"\r\n\r\n"
    with socket.create_connection(server.address, timeout=10) as raw:
        raw.sendall(declared)
        raw.shutdown(socket.SHUT_WR)
        assert raw.recv(100).startswith(b"HTTP/1.1 4")


def test_endless_chunks_are_not_kept(server: RunningServer) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head = HEAD + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    with socket.create_connection(server.address, timeout=10) as raw:
        raw.sendall(head)
        try:
            for _ in range(4_000):  # 256 MiB
                raw.sendall(chunk)
        except OSError:
            pass
    eventually(lambda: httpx.get(server.url + "/livez").status_code == 200)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_body_where_none_belongs(client: httpx.Client, server: RunningServer) -> None:
    assert client.request("GET", "/workers", content=b"x" * 2_000_000).status_code == 200
    check_error(client.request("DELETE", "/tasks/task-1", content=b"{}"), 400)
    headers = {"Content-Type": "application/json"}
    check_error(client.post("/workers/worker-001/restart", content=b"{}", headers=headers), 400)
    assert client.post("/workers/worker-001/restart", headers={"Content-Length": "0"}).status_code == 200
    check_error(httpx.post(server.url + "/tasks", content=b"x" * 2_000_000), 401)


def test_a_body_that_ends_early(server: RunningServer) -> None:
    head = HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    with socket.create_connection(server.address, timeout=10) as raw:
        raw.sendall(head)
        raw.shutdown(socket.SHUT_WR)
        raw.recv(1_000)
    assert not server.cluster.requests
    assert httpx.get(server.url + "/livez").status_code == 200


def test_slow_heads(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEAD_S_MAX", 0.3)
    with socket.create_connection(server.address, timeout=10) as raw:
        raw.sendall(b"GET /livez HTTP/1.1\r\n")

        def cut_off() -> bool:
            try:
                raw.send(b"X: y\r\n")
            except OSError:
                return True
            raw.settimeout(0.05)
            try:
                return raw.recv(1_000) == b""
            except TimeoutError:
                return False

        eventually(cut_off)


def test_slow_bodies(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_S_MAX", 0.3)
    monkeypatch.setattr(http, "DRAIN_S_MAX", 0.1)
    head = HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    answer = exchange(server, head + b"{")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"body_timeout" in answer


def test_idle_connections_are_closed(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "KEEP_ALIVE_S", 0.2)
    assert exchange(server, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").endswith(b'{"status":"ok"}')


def test_pipelined_requests(server: RunningServer) -> None:
    one = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert exchange(server, one * 20 + last).count(b"HTTP/1.1 200 ") == 21


def test_connections_are_bounded(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "CONNECTIONS_MAX", 2)
    with socket.create_connection(server.address), socket.create_connection(server.address):

        def refused() -> bool:
            return exchange(server, b"").startswith(b"HTTP/1.1 503 ")

        assert refused()
    eventually(lambda: httpx.get(server.url + "/livez").status_code == 200)


def test_a_client_that_goes_ends_its_long_poll(
    server: RunningServer, client: httpx.Client, task_id: str
) -> None:
    request = (
        f"GET /tasks/{task_id}?wait=300 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('read')}\r\n\r\n"
    )
    with socket.create_connection(server.address) as raw:
        raw.sendall(request.encode())
        eventually(lambda: isinstance(server.cluster.requests[-1], command.GetTask))
        assert server.cluster.cancelled == 0
    eventually(lambda: server.cluster.cancelled == 1)


def test_stopping_ends_a_long_poll(server: RunningServer, client: httpx.Client, task_id: str) -> None:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(client.get(f"/tasks/{task_id}?wait=300")))
    thread.start()
    eventually(lambda: isinstance(server.cluster.requests[-1], command.GetTask))
    server.stop(5)
    thread.join(5)
    check_error(answers[0], 503)


def test_stopping_answers_a_long_poll_whose_task_has_ended(
    server: RunningServer, client: httpx.Client, task_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last run ends, and so does the peer, before those who waited for this end have heard of it."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(client.get(f"/tasks/{task_id}?wait=300")))
    thread.start()
    eventually(lambda: isinstance(server.cluster.requests[-1], command.GetTask))
    monkeypatch.setattr(server.cluster, "notify", lambda: None)
    server.cluster.finish(task_id)
    server.stop(5)
    thread.join(5)
    assert (answers[0].status_code, answers[0].json()["status"]) == (200, "completed")


def test_stopping_answers_what_was_accepted(server: RunningServer, client: httpx.Client) -> None:
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(client.post("/tasks?wait=300", json=submission()))
    )
    thread.start()
    eventually(lambda: server.cluster.requests and isinstance(server.cluster.requests[-1], command.GetTask))
    server.stop(5)
    thread.join(5)
    assert (answers[0].status_code, answers[0].json()["status"]) == (201, "queued")


def test_stopping_with_idle_connections_is_quick(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        client.get("/livez")
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 1.0


def test_stopping_with_stuck_clients_is_bounded(
    server: RunningServer, task_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One never reads its stream, one sends half a head, one half a body, one half a WebSocket handshake."""
    monkeypatch.setattr(serve, "GRACE_S", 0.5)
    stream = (
        f"GET /tasks/{task_id}/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('read')}\r\n\r\n"
    )
    stuck = [
        stream.encode(),
        b"GET /livez HTT",
        HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
        b"GET /ws HTTP/1.1\r\nUpgrade: web",
    ]
    sockets = []
    for data in stuck:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        raw.connect(server.address)
        raw.sendall(data)
        sockets.append(raw)
    eventually(lambda: server.app.api.streams)
    piece = command.StreamToken(attempt=1, index=0, text="x" * 1_000_000, count=1)
    for _ in range(20):
        server.do(server.cluster.push, task_id, piece)
    server.stop(8)
    for raw in sockets:
        raw.close()
