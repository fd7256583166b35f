"""Every endpoint of the API reference: its fields, formats and codes, over real HTTP."""

from __future__ import annotations

import re
import threading
from typing import Any

import httpx
import pytest

from peer.state import command
from tests.api.conftest import RunningServer, eventually, submission
from tests.api.fake_parts import token

ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def subset(want: Any, have: Any) -> None:
    """Every field of `want` is in `have`, with the same value."""
    if isinstance(want, dict):
        assert isinstance(have, dict)
        assert list(want) == [name for name in have if name in want], "documented fields, in their order"
        for name, value in want.items():
            subset(value, have[name])
    elif isinstance(want, list):
        assert len(want) == len(have)
        for left, right in zip(want, have, strict=True):
            subset(left, right)
    else:
        assert have == want


def test_health(client: httpx.Client, server: RunningServer) -> None:
    body = client.get("/health").json()
    assert list(body) == ["status", "timestamp", "version"]
    assert body["status"] == "healthy"
    assert body["timestamp"] == "2025-05-30T10:00:00Z"
    server.cluster.not_ready = "the disk is full"
    answer = client.get("/health")
    assert answer.status_code == 503
    assert "the disk is full" in answer.json()["detail"]
    assert int(answer.headers["retry-after"]) >= 1


def test_probes_say_nothing_else(server: RunningServer) -> None:
    assert httpx.get(server.url + "/livez").json() == {"status": "ok"}
    assert httpx.get(server.url + "/readyz").json() == {"status": "ready"}
    server.cluster.not_ready = "secret reason"
    answer = httpx.get(server.url + "/readyz")
    assert answer.status_code == 503
    assert "secret" not in answer.text
    assert httpx.get(server.url + "/livez").status_code == 200


def test_cluster_status(client: httpx.Client) -> None:
    assert client.get("/cluster/status").json() == {
        "cluster_id": "biting-lip-cluster",
        "status": "operational",
        "total_workers": 5,
        "active_workers": 4,
        "queued_tasks": 12,
        "running_tasks": 8,
        "gpu_utilization": 65.5,
        "total_memory": "40GB",
        "available_memory": "14GB",
        "uptime": "7d 4h 23m",
        "total_memory_bytes": 40 * 2**30,
        "available_memory_bytes": 14 * 2**30,
        "uptime_seconds": 620_639,
        "leader": "peer-1",
        "epoch": 3,
        "reasons": [],
        "voters": [{"peer_id": "peer-1", "learner": False, "linked": True}],
        "outlook": "1 voter",
        "store": None,
    }


def test_workers(client: httpx.Client) -> None:
    body = client.get("/workers").json()
    subset(
        {
            "worker_id": "worker-001",
            "status": "online",
            "gpu_info": {
                "model": "AMD Radeon RX 7900 XTX",
                "memory_total": "24GB",
                "memory_used": "8GB",
                "temperature": 65,
                "utilization": 75.5,
            },
            "loaded_models": ["llama-2-7b"],
            "current_tasks": 2,
            "last_heartbeat": "2025-05-30T10:00:00Z",
            "performance_score": 8.5,
        },
        body["workers"][0],
    )
    assert body["workers"][1]["gpu_info"]["temperature"] is None
    assert body["workers"][2]["gpu_info"]["memory_total"] is None
    assert (body["total"], body["online"], body["offline"]) == (3, 2, 1)


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("status=online", ["worker-001"]),
        ("status=busy", ["worker-002"]),
        ("status=offline", ["worker-003"]),
        ("status=error", []),
        ("gpu_type=7900+xtx", ["worker-001", "worker-002", "worker-003"]),
        ("gpu_type=gfx1100&status=busy", ["worker-002"]),
        ("gpu_type=nvidia", []),
    ],
)
def test_workers_are_filtered(client: httpx.Client, query: str, ids: list[str]) -> None:
    body = client.get(f"/workers?{query}").json()
    assert [worker["worker_id"] for worker in body["workers"]] == ids
    assert body["total"] == len(ids)


def test_worker(client: httpx.Client) -> None:
    body = client.get("/workers/worker-001").json()
    subset(
        {
            "worker_id": "worker-001",
            "status": "online",
            "gpu_info": {
                "model": "AMD Radeon RX 7900 XTX",
                "memory_total": "24GB",
                "memory_used": "8GB",
                "temperature": 65,
                "utilization": 75.5,
                "driver_version": "ROCm 5.7.0",
            },
            "system_info": {
                "cpu": "AMD Ryzen 9 7950X",
                "ram_total": "64GB",
                "ram_used": "12GB",
                "os": "Ubuntu 22.04",
            },
            "loaded_models": [
                {
                    "name": "llama-2-7b",
                    "memory_usage": "6.5GB",
                    "load_time": "45s",
                    "last_used": "2025-05-30T09:55:00Z",
                }
            ],
            "task_history": {"completed_today": 45, "average_duration": "2.3s", "success_rate": 98.5},
            "metrics": {"tasks_per_hour": 120, "average_response_time": "1.8s", "error_rate": 0.02},
        },
        body,
    )
    assert client.get("/workers/worker-003").json()["system_info"]["cpu"] is None
    assert client.get("/workers/nobody").status_code == 404


def test_restart(client: httpx.Client) -> None:
    answer = client.post("/workers/worker-001/restart")
    assert answer.status_code == 200
    subset(
        {"message": "Worker restart initiated", "worker_id": "worker-001", "estimated_downtime": "30s"},
        answer.json(),
    )
    assert client.post("/workers/nobody/restart").status_code == 404


def test_submit(client: httpx.Client, server: RunningServer) -> None:
    answer = client.post("/tasks", json=submission(), headers={"X-Request-ID": "mine-1"})
    assert answer.status_code == 201
    assert answer.headers["location"] == "/tasks/task-1"
    assert answer.headers["x-request-id"] == "mine-1"
    body = answer.json()
    for name, value in {
        "task_id": "task-1",
        "status": "queued",
        "estimated_wait_time": "15s",
        "assigned_worker": None,
        "created_at": "2025-05-30T10:00:00Z",
    }.items():
        assert body[name] == value
    assert body["pending_reasons"] == [{"worker_id": "worker-001", "reason": "all 8 slots are taken"}]
    sent = server.cluster.requests[-1]
    assert isinstance(sent, command.SubmitTask)
    assert sent.parameters == {"prompt": "Explain quantum computing", "max_tokens": 512, "temperature": 0.7}
    assert (sent.priority, sent.timeout_s, sent.request_id) == (5, 300.0, "mine-1")
    assert (sent.owner, sent.key_id) == ("admin-owner", "admin")


@pytest.mark.parametrize(
    ("priority", "number"), [("low", 8), ("normal", 5), ("high", 3), ("critical", 1), (1, 1), (10, 10)]
)
def test_priorities(client: httpx.Client, priority: str | int, number: int) -> None:
    assert client.post("/tasks", json=submission(priority=priority)).json()["priority"] == number


def test_defaults(client: httpx.Client, server: RunningServer) -> None:
    body = submission()
    del body["priority"], body["timeout"]
    client.post("/tasks", json=body)
    sent = server.cluster.requests[-1]
    assert isinstance(sent, command.SubmitTask)
    assert (sent.priority, sent.timeout_s) == (5, 300.0)


def test_idempotency(client: httpx.Client) -> None:
    key = {"Idempotency-Key": "order 7"}
    first = client.post("/tasks", json=submission(), headers=key)
    again = client.post(
        "/tasks", content=first.request.content, headers=key | {"Content-Type": "application/json"}
    )
    assert again.status_code == 201
    assert again.json()["task_id"] == first.json()["task_id"]
    assert again.headers["idempotency-replayed"] == "true"
    reordered = dict(reversed(submission().items()))
    assert client.post("/tasks", json=reordered, headers=key).json()["task_id"] == first.json()["task_id"]
    other = client.post("/tasks", json=submission(timeout=299), headers=key)
    assert other.status_code == 409
    assert client.post("/tasks", json=submission(), headers={"Idempotency-Key": "x" * 257}).status_code == 400


def test_completed_task(client: httpx.Client, server: RunningServer, task_id: str) -> None:
    server.do(server.cluster.finish, task_id)
    subset(
        {
            "task_id": task_id,
            "status": "completed",
            "assigned_worker": "worker-001",
            "created_at": "2025-05-30T10:00:00Z",
            "started_at": "2025-05-30T10:00:15Z",
            "completed_at": "2025-05-30T10:00:18Z",
            "duration": "3.2s",
            "result": {
                "generated_text": "Quantum computing is",
                "tokens_generated": 324,
                "processing_time": "2.8s",
            },
        },
        client.get(f"/tasks/{task_id}").json(),
    )


def test_failed_task(client: httpx.Client, server: RunningServer, task_id: str) -> None:
    server.do(server.cluster.fail, task_id)
    body = client.get(f"/tasks/{task_id}").json()
    assert body["status"] == "failed"
    assert body["error"] == {"code": "timeout", "message": "It took longer than 300 s"}
    assert body["result"] is None
    assert body["duration"] is None


def test_long_poll(client: httpx.Client, server: RunningServer, task_id: str) -> None:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(client.get(f"/tasks/{task_id}?wait=60")))
    thread.start()
    eventually(lambda: isinstance(server.cluster.requests[-1], command.GetTask))
    server.do(server.cluster.finish, task_id)
    thread.join(10)
    assert answers[0].json()["status"] == "completed"
    assert client.get(f"/tasks/{task_id}?wait=300").json()["status"] == "completed"


def test_submit_and_wait(client: httpx.Client, server: RunningServer) -> None:
    short = client.post("/tasks?wait=0.01", json=submission())
    assert (short.status_code, short.json()["status"]) == (201, "queued")
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/tasks?wait=60", json=submission())))
    thread.start()
    eventually(lambda: len(server.cluster.views) == 2)
    server.do(server.cluster.finish, "task-2")
    thread.join(10)
    assert answers[0].status_code == 201
    assert answers[0].json()["result"]["generated_text"] == "Quantum computing is"


def test_task_list(client: httpx.Client, server: RunningServer) -> None:
    for _ in range(5):
        client.post("/tasks", json=submission())
    server.do(server.cluster.finish, "task-2")
    body = client.get("/tasks?limit=2&offset=3").json()
    assert [task["task_id"] for task in body["tasks"]] == ["task-2", "task-1"]
    assert (body["total"], body["limit"], body["offset"]) == (5, 2, 3)
    subset(
        {
            "task_id": "task-2",
            "status": "completed",
            "task_type": "text_generation",
            "assigned_worker": "worker-001",
            "duration": "3.2s",
            "created_at": "2025-05-30T10:00:00Z",
        },
        body["tasks"][0],
    )
    assert client.get("/tasks").json()["limit"] == 50
    done = client.get("/tasks?status=completed&worker_id=worker-001").json()
    assert [task["task_id"] for task in done["tasks"]] == ["task-2"]


def test_cancel(client: httpx.Client, task_id: str) -> None:
    answer = client.delete(f"/tasks/{task_id}")
    assert answer.status_code == 200
    assert answer.json() == {"message": "Task cancelled", "task_id": task_id, "status": "cancelled"}
    assert client.delete(f"/tasks/{task_id}").status_code == 409
    assert client.delete("/tasks/task-99").status_code == 404


def test_assign(client: httpx.Client) -> None:
    body = {
        "model_name": "llama-2-7b",
        "worker_ids": ["worker-001", "worker-002"],
        "preload": True,
        "priority": "high",
    }
    subset(
        {
            "assignment_id": "assign-789",
            "model_name": "llama-2-7b",
            "assignments": [
                {"worker_id": "worker-001", "status": "loading", "estimated_time": "45s"},
                {"worker_id": "worker-002", "status": "queued", "estimated_time": "90s"},
            ],
        },
        client.post("/models/assign", json=body).json(),
    )
    assert client.post("/models/assign", json=body | {"worker_ids": ["nobody"]}).status_code == 404
    assert client.post("/models/assign", json=body | {"model_name": "nothing"}).status_code == 404
    refused = client.post("/models/assign", json={"model_name": "llama-2-7b"})
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "does_not_fit"


def test_unload(client: httpx.Client) -> None:
    body = {"model_name": "llama-2-7b", "worker_ids": ["worker-001"], "force": False}
    subset(
        {
            "message": "Model unload initiated",
            "model_name": "llama-2-7b",
            "affected_workers": ["worker-001"],
        },
        client.post("/models/unload", json=body).json(),
    )


def test_assignments(client: httpx.Client) -> None:
    body = client.get("/models/assignments").json()
    models = body["assignments"][0]["models"]
    subset({"name": "llama-2-7b", "status": "loaded", "memory_usage": "6.5GB", "load_time": "45s"}, models[0])
    assert [(model["name"], model["status"]) for model in models[1:]] == [
        ("smollm2-135m", "loading"),
        ("later", "assigned"),
    ]
    progress = {"progress": 25.0, "stage": "upload", "stage_done": 1, "stage_total": 4}
    subset(progress, models[1])
    subset(dict.fromkeys(progress), models[2])


def test_rebalance(client: httpx.Client) -> None:
    body = {"strategy": "memory_optimized", "force": False, "dry_run": False}
    subset(
        {
            "rebalance_id": "rebal-456",
            "status": "initiated",
            "estimated_duration": "2m",
            "affected_workers": ["worker-001", "worker-003"],
            "operations": [
                {
                    "type": "model_migration",
                    "from_worker": "worker-001",
                    "to_worker": "worker-003",
                    "model": "stable-diffusion-xl",
                }
            ],
        },
        client.post("/cluster/rebalance", json=body).json(),
    )
    assert client.post("/cluster/rebalance").json()["strategy"] == "memory_optimized"
    assert client.get("/cluster/rebalance/rebal-456").json()["status"] == "initiated"
    assert client.get("/cluster/rebalance/rebal-1").status_code == 404


@pytest.mark.parametrize("timeframe", ["1h", "24h", "7d", "30d"])
def test_metrics(client: httpx.Client, timeframe: str) -> None:
    subset(
        {
            "timeframe": timeframe,
            "metrics": {
                "total_tasks": 2450,
                "successful_tasks": 2398,
                "failed_tasks": 52,
                "success_rate": 97.9,
                "average_response_time": "2.1s",
                "peak_throughput": "150 tasks/min",
                "gpu_utilization": {"average": 68.5, "peak": 95.2, "minimum": 12.1},
                "memory_usage": {"average": "75%", "peak": "92%", "efficiency": 85.3},
            },
        },
        client.get(f"/cluster/metrics?timeframe={timeframe}").json(),
    )


def test_models(client: httpx.Client) -> None:
    body = client.get("/models").json()
    assert [model["name"] for model in body["models"]] == ["llama-2-7b", "smollm2-135m"]
    assert body["models"][0]["replicas"] == [{"worker_id": "worker-001", "status": "loaded", "slots": 3}]


def test_keys(client: httpx.Client, server: RunningServer) -> None:
    made = client.post(
        "/keys", json={"owner": "Ada", "scopes": ["submit"], "expires_at": "2025-05-31T12:00:00+02:00"}
    )
    assert made.status_code == 201
    body = made.json()
    assert body["expires_at"] == "2025-05-31T10:00:00Z"
    assert (body["requests_per_hour"], body["requests_per_minute"]) == (1_000, 100)
    mine = {"Authorization": f"Bearer {body['key']}"}
    assert httpx.get(server.url + "/tasks", headers=mine).status_code == 200
    listed = client.get("/keys")
    assert body["key"] not in listed.text
    assert "sha256" not in listed.text
    assert client.delete(f"/keys/{body['key_id']}").json()["revoked_at"] == "2025-05-30T10:00:00Z"
    assert httpx.get(server.url + "/tasks", headers=mine).status_code == 401
    free = client.post(
        "/keys",
        json={"owner": "Ada", "scopes": ["read"], "requests_per_hour": None, "requests_per_minute": 7},
    ).json()
    assert (free["requests_per_hour"], free["requests_per_minute"]) == (None, 7)
    past = {"owner": "Ada", "scopes": ["read"], "expires_at": "2025-05-30T09:59:59Z"}
    assert client.post("/keys", json=past).status_code == 409
    server.clock.offset += 86_400
    late = httpx.get(server.url + "/tasks", headers={"Authorization": f"Bearer {free['key']}"})
    assert late.status_code == 200
    assert token("admin") not in listed.text
