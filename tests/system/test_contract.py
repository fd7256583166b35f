"""Every endpoint and event of the API reference, on the full product: its fields, their formats, its statuses."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from tests.process.peers import Peer, Peers, poll, submission
from tests.process.traffic import socket_url

pytestmark = pytest.mark.process

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
SIZE = r"\d+(\.\d{1,3})?GB"
MEASURED = r"\d+\.\ds"  # "3.2s"
ESTIMATED = r"\d+(\.\d)?s"  # "45s", "2.5s"
SPAN = r"(\d+h )?\d+m|\d+s"  # "2m"
UPTIME = r"\d+d \d+h \d+m"
PERCENT = r"\d{1,3}%"
THROUGHPUT = r"\d+ tasks/min"
WORKER = r"[a-z0-9-]+"
TASK = r"task-[0-9a-z]+"
STATUS = r"queued|running|completed|failed|cancelled"
TEXT = r"(?s).+"
OR_NONE = object()  # in a list [format, OR_NONE]: null says "nothing measured yet"


def check(shape: Any, value: Any, where: str = "answer") -> None:
    """`value` has every field of `shape`, each in its format; more fields are welcome."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), f"{where}: {value!r}"
        missing = shape.keys() - value.keys()
        assert not missing, f"{where} lacks {sorted(missing)}: {value}"
        for name, inner in shape.items():
            check(inner, value[name], f"{where}.{name}")
    elif isinstance(shape, list):
        if shape[-1] is OR_NONE:
            if value is not None:
                check(shape[0], value, where)
            return
        assert isinstance(value, list), f"{where}: {value!r}"
        for number, each in enumerate(value):
            check(shape[0], each, f"{where}[{number}]")
    elif isinstance(shape, str):
        assert isinstance(value, str), f"{where}: {value!r}"
        assert re.fullmatch(shape, value), f"{where}: {value!r} is not of the form {shape}"
    elif shape is float:
        assert isinstance(value, int | float), f"{where}: {value!r}"
        assert not isinstance(value, bool), f"{where}: {value!r}"
    elif isinstance(shape, type):
        assert type(value) is shape, f"{where}: {value!r}"
    else:
        assert value == shape, f"{where}: {value!r}"


GPU = {"model": TEXT, "memory_total": SIZE, "memory_used": SIZE, "temperature": int, "utilization": float}
WORKER_STATUS = "online|offline|busy|error"
HEALTH = {"status": "healthy", "timestamp": TIME, "version": r"\d+\.\d+\.\d+.*"}
CLUSTER = {
    "cluster_id": "biting-lip-cluster",
    "status": "operational",
    "total_workers": 2,
    "active_workers": 2,
    "queued_tasks": int,
    "running_tasks": int,
    "gpu_utilization": float,
    "total_memory": SIZE,
    "available_memory": SIZE,
    "uptime": UPTIME,
}
WORKERS = {
    "workers": [
        {
            "worker_id": WORKER,
            "status": WORKER_STATUS,
            "gpu_info": GPU,
            "loaded_models": [TEXT],
            "current_tasks": int,
            "last_heartbeat": TIME,
            "performance_score": float,
        }
    ],
    "total": 2,
    "online": 2,
    "offline": 0,
}
ONE_WORKER = {
    "worker_id": WORKER,
    "status": WORKER_STATUS,
    "gpu_info": GPU | {"driver_version": [str, OR_NONE]},  # the stand-in has no driver
    "system_info": {"cpu": TEXT, "ram_total": SIZE, "ram_used": SIZE, "os": TEXT},
    "loaded_models": [{"name": TEXT, "memory_usage": SIZE, "load_time": ESTIMATED, "last_used": TIME}],
    "task_history": {
        "completed_today": int,
        "average_duration": [MEASURED, OR_NONE],
        "success_rate": [float, OR_NONE],
    },
    "metrics": {
        "tasks_per_hour": int,
        "average_response_time": [MEASURED, OR_NONE],
        "error_rate": [float, OR_NONE],
    },
}
RESTARTED = {"message": "Worker restart initiated", "worker_id": WORKER, "estimated_downtime": ESTIMATED}
SUBMITTED = {
    "task_id": TASK,
    "status": "queued",
    "estimated_wait_time": [ESTIMATED, OR_NONE],
    "assigned_worker": None,
    "created_at": TIME,
}
COMPLETED = {
    "task_id": TASK,
    "status": "completed",
    "assigned_worker": WORKER,
    "created_at": TIME,
    "started_at": TIME,
    "completed_at": TIME,
    "duration": MEASURED,
    "result": {"generated_text": TEXT, "tokens_generated": int, "processing_time": MEASURED},
}
TASKS = {
    "tasks": [
        {
            "task_id": TASK,
            "status": STATUS,
            "task_type": "text_generation",
            "assigned_worker": [WORKER, OR_NONE],
            "duration": [MEASURED, OR_NONE],
            "created_at": TIME,
        }
    ],
    "total": int,
    "limit": 50,
    "offset": 0,
}
CANCELLED = {"message": "Task cancelled", "task_id": TASK, "status": "cancelled"}
ASSIGNED = {
    "assignment_id": r"assign-[0-9a-z]+",
    "model_name": "echo",
    "assignments": [
        {"worker_id": WORKER, "status": "loading|queued|loaded", "estimated_time": ESTIMATED},
    ],
}
UNLOADED = {"message": "Model unload initiated", "model_name": "echo", "affected_workers": [WORKER]}
ASSIGNMENTS = {
    "assignments": [
        {
            "worker_id": WORKER,
            "models": [
                {
                    "name": TEXT,
                    "status": TEXT,
                    "memory_usage": [SIZE, OR_NONE],
                    "load_time": [ESTIMATED, OR_NONE],
                }
            ],
        }
    ]
}
REBALANCE = {
    "rebalance_id": r"rebal-[0-9a-z]+",
    "status": TEXT,
    "estimated_duration": SPAN,
    "affected_workers": [WORKER],
    "operations": [
        {"type": TEXT, "from_worker": [WORKER, OR_NONE], "to_worker": [WORKER, OR_NONE], "model": TEXT}
    ],
}
METRICS = {
    "timeframe": "1h|24h|7d|30d",
    "metrics": {
        "total_tasks": int,
        "successful_tasks": int,
        "failed_tasks": int,
        "success_rate": float,
        "average_response_time": MEASURED,
        "peak_throughput": THROUGHPUT,
        "gpu_utilization": {"average": float, "peak": float, "minimum": float},
        "memory_usage": {"average": PERCENT, "peak": PERCENT, "efficiency": float},
    },
}
ERROR = {
    "error": {
        "code": TEXT,
        "type": TEXT,
        "message": TEXT,
        "details": dict,
        "request_id": TEXT,
        "timestamp": TIME,
    },
    "detail": TEXT,
}
EVENTS: dict[str, Any] = {
    "worker_status_changed": {"worker_id": WORKER, "status": WORKER_STATUS},
    "task_completed": {"task_id": TASK, "worker_id": WORKER, "duration": MEASURED, "success": True},
    "task_failed": {"task_id": TASK, "duration": MEASURED, "success": False},
    "cluster_rebalance_started": {"rebalance_id": r"rebal-[0-9a-z]+"},
    "model_loaded": {"worker_id": WORKER, "model_name": TEXT},
    "gpu_alert": {"worker_id": WORKER, "kind": "temperature", "raised": True, "level": "warning|critical"},
}

CONFIG = {
    "engine": {
        "slots": 4,
        "fake": {
            "tokens_per_s": 40,
            "model_memory_bytes": 3_000_000_000,
            "memory_total_bytes": 16_000_000_000,
        },
    }
}


class Witness:
    """Everything that `/ws` has sent since the peer began."""

    def __init__(self, peer: Peer) -> None:
        self.events: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(socket_url(peer.url), peer.headers))
        self._thread.start()

    def _read(self, url: str, headers: dict[str, str]) -> None:
        with connect(f"{url}/ws?since=0", additional_headers=headers) as socket:
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    self.events.append(json.loads(socket.recv(0.1)))

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def after(self, event_id: int, name: str, **data: Any) -> dict[str, Any]:
        """The first event of that name after the id whose data has these values; waits for it."""

        def find() -> dict[str, Any] | None:
            for event in list(self.events):
                wanted = event["id"] > event_id and event["event"] == name
                if wanted and data.items() <= event["data"].items():
                    return event
            return None

        found = poll(f"event {name} {data}", find, 20.0)
        assert found is not None
        check({"id": int, "event": name, "timestamp": TIME, "data": EVENTS[name]}, found, name)
        return found

    @property
    def last(self) -> int:
        return int(self.events[-1]["id"]) if self.events else 0


@pytest.fixture(scope="module")
def peer(peers: Peers) -> Peer:
    """Two devices, the model on both, one task done on it."""
    made = peers.start(CONFIG, device="fake:2")
    workers = made.await_workers(count=2)
    check(ASSIGNED, made.post("/models/assign", assignment(workers)))
    await_loaded(made, *workers)
    assert made.submit("Explain quantum computing", wait_s=20)["status"] == "completed"
    return made


@pytest.fixture(scope="module")
def witness(peer: Peer) -> Iterator[Witness]:
    made = Witness(peer)
    yield made
    made.close()


def assignment(workers: list[str]) -> dict[str, Any]:
    return {"model_name": "echo", "worker_ids": workers, "preload": True, "priority": "high"}


def await_loaded(peer: Peer, *workers: str) -> None:
    def loaded() -> bool:
        shown = {worker["worker_id"]: worker["loaded_models"] for worker in peer.workers()}
        return all("echo" in shown[worker_id] for worker_id in workers)

    poll("echo is loaded", loaded, 20.0)


def worker_ids(peer: Peer) -> list[str]:
    return [worker["worker_id"] for worker in peer.workers()]


# ---------------------------------------------------------------- endpoints


def test_health_and_status(peer: Peer) -> None:
    check(HEALTH, peer.get("/health"))
    status = peer.get("/cluster/status")
    check(CLUSTER, status)
    assert status["total_memory_bytes"] == 32_000_000_000
    assert status["total_memory"] == "29.8GB"
    poll(
        "what is loaded is not available",
        lambda: peer.get("/cluster/status")["available_memory_bytes"] == 32_000_000_000 - 2 * 3_000_000_000,
    )


def test_workers(peer: Peer) -> None:
    check(WORKERS, peer.get("/workers"))
    used = peer.submit("use it", wait_s=10)["assigned_worker"]
    poll("its use is known", lambda: peer.get(f"/workers/{used}")["loaded_models"][0]["last_used"])
    found = peer.get(f"/workers/{used}")
    check(ONE_WORKER, found)
    assert found["worker_id"] == used
    assert found["task_history"]["completed_today"] >= 1
    assert found["loaded_models"][0]["memory_usage"] == "2.8GB"
    assert peer.get("/workers?status=online")["total"] == 2
    assert peer.get("/workers?status=error") | {"workers": []} == peer.get("/workers?gpu_type=no-such-gpu")
    assert peer.get("/workers?gpu_type=stand-in")["total"] == 2


def test_a_task_from_submission_to_result(peer: Peer) -> None:
    body = {
        "task_type": "text_generation",
        "model_name": "echo",
        "parameters": {"prompt": "Explain quantum computing", "max_tokens": 512, "temperature": 0.7},
        "priority": "normal",
        "timeout": 300,
    }
    answer = peer.client.post("/tasks", json=body)
    assert answer.status_code == 201
    check(SUBMITTED, answer.json())
    path = answer.headers["location"]
    assert path == f"/tasks/{answer.json()['task_id']}"
    ended = peer.get(f"{path}?wait=20")
    check(COMPLETED, ended)
    assert ended["result"]["generated_text"] == "Explain quantum computing"
    assert ended["result"]["tokens_generated"] == 3


def test_tasks_are_listed(peer: Peer) -> None:
    check(TASKS, peer.get("/tasks"))
    done = peer.submit("one more", wait_s=20)
    page = peer.get(f"/tasks?status=completed&worker_id={done['assigned_worker']}&limit=1&offset=0")
    assert [task["task_id"] for task in page["tasks"]] == [done["task_id"]]
    assert (page["limit"], page["offset"]) == (1, 0)
    assert peer.get("/tasks?status=failed&offset=1000")["tasks"] == []


def test_a_task_is_cancelled(peer: Peer) -> None:
    task_id = peer.submit("word " * 500)["task_id"]
    answer = peer.client.delete(f"/tasks/{task_id}")
    assert answer.status_code == 200
    check(CANCELLED, answer.json())
    check(ERROR, peer.client.delete(f"/tasks/{task_id}").json())
    assert peer.task(task_id)["status"] == "cancelled"


def test_metrics(peer: Peer) -> None:
    for timeframe in ("1h", "24h", "7d", "30d"):
        poll(
            "memory is measured",
            lambda t=timeframe: peer.get(f"/cluster/metrics?timeframe={t}")["metrics"]["memory_usage"][
                "efficiency"
            ],
        )
        found = peer.get(f"/cluster/metrics?timeframe={timeframe}")
        check(METRICS, found)
        assert found["timeframe"] == timeframe
    assert peer.get("/cluster/metrics")["timeframe"] == "24h"


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        (lambda c: c.post("/tasks", json=submission("x", priority="urgent")), 400),
        (lambda c: c.get("/cluster/metrics?timeframe=2h"), 400),
        (lambda c: c.get("/health", headers={"Authorization": "Bearer wrong"}), 401),
        (lambda c: c.get("/tasks/task-12345"), 404),
        (lambda c: c.get("/workers/worker-001"), 404),
        (lambda c: c.post("/workers/worker-001/restart"), 404),
        (lambda c: c.post("/tasks", json=submission("x", model="llama-3-7b")), 404),
        (lambda c: c.get("/nothing"), 404),
        (lambda c: c.put("/tasks"), 405),
        (lambda c: c.post("/tasks", content=b"{}", headers={"Content-Type": "text/plain"}), 415),
    ],
)
def test_errors(peer: Peer, ask: Callable[[httpx.Client], httpx.Response], status: int) -> None:
    answer = ask(peer.client)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    check(ERROR, answer.json())


def test_rate_limits(peer: Peer) -> None:
    """100 a minute and 1000 an hour by default; the next one is told when to come back."""
    key = peer.post("/keys", {"owner": "busy", "scopes": ["read"]}, 201)["key"]
    with httpx.Client(base_url=peer.url, headers={"Authorization": f"Bearer {key}"}) as client:
        answers = [client.get("/health") for _ in range(101)]
    assert [answer.status_code for answer in answers] == [200] * 100 + [429]
    check(ERROR, answers[-1].json())
    assert 0 < int(answers[-1].headers["retry-after"]) <= 61
    assert answers[0].headers["x-ratelimit-remaining"] == "99"


# ---------------------------------------------------------------- models and events


def test_tasks_cause_events(peer: Peer, witness: Witness) -> None:
    last = witness.last
    done = peer.submit("a b c", wait_s=20)
    event = witness.after(last, "task_completed", task_id=done["task_id"])
    assert event["data"]["worker_id"] == done["assigned_worker"]
    late = peer.submit("word " * 500, timeout=1)["task_id"]
    event = witness.after(last, "task_failed", task_id=late)
    assert event["data"]["code"] == "timeout"


def test_a_restart_causes_events(peer: Peer, witness: Witness) -> None:
    worker_id = worker_ids(peer)[0]
    last = witness.last
    answer = peer.post(f"/workers/{worker_id}/restart")
    check(RESTARTED, answer)
    gone = witness.after(last, "worker_status_changed", worker_id=worker_id, status="offline")
    witness.after(gone["id"], "worker_status_changed", worker_id=worker_id, status="online")
    witness.after(gone["id"], "model_loaded", worker_id=worker_id, model_name="echo")
    await_loaded(peer, worker_id)


def test_unloading_loading_and_rebalancing(peer: Peer, witness: Witness) -> None:
    """Two models crowd one device while the other is empty; a rebalance moves one there."""
    first, second = worker_ids(peer)
    check(ASSIGNMENTS, peer.get("/models/assignments"))
    check(
        UNLOADED, peer.post("/models/unload", {"model_name": "echo", "worker_ids": [second], "force": False})
    )
    poll("it is unloaded", lambda: not peer.get(f"/workers/{second}")["loaded_models"])
    assert [each["worker_id"] for each in peer.get("/models/assignments")["assignments"]]

    last = witness.last
    body = {"model_name": "smollm2-135m", "worker_ids": [first], "preload": True}
    peer.post("/models/assign", body)
    witness.after(last, "model_loaded", worker_id=first, model_name="smollm2-135m")

    for strategy in ("memory_optimized", "load_balanced", "latency_optimized"):
        dry = peer.post("/cluster/rebalance", {"strategy": strategy, "force": False, "dry_run": True})
        check(REBALANCE, dry)
    last = witness.last
    plan = peer.post("/cluster/rebalance", {"strategy": "memory_optimized", "force": True, "dry_run": False})
    check(REBALANCE, plan)
    assert plan["operations"], plan
    event = witness.after(last, "cluster_rebalance_started", rebalance_id=plan["rebalance_id"])
    poll(
        "it ends",
        lambda: peer.get(f"/cluster/rebalance/{plan['rebalance_id']}")["status"] == "completed",
        20.0,
    )
    assert event["id"] > last
    moved = plan["operations"][0]
    poll(
        "the model has moved",
        lambda: moved["model"] in peer.get(f"/workers/{moved['to_worker']}")["loaded_models"][0]["name"],
    )


def test_heat_causes_an_alert(peer: Peer, witness: Witness) -> None:
    last = witness.last
    peer.submit("fault:hot", wait_s=20)
    event = witness.after(last, "gpu_alert", kind="temperature", raised=True)
    assert event["data"]["value"] == 110
    assert event["data"]["threshold"] == 95
    assert peer.get(f"/workers/{event['data']['worker_id']}")["gpu_info"]["temperature"] == 110


def test_every_documented_event_was_seen_in_order(witness: Witness) -> None:
    assert EVENTS.keys() <= {event["event"] for event in witness.events}
    assert [event["id"] for event in witness.events] == list(range(1, len(witness.events) + 1))
