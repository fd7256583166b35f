"""What an owner does with a cluster that serves: drain a host, restart one after the other, add one and put it out."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.process.cluster.cluster import Cluster, cluster
from tests.process.cluster.hosts import unusable
from tests.process.cluster.member import Member
from tests.process.peers import poll, submission

pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(unusable()), reason=unusable())]

MODEL = "echo"
STOP_S_MAX = 60.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("operations"), 3) as made:
        made.begin_traffic(7)
        yield made


@pytest.fixture(autouse=True)
def _kept_promises(made: Cluster) -> Iterator[None]:
    yield
    made.settle()
    made.check()


def ask(cluster: Cluster, member: Member, method: str, path: str, body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {cluster.key}"}
    answer = httpx.request(
        method, member.url + path, json=body, headers=headers, timeout=30.0, trust_env=False
    )
    assert answer.status_code < 300, f"{method} {path}: {answer.status_code} {answer.text}"
    return answer.json()


def host_of(cluster: Cluster, member: Member, of: Member) -> dict[str, Any]:
    hosts: list[dict[str, Any]] = ask(cluster, member, "GET", "/cluster/hosts")["hosts"]
    return next(each for each in hosts if each["peer_id"] == of.peer_id)


def test_a_host_is_drained_while_clients_go_on(made: Cluster) -> None:
    leader, (target, other) = made.leader(), made.followers()
    workers = [f"{member.peer_id}-fake0" for member in (target, other)]
    ask(made, leader, "POST", "/models/assign", {"model_name": MODEL, "worker_ids": workers, "preload": True})
    poll("the model is there", lambda: host_of(made, other, target)["models"])
    assert ask(made, other, "POST", f"/cluster/hosts/{target.peer_id}/drain")["draining"]
    poll(
        "the host is empty",
        lambda: (found := host_of(made, other, target))["models"] == 0 and found["tasks"] == 0,
        STOP_S_MAX,
    )
    task = ask(made, target, "POST", "/tasks?wait=30", submission("after the drain"))
    assert task["status"] == "completed"
    assert task["assigned_worker"] != workers[0]
    assert not ask(made, other, "DELETE", f"/cluster/hosts/{target.peer_id}/drain")["draining"]
    ask(
        made,
        leader,
        "POST",
        "/models/assign",
        {"model_name": MODEL, "worker_ids": workers[:1], "preload": True},
    )
    poll("it is back in use", lambda: host_of(made, other, target)["models"])


def test_one_host_after_the_other_is_restarted(made: Cluster) -> None:
    """As for an upgrade: the leader last. No epoch has two leaders, and no peer ends badly."""
    for member in (*made.followers(), made.leader()):
        assert member.process is not None
        member.process.send_signal(signal.SIGTERM)
        assert member.process.wait(STOP_S_MAX) == 0, member.log_end(2_000)
        member.start()
        made.settle()


def _begun_beside(made: Cluster, asked: Member, leader: Member, body: dict[str, Any]) -> str:
    """A task that runs on another host than the leader's, where the clients' tasks may have brought the model too."""
    for _ in range(20):
        task_id: str = ask(made, asked, "POST", "/tasks", body)["task_id"]
        worker: str = poll(
            "the task runs",
            lambda: (
                (task := ask(made, asked, "GET", f"/tasks/{task_id}"))["status"] == "running"  # noqa: B023
                and task["assigned_worker"]
            ),
        )
        if not worker.startswith(f"{leader.peer_id}-"):
            return task_id
    raise AssertionError(f"20 tasks, and each runs on the leader's host {leader.peer_id}")


def test_a_stream_through_a_follower_outlives_the_leader(made: Cluster) -> None:
    leader, (serving, other) = made.leader(), made.followers()
    worker = f"{other.peer_id}-fake0"
    ask(
        made, leader, "POST", "/models/assign", {"model_name": MODEL, "worker_ids": [worker], "preload": True}
    )
    words = " ".join(f"w{number}" for number in range(200))
    body = {
        "task_type": "text_generation",
        "model_name": MODEL,
        "parameters": {"prompt": words, "max_tokens": 200, "stream": True},
    }
    task_id = _begun_beside(made, serving, leader, body)
    pieces: list[str] = []
    ended: list[str] = []

    def read() -> None:
        headers = {"Authorization": f"Bearer {made.key}"}
        with httpx.stream(
            "GET", f"{serving.url}/tasks/{task_id}/stream", headers=headers, timeout=60.0, trust_env=False
        ) as answer:
            name = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: ") and name in ("token", "restart"):
                    pieces.append(json.loads(line.removeprefix("data: ")).get("text", "\0"))
                elif line.startswith("data: ") and name in ("done", "error"):
                    ended.append(name)
                    return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    poll("tokens come", lambda: len(pieces) > 3)
    leader.host.kill_all()
    before = len(pieces)
    poll("tokens go on without the leader", lambda: len(pieces) > before + 3 or ended, 5.0)
    reader.join(60.0)
    assert ended == ["done"]
    made.settle()
    result = ask(made, serving, "GET", f"/tasks/{task_id}")["result"]["generated_text"]
    text = "".join(pieces).rpartition("\0")[2]  # of the last attempt
    assert text == result


def test_events_come_once_and_in_order_across_a_failover_and_go_on_at_another_peer(made: Cluster) -> None:
    from websockets.sync.client import connect

    first, second = made.followers()

    def follow(member: Member, since: int | None, until: int, within_s: float) -> list[int]:
        query = f"?since={since}" if since is not None else ""
        url = f"ws://{member.host.address}:8000/ws{query}"
        seen: list[int] = []
        end = time.monotonic() + within_s
        headers = {"Authorization": f"Bearer {made.key}"}
        with connect(url, additional_headers=headers, open_timeout=10.0) as socket:
            while len(seen) < until and time.monotonic() < end:
                message = json.loads(socket.recv(timeout=max(0.1, end - time.monotonic())))
                if "id" in message:
                    seen.append(int(message["id"]))
        return seen

    killer = threading.Timer(1.0, made.leader().host.kill_all)
    killer.start()
    seen = follow(first, None, 150, 60.0)
    killer.join()
    more = follow(second, seen[-1], 50, 60.0)
    numbers = [*seen, *more]
    assert len(numbers) == 200
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
