"""The product under test: a peer started as its users start it, on loopback, with its own data folder."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.load import Spec, http_request
from tests.bench.processes import REPOSITORY, Missing, Server, free_port, started, temporary

BITINGLIP = REPOSITORY / ".venv" / "bin" / "bitinglip"
READY_S = 20.0
WORKER_S = 120.0
DRAIN_S = 20.0
CALL_S = 60.0
TASK = json.dumps(
    {"task_type": "text_generation", "model_name": "echo", "parameters": {"prompt": "hello", "max_tokens": 4}}
).encode()


def call(port: int, method: str, path: str, key: str = "", body: bytes = b"") -> tuple[int, Any]:
    """One request on its own connection: status and decoded JSON. Raises OSError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CALL_S)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if body:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


def wait_ready(server: Server, port: int, path: str = "/readyz", limit_s: float = READY_S) -> float:
    """Seconds from the process's start until `path` answered 200."""
    deadline = server.began_s + limit_s
    while (now := time.perf_counter()) < deadline:
        server.check()
        try:
            status, _ = call(port, "GET", path)
        except (OSError, ValueError, http.client.HTTPException):
            status = 0
        if status == 200:
            return time.perf_counter() - server.began_s
        time.sleep(0.005 if now - server.began_s < 5.0 else 0.1)
    raise Missing(f"{path} did not answer 200 within {limit_s:.0f} s: {server.log()}")


@dataclass
class Peer:
    """A serving peer with one worker. Times are seconds from its start."""

    server: Server
    port: int
    home: Path
    ready_s: float
    worker_s: float
    key: str

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        return call(self.port, method, path, self.key, body)

    def spec(self, path: str = "/tasks", body: bytes = TASK, **rest: Any) -> Spec:
        """A load of `POST path`; `then` and the like go through."""
        return Spec(port=self.port, request=http_request("POST", path, body, self.headers()), **rest)

    def drain(self, limit_s: float = DRAIN_S) -> bool:
        """Wait until nothing is queued or runs, so that the next round finds an idle peer."""
        deadline = time.perf_counter() + limit_s
        while time.perf_counter() < deadline:
            _, status = self.call("GET", "/cluster/status")
            if not status["queued_tasks"] and not status["running_tasks"]:
                return True
            time.sleep(0.1)
        return False

    def warm_up(self) -> None:
        """Have the model loaded: one task to its end."""
        status, answer = self.call("POST", "/tasks?wait=30", TASK)
        if status >= 300 or answer.get("status") != "completed":
            raise Missing(f"the first task did not complete: {status} {answer}")


@contextmanager
def peer(device: str = "fake", config: str = "", arguments: Sequence[str] = ()) -> Iterator[Peer]:
    """Start a peer in a temporary folder. `config` is YAML. Raises Missing when it does not come up."""
    if not BITINGLIP.exists():
        raise Missing(f"there is no {BITINGLIP}: pip install -e .")
    with temporary() as home:
        data, port = home / "data", free_port()
        command = [str(BITINGLIP), "up", "--data-dir", str(data), "--api", f"127.0.0.1:{port}"]
        command += ["--device", device, *arguments]
        if config:
            (home / "config.yaml").write_text(config)
            command += ["--config", str(home / "config.yaml")]
        with started(command, home / "log") as server:
            ready_s = wait_ready(server, port)
            admin = (data / "admin.key").read_text().strip()
            worker_s = _wait_worker(server, port, admin)
            yield Peer(server, port, home, ready_s, worker_s, _bench_key(data))


def _wait_worker(server: Server, port: int, admin: str) -> float:
    while time.perf_counter() < server.began_s + WORKER_S:
        server.check()
        _, answer = call(port, "GET", "/workers", admin)
        if any(worker["status"] == "online" for worker in answer["workers"]):
            return time.perf_counter() - server.began_s
        time.sleep(0.02)
    raise Missing(f"no worker came online within {WORKER_S:.0f} s: {answer} {server.log()}")


def _bench_key(data: Path) -> str:
    """A key without rate limits, made as an operator would."""
    command = [str(BITINGLIP), "key", "create", "--owner", "bench", "--scope", "submit", "--scope", "read"]
    command += ["--rate-limit", "none", "--json", "--data-dir", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_S, env=dict(os.environ))
    if done.returncode:
        raise Missing(f"bitinglip key create failed: {(done.stderr or done.stdout)[-500:]}")
    return str(json.loads(done.stdout)["key"])
