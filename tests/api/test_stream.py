"""A task's text as server-sent events."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api import wire
from peer import limits
from peer.errors import Unavailable
from peer.state.command import StreamEnd, StreamRestart, StreamToken
from tests.api.conftest import RunningServer, eventually
from tests.api.fake_parts import token


def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """(event, data) of each server-sent event; comments are ("", text)."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])
        elif line.startswith(":"):
            yield "", line[1:].strip()


def a_token(index: int, text: str, attempt: int = 1) -> StreamToken:
    return StreamToken(attempt=attempt, index=index, text=text, count=1)


def end(server: RunningServer, task_id: str) -> None:
    def finish() -> None:
        server.cluster.finish(task_id)
        server.cluster.push(task_id, StreamEnd(view=server.cluster.views[task_id]))

    server.do(finish)


def test_from_the_beginning_to_the_end(client: httpx.Client, server: RunningServer, task_id: str) -> None:
    push = server.cluster.push
    server.do(push, task_id, a_token(0, "Quantum"), a_token(1, " com\nputing"))
    with client.stream("GET", f"/tasks/{task_id}/stream") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"]
        coming = events(answer.iter_lines())
        assert next(coming)[0] == ""
        assert next(coming) == ("token", {"index": 0, "text": "Quantum", "count": 1, "attempt": 1})
        assert next(coming)[1]["text"] == " com\nputing"
        server.do(push, task_id, StreamRestart(attempt=2, reason="the engine died"))
        assert next(coming) == ("restart", {"attempt": 2, "reason": "the engine died"})
        server.do(push, task_id, a_token(0, "Anew", 2))
        assert next(coming)[1] == {"index": 0, "text": "Anew", "count": 1, "attempt": 2}
        end(server, task_id)
        name, view = next(coming)
        assert name == "done"
        assert view == client.get(f"/tasks/{task_id}").json()
        assert next(coming, None) is None
    assert server.app.api.streams == 0


def test_unknown_task(client: httpx.Client) -> None:
    assert client.get("/tasks/task-99/stream").status_code == 404


def test_keep_alive(
    client: httpx.Client, server: RunningServer, task_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STREAM_IDLE_S_MAX", 0.02)
    with client.stream("GET", f"/tasks/{task_id}/stream") as answer:
        coming = events(answer.iter_lines())
        next(coming)
        assert next(coming) == ("", "keep-alive")
        assert next(coming) == ("", "keep-alive")
        server.do(server.cluster.push, task_id, a_token(0, "late"))
        while (event := next(coming))[0] == "":
            pass
        assert event[1]["text"] == "late"
        del server.cluster.keys["admin"]
        while (event := next(coming))[0] == "":
            pass
        assert event[0] == "error"
        assert event[1]["error"]["code"] == "unauthorized"


def test_it_breaks_off(client: httpx.Client, server: RunningServer, task_id: str) -> None:
    with client.stream("GET", f"/tasks/{task_id}/stream") as answer:
        coming = events(answer.iter_lines())
        next(coming)
        server.cluster.failure = Unavailable("no leader")
        server.do(server.cluster.notify)
        name, body = next(coming)
        assert (name, body["error"]["code"]) == ("error", "unavailable")
        assert next(coming, None) is None


def test_the_peer_stops(client: httpx.Client, server: RunningServer, task_id: str) -> None:
    with client.stream("GET", f"/tasks/{task_id}/stream") as answer:
        coming = events(answer.iter_lines())
        next(coming)
        server.do(server.app.api.stop)
        assert next(coming)[0] == "error"


def test_the_peer_stops_when_the_task_has_ended(
    client: httpx.Client, server: RunningServer, task_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client.stream("GET", f"/tasks/{task_id}/stream") as answer:
        coming = events(answer.iter_lines())
        next(coming)
        monkeypatch.setattr(server.cluster, "notify", lambda: None)
        server.cluster.finish(task_id)
        server.do(server.app.api.stop)
        name, body = next(coming)
        assert (name, body["status"]) == ("done", "completed")


def test_the_peer_stops_and_its_cluster_does_not_answer(
    client: httpx.Client, server: RunningServer, task_id: str
) -> None:
    with client.stream("GET", f"/tasks/{task_id}/stream") as answer:
        coming = events(answer.iter_lines())
        next(coming)
        server.cluster.failure = Unavailable("no leader")
        server.do(server.app.api.stop)
        name, body = next(coming)
        assert (name, body["error"]["code"]) == ("error", "unavailable")


def test_the_client_goes(client: httpx.Client, server: RunningServer, task_id: str) -> None:
    with client.stream("GET", f"/tasks/{task_id}/stream") as answer:
        coming = events(answer.iter_lines())
        next(coming)
        assert server.app.api.streams == 1
    eventually(lambda: server.app.api.streams == 0)


def test_the_number_is_bounded(
    client: httpx.Client, server: RunningServer, task_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STREAMS_MAX", 0)
    assert client.get(f"/tasks/{task_id}/stream").status_code == 503


def test_a_client_that_never_reads(
    server: RunningServer, task_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "SEND_S_MAX", 0.3)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        raw.connect(server.address)
        head = f"GET /tasks/{task_id}/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('read')}\r\n\r\n"
        raw.sendall(head.encode())
        eventually(lambda: server.app.api.streams)

        def gone() -> bool:
            server.do(server.cluster.push, task_id, a_token(0, "x" * 100_000))
            return not server.app.api.streams

        eventually(gone)
