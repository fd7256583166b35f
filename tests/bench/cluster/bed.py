"""What the measures of a cluster share: one that is up, on a real disk, and a client that waits for its answers."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import httpx
from websockets.sync.client import connect

from tests.bench.processes import Missing, temporary
from tests.process.cluster.cluster import Cluster, cluster
from tests.process.cluster.hosts import unusable
from tests.process.cluster.member import Member
from tests.process.peers import poll, submission

SIZE = 3
CALL_S = 40.0  # a peer holds a request that long at most while nobody leads
LOG_CHARS = 6_000
QUIET_S = 1.0  # of events: then all were read
MODEL = "echo"
LOAD_S = 30.0


class Client:
    """One connection to each peer; it waits longer than a peer does."""

    def __init__(self, made: Cluster) -> None:
        self._made = made
        headers = {"Authorization": f"Bearer {made.key}"}
        self._http = httpx.Client(headers=headers, timeout=CALL_S, trust_env=False)

    def call(self, member: Member, method: str, path: str, **request: Any) -> tuple[int, Any]:
        """Status and body; 0 and why if nothing was answered."""
        try:
            answer = self._http.request(method, member.url + path, **request)
            return answer.status_code, answer.json()
        except (httpx.HTTPError, ValueError) as error:
            return 0, str(error)

    def get(self, member: Member, path: str) -> Any:
        """Raises Missing when it is not answered with 200."""
        status, body = self.call(member, "GET", path)
        if status != 200:
            raise Missing(f"GET {path} of {member.host.name}: {status} {body}")
        return body

    def submit(self, member: Member, prompt: str) -> str:
        """The id of a task. Raises Missing."""
        status, body = self.call(member, "POST", "/tasks", json=submission(prompt))
        if status != 201:
            raise Missing(f"POST /tasks of {member.host.name}: {status} {body}")
        return str(body["task_id"])

    def load_everywhere(self) -> None:
        """Every worker has the model, and keeps it for its next life."""
        leader = self._made.leader()
        workers = [each["worker_id"] for each in self.get(leader, "/workers")["workers"]]
        body = {"model_name": MODEL, "worker_ids": workers, "preload": True, "priority": "normal"}
        status, answer = self.call(leader, "POST", "/models/assign", json=body)
        if status >= 300:
            raise Missing(f"the model was not assigned: {status} {answer}")
        self.await_loaded()

    def await_loaded(self) -> None:
        """Every worker is online with the model loaded, as the leader says."""
        leader = self._made.leader()

        def loaded() -> bool:
            workers = self.get(leader, "/workers")["workers"]
            return len(workers) == SIZE and all(
                worker["status"] in ("online", "busy") and MODEL in worker["loaded_models"]
                for worker in workers
            )

        poll("every worker has the model", loaded, LOAD_S)

    def await_idle(self, member: Member, within_s: float) -> None:
        """Nothing is queued or runs."""

        def idle() -> bool:
            status = self.get(member, "/cluster/status")
            return not status["queued_tasks"] and not status["running_tasks"]

        poll("all tasks have ended", idle, within_s, 0.1)

    def events(self, names: str) -> list[dict[str, Any]]:
        """All events of these names until now."""
        leader = self._made.leader()
        url = f"{leader.url.replace('http', 'ws', 1)}/ws?since=0&events={names}"
        found: list[dict[str, Any]] = []
        with connect(url, additional_headers={"Authorization": f"Bearer {self._made.key}"}) as socket:
            while True:
                try:
                    found.append(json.loads(socket.recv(QUIET_S)))
                except TimeoutError:
                    return found

    def close(self) -> None:
        self._http.close()


@contextmanager
def bed(tokens_per_s: float = 0.0) -> Iterator[tuple[Cluster, Client]]:
    """A cluster that is up. Raises Missing where there can be none; its logs go to stderr when something breaks."""
    if why := unusable():
        raise Missing(why)
    logs = io.StringIO()
    try:
        with (
            temporary() as folder,
            redirect_stdout(logs),
            cluster(folder, SIZE, disk_bytes=0, tokens_per_s=tokens_per_s) as made,
        ):
            client = Client(made)
            try:
                yield made, client
            finally:
                client.close()
    except BaseException:
        print(logs.getvalue()[-LOG_CHARS:], file=sys.stderr)
        raise


def say(text: str) -> None:
    """Progress."""
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
