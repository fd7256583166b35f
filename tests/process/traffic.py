"""Clients that go on while a peer is killed under them, and what they were promised.

Each client submits under an Idempotency-Key and repeats until it is acknowledged, as a careful client does. What
was acknowledged, and every finished task that was read once, is kept to be compared with later answers.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from tests.process.peers import submission

PAUSE_S = 0.1
REPEATED = 0.1  # of acknowledged submissions are sent again: the same task must come back
CANCELLED = 0.05  # of tasks are cancelled
FINISHED = frozenset({"completed", "failed", "cancelled"})


class Promises:
    """What clients know. Threads share it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.prompts: dict[str, str] = {}  # of each acknowledged task
        self.cancelled: set[str] = set()
        self.finished: dict[str, dict[str, Any]] = {}  # the whole answer, as first read
        self.events: list[dict[str, Any]] = []
        self.broken: list[str] = []  # promises that were not kept
        self.stop = threading.Event()

    def acknowledged(self) -> set[str]:
        with self.lock:
            return set(self.prompts)

    def read(self, task: dict[str, Any]) -> None:
        """Compare a task as it was answered with what was known of it."""
        task_id, status = task["task_id"], task["status"]
        with self.lock:
            first = self.finished.get(task_id)
            if first is not None and first != task:
                self.broken.append(f"{task_id} has changed: {first} -> {task}")
            if task_id in self.cancelled and status != "cancelled":
                self.broken.append(f"{task_id} was cancelled and is {status}")
            if status in FINISHED:
                self.finished.setdefault(task_id, task)
            if status == "completed" and task["result"]["generated_text"] != self.prompts.get(task_id):
                self.broken.append(f"{task_id} has another task's result: {task}")


class Client:
    """One who submits, one task after the other."""

    def __init__(self, name: str, url: str, headers: dict[str, str], promises: Promises, seed: int) -> None:
        self.name = name
        self.promises = promises
        self._random = random.Random(f"{name}/{seed}")
        self._http = httpx.Client(base_url=url, headers=headers, timeout=10.0)

    def run(self) -> None:
        number = 0
        while not self.promises.stop.wait(PAUSE_S):
            number += 1
            self._one(number)
        self._http.close()

    def _one(self, number: int) -> None:
        words = self._random.randint(1, 25)
        prompt = " ".join((self.name, str(number), *(["word"] * words)))
        task_id = self._submit(f"{self.name}-{number}", prompt)
        if task_id is None:
            return
        with self.promises.lock:
            self.promises.prompts[task_id] = prompt
        if self._random.random() < REPEATED:
            again = self._submit(f"{self.name}-{number}", prompt)
            if again not in (task_id, None):
                self.promises.broken.append(f"the same key made {task_id} and {again}")
        if self._random.random() < CANCELLED:
            self._cancel(task_id)

    def _submit(self, idempotency_key: str, prompt: str) -> str | None:
        """The task's id once it is acknowledged; None if everything stops before."""
        headers = {"Idempotency-Key": idempotency_key}
        answer = self._until_answered(
            lambda: self._http.post("/tasks", json=submission(prompt), headers=headers), {201}
        )
        return None if answer is None else str(answer.json()["task_id"])

    def _cancel(self, task_id: str) -> None:
        answer = self._until_answered(lambda: self._http.delete(f"/tasks/{task_id}"), {200, 409})
        if answer is not None and answer.status_code == 200:
            with self.promises.lock:
                self.promises.cancelled.add(task_id)

    def _until_answered(self, ask: Callable[[], httpx.Response], good: set[int]) -> httpx.Response | None:
        while not self.promises.stop.is_set():
            try:
                answer = ask()
            except httpx.TransportError:  # it is being killed or is starting: not known whether it was done
                time.sleep(PAUSE_S)
                continue
            if answer.status_code in good:
                return answer
            if answer.status_code != 503:
                self.promises.broken.append(f"answered {answer.status_code}: {answer.text}")
                return None
            time.sleep(PAUSE_S)
        return None


def follow(url: str, headers: dict[str, str], promises: Promises) -> None:
    """Read the journal over `/ws`, going on after the last event seen whenever the peer was killed."""
    while not promises.stop.is_set():
        last = promises.events[-1]["id"] if promises.events else 0
        try:
            with connect(f"{socket_url(url)}/ws?since={last}", additional_headers=headers) as socket:
                _read_events(socket.recv, promises)
        except (OSError, WebSocketException):
            time.sleep(PAUSE_S)


def _read_events(receive: Callable[[float], str | bytes], promises: Promises) -> None:
    while not promises.stop.is_set():
        try:
            event = json.loads(receive(0.2))
        except TimeoutError:
            continue
        last = promises.events[-1]["id"] if promises.events else 0
        if event["id"] != last + 1:
            promises.broken.append(f"event {event['id']} came after {last}")
        promises.events.append(event)


def replay(url: str, headers: dict[str, str]) -> list[dict[str, Any]]:
    """Every event of the journal, until nothing has come for a moment."""
    events = []
    with connect(f"{socket_url(url)}/ws?since=0", additional_headers=headers) as socket:
        while True:
            try:
                events.append(json.loads(socket.recv(1.0)))
            except TimeoutError:
                return events


def socket_url(url: str) -> str:
    return url.replace("http", "ws", 1)
