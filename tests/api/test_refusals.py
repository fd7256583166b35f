"""What is refused, with which code, and that it is always the same JSON."""

from __future__ import annotations

import re
import socket
from typing import Any

import httpx
import pytest

from peer.config import Api, Config, Limits
from peer.errors import BitinglipError, Conflict, Overloaded, Unavailable
from tests.api.conftest import RunningServer, submission
from tests.api.fake_parts import SECRETS, api_key, token


def check_error(answer: httpx.Response, status: int, code: str = "") -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    error = body["error"]
    assert list(error) == ["code", "type", "message", "details", "request_id", "timestamp"]
    assert body["detail"] == error["message"] != ""
    assert error["request_id"] == answer.headers["x-request-id"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", error["timestamp"])
    assert "Traceback" not in answer.text
    assert "server" not in answer.headers
    if code:
        assert error["code"] == code
    return dict(error)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Basic YWRtaW46eA==",
        "Bearer nonsense",
        "Bearer blk_admin_" + "0" * 64,
        "Bearer blk_nobody_" + SECRETS["admin"],
        "Bearer blk__",
        "Bearer " + "x" * 5_000,
        token("admin"),
        b"Bearer \xff\xfe",
    ],
)
def test_wrong_keys(server: RunningServer, header: str | bytes | None) -> None:
    headers: Any = {} if header is None else {"Authorization": header}
    answer = httpx.get(server.url + "/cluster/status", headers=headers)
    check_error(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_every_route_but_the_probes_needs_a_key(server: RunningServer) -> None:
    for route in server.app.api.router.routes:
        path = re.sub(r"{\w+}", "x", route.path)
        answer = httpx.request(route.method, server.url + path)
        if route.path in ("/livez", "/readyz"):
            assert answer.status_code == 200
        else:
            check_error(answer, 401)


@pytest.mark.parametrize(
    ("name", "method", "path", "status"),
    [
        ("read", "GET", "/tasks", 200),
        ("read", "POST", "/tasks", 401),
        ("read", "POST", "/cluster/rebalance", 401),
        ("submit", "GET", "/workers", 200),
        ("submit", "DELETE", "/tasks/x", 404),
        ("submit", "POST", "/workers/worker-001/restart", 401),
        ("operate", "POST", "/workers/worker-001/restart", 200),
        ("operate", "POST", "/tasks", 401),
        ("operate", "GET", "/keys", 401),
        ("operate", "POST", "/cluster/tokens", 401),
        ("operate", "DELETE", "/cluster/hosts/x", 401),
        ("read", "GET", "/cluster/hosts", 200),
        ("admin", "GET", "/keys", 200),
    ],
)
def test_scopes(server: RunningServer, name: str, method: str, path: str, status: int) -> None:
    headers = {"Authorization": f"Bearer {token(name)}"}
    answer = httpx.request(method, server.url + path, headers=headers)
    if status == 401:
        check_error(answer, 401, "insufficient_scope")
    else:
        assert answer.status_code == status


def test_a_key_ends_at_once(server: RunningServer, client: httpx.Client) -> None:
    mine = {"Authorization": f"Bearer {token('read')}"}
    assert httpx.get(server.url + "/tasks", headers=mine).status_code == 200
    server.cluster.keys["read"] = api_key("read", "read", expires_at=server.clock.wall() + 1)
    assert httpx.get(server.url + "/tasks", headers=mine).status_code == 200
    server.clock.offset += 1
    check_error(httpx.get(server.url + "/tasks", headers=mine), 401)
    server.cluster.keys["read"] = api_key("read", "read", secret_sha256="0" * 64)
    check_error(httpx.get(server.url + "/tasks", headers=mine), 401)
    del server.cluster.keys["read"]
    check_error(httpx.get(server.url + "/tasks", headers=mine), 401)


def test_rate_limits(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {token('limited')}"}) as client:
        for spent in range(100):
            answer = client.get("/tasks")
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit"] == "100"
            assert answer.headers["x-ratelimit-remaining"] == str(99 - spent)
        refused = client.get("/tasks")
        check_error(refused, 429, "rate_limit_exceeded")
        assert refused.headers["x-ratelimit-remaining"] == "0"
        wait_s = int(refused.headers["retry-after"])
        assert 60 <= wait_s <= 61
        server.clock.offset += wait_s
        assert client.get("/tasks").status_code == 200


def test_limits_are_swapped_on_reload(server: RunningServer) -> None:
    headers = {"Authorization": f"Bearer {token('limited')}"}
    assert httpx.get(server.url + "/tasks", headers=headers).headers["x-ratelimit-limit"] == "100"
    changed = Config(api=Api(bind="127.0.0.1:0"), limits=Limits(requests_per_minute=5))
    server.do(server.app.reload, changed)
    assert httpx.get(server.url + "/tasks", headers=headers).headers["x-ratelimit-limit"] == "5"


def test_a_key_without_limits_has_no_headers(client: httpx.Client) -> None:
    assert not [name for name in client.get("/tasks").headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"task_type": "image_generation"}, "task_type"),
        ({"task_type": None}, "task_type"),
        ({"priority": 0}, "priority"),
        ({"priority": 11}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 2.5}, "priority"),
        ({"timeout": 0.5}, "timeout"),
        ({"timeout": 86_401}, "timeout"),
        ({"timeout": "300"}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": 10**400}, "timeout"),
        ({"extra": 1}, "extra"),
        ({"model_name": ""}, "model_name"),
        ({"model_name": "x" * 129}, "model_name"),
        ({"parameters": []}, "parameters"),
        ({"parameters": {}}, "parameters.prompt"),
        (
            {"parameters": {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}},
            "parameters.prompt",
        ),
        ({"parameters": {"prompt": ""}}, "parameters.prompt"),
        ({"parameters": {"prompt": "a", "max_tokens": 0}}, "parameters.max_tokens"),
        ({"parameters": {"prompt": "a", "max_tokens": 10**9}}, "parameters.max_tokens"),
        ({"parameters": {"prompt": "a", "max_tokens": 10**400}}, "parameters.max_tokens"),
        ({"parameters": {"prompt": "a", "max_tokens": True}}, "parameters.max_tokens"),
        ({"parameters": {"prompt": "a", "temperature": 2.1}}, "parameters.temperature"),
        ({"parameters": {"prompt": "a", "top_p": 0}}, "parameters.top_p"),
        ({"parameters": {"prompt": "a", "seed": -1}}, "parameters.seed"),
        ({"parameters": {"prompt": "a", "seed": 2**64}}, "parameters.seed"),
        ({"parameters": {"prompt": "a", "seed": 10**400}}, "parameters.seed"),
        ({"parameters": {"prompt": "a", "stop": ["x"] * 17}}, "parameters.stop"),
        ({"parameters": {"prompt": "a", "beams": 3}}, "parameters.beams"),
        ({"parameters": {"messages": []}}, "parameters.messages"),
        (
            {"parameters": {"messages": [{"role": "robot", "content": "x"}]}},
            "parameters.messages[0].role",
        ),
    ],
)
def test_wrong_fields_are_named(client: httpx.Client, changes: dict[str, Any], field: str) -> None:
    answer = client.post("/tasks", json=submission(**changes))
    error = check_error(answer, 400)
    assert error["details"]["field"] == field


def test_missing_fields_are_named(client: httpx.Client) -> None:
    for name in ("task_type", "model_name", "parameters"):
        body = submission()
        del body[name]
        assert check_error(client.post("/tasks", json=body), 400)["details"]["field"] == name


def test_unknown_model(client: httpx.Client) -> None:
    error = check_error(client.post("/tasks", json=submission(model_name="lama-2-7b")), 404, "unknown_model")
    assert error["details"]["nearest"] == ["llama-2-7b"]
    assert "llama-2-7b" in error["message"]


def test_prompt_longer_than_the_context(client: httpx.Client, server: RunningServer) -> None:
    long = submission(parameters={"prompt": "word " * 1_000})
    assert client.post("/tasks", json=long).status_code == 201  # cannot be told here
    server.cluster.counted = (1_024, 2_048)
    assert client.post("/tasks", json=long).status_code == 201
    server.cluster.counted = (2_049, 2_048)
    error = check_error(client.post("/tasks", json=long), 400, "prompt_too_long")
    assert error["details"] == {"field": "parameters.prompt", "tokens": 2_049, "context": 2_048}
    assert client.post("/tasks", json=submission()).status_code == 201  # short enough whatever the tokenizer


HUGE = b'{"task_type":"text_generation","model_name":"llama-2-7b","parameters":{"prompt":"a","temperature":1e999}}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"task_type": NaN}',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"task_type":"text_generation\x00"}',
        b'{"task_type":"\xc3\x28"}',
        b'{"task_type":"\\ud800"}',
        b"[" * 200_000,
        b'{"parameters":' * 50_000,
        b'{"parameters":{"prompt":' + b"[" * 5_000 + b"]" * 5_000 + b"}}",
        HUGE,
        b'{"task_type":"text_generation","task_type":"text_generation","model_name":"llama-2-7b","parameters":{"prompt":"a"}}',
        b'{"task_type":"text_generation","model_name":"llama-2-7b","parameters":{"prompt":"a","prompt":"b"}}',
        b'{"task_type":"text_generation","model_name":"llama-2-7b","parameters":{"prompt":"a"}} trailing',
        b"1" * 10_000,
    ],
)
def test_bodies_that_are_no_task(client: httpx.Client, body: bytes) -> None:
    check_error(client.post("/tasks", content=body, headers={"Content-Type": "application/json"}), 400)


def test_escaped_nul_is_text(client: httpx.Client, server: RunningServer) -> None:
    assert client.post("/tasks", json=submission(parameters={"prompt": "a\0b"})).status_code == 201
    check_error(client.post("/tasks", json=submission(model_name="a\0b")), 404)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
def test_content_type(client: httpx.Client, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    check_error(client.post("/tasks", content=b"{}", headers=headers), 415)


def test_content_type_with_charset(client: httpx.Client) -> None:
    request = client.build_request("POST", "/tasks", json=submission())
    request.headers["Content-Type"] = "Application/JSON; charset=utf-8"
    assert client.send(request).status_code == 201


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/tasks?limit=0", "limit"),
        ("/tasks?limit=501", "limit"),
        ("/tasks?limit=ten", "limit"),
        ("/tasks?limit=", "limit"),
        ("/tasks?limit=1e2", "limit"),
        ("/tasks?limit=" + "9" * 100, "limit"),
        ("/tasks?offset=-1", "offset"),
        ("/tasks?offset=99999999", "offset"),
        ("/tasks?status=assigned", "status"),
        ("/tasks?status=COMPLETED", "status"),
        ("/tasks?worker_id=%00", "worker_id"),
        ("/tasks?page=2", "page"),
        ("/tasks?limit=1&limit=2", "limit"),
        ("/tasks/task-1?wait=-1", "wait"),
        ("/tasks/task-1?wait=301", "wait"),
        ("/tasks/task-1?wait=nan", "wait"),
        ("/tasks/task-1?wait=inf", "wait"),
        ("/tasks/task-1?wait=1_0", "wait"),
        ("/workers?status=asleep", "status"),
        ("/cluster/metrics?timeframe=2h", "timeframe"),
        ("/cluster/status?x=1", "x"),
    ],
)
def test_query_parameters_are_named(client: httpx.Client, path: str, field: str) -> None:
    assert check_error(client.get(path), 400)["details"]["field"] == field


def test_query_that_is_not_utf8(client: httpx.Client) -> None:
    check_error(client.get("/tasks?status=%ff"), 400)
    check_error(client.get("/tasks?status=" + "x" * 5_000), 400)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "//",
        "/nope",
        "/tasks/",
        "/tasks//",
        "/tasks/a/b",
        "/tasks/%2e%2e",
        "/tasks/..%2fkeys",
        "/tasks/a%2Fb",
        "/tasks/a%00b",
        "/tasks/%ff",
        "/tasks/-x",
        "/tasks/" + "x" * 129,
        "/workers/a b".replace(" ", "%20"),
        "/TASKS",
        "/workers/../keys%00",
        "/index.html",
        "/%2e%2e/%2e%2e/etc/passwd",
    ],
)
def test_paths_that_do_not_exist(server: RunningServer, path: str) -> None:
    raw = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('admin')}\r\nConnection: close\r\n\r\n"
    assert exchange(server, raw.encode()).startswith(b"HTTP/1.1 404 ")


def test_encoded_id_is_the_id(client: httpx.Client, server: RunningServer, task_id: str) -> None:
    assert client.get("/tasks/" + task_id.replace("-", "%2D")).json()["task_id"] == task_id


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/tasks", "GET, POST"),
        ("PATCH", "/tasks/x", "DELETE, GET"),
        ("POST", "/health", "GET"),
        ("GET", "/cluster/rebalance", "POST"),
        ("OPTIONS", "/livez", "GET"),
        ("TRACE", "/workers", "GET"),
        ("BREW", "/workers", "GET"),
    ],
)
def test_wrong_methods(client: httpx.Client, method: str, path: str, allow: str) -> None:
    answer = client.request(method, path)
    check_error(answer, 405)
    assert answer.headers["allow"] == allow


def test_head_is_get_without_its_body(client: httpx.Client) -> None:
    answer = client.head("/livez")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (Conflict("no"), 409, "conflict"),
        (Overloaded("full", retry_after_s=7.2), 503, "overloaded"),
        (Unavailable("no leader"), 503, "unavailable"),
        (BitinglipError("odd"), 500, "internal_error"),
        (ZeroDivisionError("secret 42"), 500, "internal_error"),
        (ExceptionGroup("x", [Conflict("no")]), 409, "conflict"),
        (ExceptionGroup("x", [KeyError("secret"), ValueError("secret")]), 500, "internal_error"),
    ],
)
def test_what_the_cluster_raises(
    client: httpx.Client, server: RunningServer, raised: BaseException, status: int, code: str
) -> None:
    server.cluster.failure = raised
    for answer in (
        client.get("/workers"),
        client.get("/tasks/x?wait=5"),
        client.post("/tasks", json=submission()),
    ):
        check_error(answer, status, code)
        assert "secret" not in answer.text
        if status == 503:
            assert answer.headers["retry-after"] == ("8" if code == "overloaded" else "1")
    server.cluster.failure = None
    assert client.get("/workers").status_code == 200


def test_request_ids(client: httpx.Client) -> None:
    for wanted, kept in [
        ("abc-1.2:3", True),
        ("a b", False),
        ("x" * 129, False),
        ("-x", False),
        ("a\tb", False),
    ]:
        got = client.get("/livez", headers={"X-Request-ID": wanted}).headers["x-request-id"]
        assert (got == wanted) is kept
    first, second = (client.get("/livez").headers["x-request-id"] for _ in range(2))
    assert first != second


def exchange(server: RunningServer, data: bytes, timeout_s: float = 10.0) -> bytes:
    """Send bytes; what comes back until the server closes."""
    with socket.create_connection(server.address, timeout=timeout_s) as raw:
        raw.sendall(data)
        received = b""
        while chunk := raw.recv(65_536):
            received += chunk
        return received


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\x00\x01\x02",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 400_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 400_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)
def test_what_is_not_http(server: RunningServer, data: bytes) -> None:
    answer = exchange(server, data)
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:100]
    assert b'{"error":{' in answer
    assert b"x-request-id: " in answer


def test_no_http2(server: RunningServer) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert exchange(server, preface).startswith(b"HTTP/1.1 4")
    upgrade = (
        b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    )
    assert exchange(server, upgrade).startswith(b"HTTP/1.1 200 ")


def test_absolute_form(server: RunningServer) -> None:
    data = b"GET http://x/livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert exchange(server, data).startswith(b"HTTP/1.1 200 ")


READS = (
    "/cluster/status",
    "/cluster/metrics",
    "/workers",
    "/workers/worker-001",
    "/models",
    "/models/assignments",
    "/tasks",
)


def test_old_answers_are_marked(server: RunningServer, client: httpx.Client, task_id: str) -> None:
    for path in (*READS, f"/tasks/{task_id}"):
        fresh = client.get(path, params={"stale": "ok"})
        assert fresh.status_code == 200
        assert "x-bitinglip-stale" not in fresh.headers
        assert "stale_seconds" not in fresh.json()
        server.cluster.stale_s = 41.2345
        old = client.get(path, params={"stale": "ok"})
        assert old.headers["x-bitinglip-stale"] == "42"
        assert old.json() == fresh.json() | {"stale_seconds": 41.234}
        not_taken = client.get(path)
        assert "x-bitinglip-stale" not in not_taken.headers
        assert not_taken.json() == fresh.json()
        server.cluster.stale_s = None


def test_old_answers_are_for_reads_that_say_so(client: httpx.Client) -> None:
    check_error(client.get("/workers", params={"stale": "yes"}), 400)
    check_error(client.get("/keys", params={"stale": "ok"}), 400)
    check_error(client.post("/tasks", params={"stale": "ok"}, json=submission()), 400)


def test_without_a_leader(server: RunningServer, client: httpx.Client) -> None:
    server.cluster.failure = Unavailable("no majority", code="no_leader", retry_after_s=5.0)
    for answer in (client.get("/workers"), client.post("/tasks", json=submission())):
        check_error(answer, 503, "no_leader")
        assert answer.headers["retry-after"] == "5"
