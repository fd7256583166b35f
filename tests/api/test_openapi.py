"""The description is complete, and true of what the server answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest

from api.app import ROUTES
from api.openapi import build, statuses_of
from tests.api.conftest import RunningServer, submission
from tests.api.fake_parts import token

REFERENCE = (
    "GET /health",
    "GET /cluster/status",
    "GET /workers",
    "GET /workers/{worker_id}",
    "POST /workers/{worker_id}/restart",
    "POST /tasks",
    "GET /tasks/{task_id}",
    "GET /tasks",
    "DELETE /tasks/{task_id}",
    "POST /models/assign",
    "POST /models/unload",
    "GET /models/assignments",
    "POST /cluster/rebalance",
    "GET /cluster/metrics",
    "GET /ws",
)
DOCUMENT = build(ROUTES)


def described() -> set[str]:
    return {
        f"{method.upper()} {path}" for path, operations in DOCUMENT["paths"].items() for method in operations
    }


def test_no_route_is_missing(server: RunningServer) -> None:
    served = {f"{route.method} {route.path}" for route in server.app.api.router.routes}
    assert described() == served
    assert set(REFERENCE) <= described()


def test_websockets_are_described(server: RunningServer) -> None:
    for rule in server.app.url_map.iter_rules():
        assert rule.websocket
        assert f"GET {rule.rule}" in described()


def test_every_operation_says_all() -> None:
    for route in ROUTES:
        operation = DOCUMENT["paths"][route.path][route.method.lower()]
        assert operation["summary"]
        assert operation["security"] == ([{"bearer": []}] if route.scope else [])
        assert str(route.status) in operation["responses"]
        for status in statuses_of(route):
            assert str(status) in operation["responses"]
        names = {parameter["name"] for parameter in operation["parameters"] if "name" in parameter}
        assert set(re.findall(r"{(\w+)}", route.path)) <= names
        assert route.query_names <= names


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))


def test_every_reference_leads_somewhere() -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                target: Any = DOCUMENT
                for part in node["$ref"][2:].split("/"):
                    target = target[part]
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(DOCUMENT)


def validate(answer: httpx.Response, path: str, method: str) -> None:
    response = DOCUMENT["paths"][path][method]["responses"][str(answer.status_code)]
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    schema = response["content"]["application/json"]["schema"]
    document = {**schema, "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(document).validate(answer.json())


@pytest.mark.parametrize(
    ("method", "path", "real", "body"),
    [
        ("get", "/health", "", None),
        ("get", "/livez", "", None),
        ("get", "/cluster/status", "", None),
        ("get", "/cluster/metrics", "", None),
        ("get", "/workers", "", None),
        ("get", "/workers/{worker_id}", "/workers/worker-001", None),
        ("get", "/workers/{worker_id}", "/workers/worker-003", None),
        ("get", "/workers/{worker_id}", "/workers/nobody", None),
        ("post", "/workers/{worker_id}/restart", "/workers/worker-001/restart", None),
        ("post", "/tasks", "", submission()),
        ("post", "/tasks", "", {}),
        ("get", "/tasks", "", None),
        ("get", "/tasks/{task_id}", "/tasks/task-1", None),
        ("delete", "/tasks/{task_id}", "/tasks/task-1", None),
        ("get", "/models", "", None),
        ("get", "/models/assignments", "", None),
        ("post", "/models/assign", "", {"model_name": "llama-2-7b", "worker_ids": ["worker-001"]}),
        ("post", "/models/unload", "", {"model_name": "llama-2-7b"}),
        ("post", "/cluster/rebalance", "", {}),
        ("get", "/cluster/rebalance/{rebalance_id}", "/cluster/rebalance/rebal-456", None),
        ("post", "/keys", "", {"owner": "Ada", "scopes": ["read"]}),
        ("get", "/keys", "", None),
        ("delete", "/keys/{key_id}", "/keys/read", None),
        ("post", "/cluster/tokens", "", None),
        ("get", "/cluster/hosts", "", None),
        ("delete", "/cluster/hosts/{name}", "/cluster/hosts/gpu-2-000002", None),
        ("delete", "/cluster/hosts/{name}", "/cluster/hosts/nobody", None),
        ("post", "/ws/ticket", "", None),
        ("get", "/ws", "", None),
    ],
)
def test_answers_are_as_described(
    client: httpx.Client, method: str, path: str, real: str, body: dict[str, Any] | None
) -> None:
    client.post("/tasks", json=submission())
    client.post("/cluster/rebalance")
    validate(client.request(method, real or path, json=body), path, method)


def test_it_is_served_to_any_key(client: httpx.Client, server: RunningServer) -> None:
    assert client.get("/openapi.json").json() == DOCUMENT
    assert httpx.get(server.url + "/openapi.json").status_code == 401


def test_the_bounds_of_a_task_are_described() -> None:
    parameters = DOCUMENT["components"]["schemas"]["TextGeneration"]
    assert parameters["additionalProperties"] is False
    assert parameters["properties"]["temperature"]["maximum"] == 2.0
    validator = jsonschema.Draft202012Validator({**parameters, "components": DOCUMENT["components"]})
    validator.validate({"prompt": "a"})
    for wrong in (
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
        {"prompt": "a", "x": 1},
    ):
        assert not validator.is_valid(wrong)


def test_schemathesis_finds_nothing(server: RunningServer, tmp_path: Path) -> None:
    """Good, bad and odd requests of its making, to every route; `bitinglip` itself is tried for longer elsewhere."""
    server.cluster.instant = True
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(DOCUMENT))
    program = Path(sys.executable).parent / "schemathesis"
    ran = subprocess.run(
        [
            *(str(program), "run", str(document), "--url", server.url),
            *("-H", f"Authorization: Bearer {token('admin')}", "--no-color", "--request-timeout", "20"),
            *("--max-examples", "5", "--seed", "1", "--phases", "examples,coverage,fuzzing"),
            *("--generation-database", "none"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout[-4_000:] + ran.stderr[-1_000:]
