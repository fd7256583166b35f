"""Clients of every peer, at a modest steady rate: they submit, read, wait and cancel, and go on whatever happens.

A submitter sends each task under an Idempotency-Key and repeats it, at the next peer, until it is acknowledged.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import httpx

from tests.process.cluster.history import Answer, History
from tests.process.peers import submission

SUBMIT_EVERY_S: Final = 0.5  # of each client
READ_EVERY_S: Final = 0.4
CALL_S_MAX: Final = 4.0
PAUSE_S: Final = 0.2
WORDS_MAX: Final = 24
CANCELLED: Final = 0.05
WAITED_FOR: Final = 0.2
REREAD: Final = 0.3  # of reads are of any task, also one that has ended long ago
JOIN_S_MAX: Final = 20.0


class Caller:
    """One client's connections to all peers."""

    def __init__(self, urls: Sequence[str], key: str) -> None:
        self._urls = tuple(urls)
        limits = httpx.Limits(max_keepalive_connections=4)
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(headers=headers, timeout=CALL_S_MAX, limits=limits, trust_env=False)

    def call(self, peer: int, method: str, path: str, **request: Any) -> Answer:
        """Whatever is answered; status 0 if nothing is."""
        began = time.monotonic()
        try:
            answer = self._http.request(method, self._urls[peer % len(self._urls)] + path, **request)
            body = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            return Answer(0, {"why": str(error)}, began, time.monotonic())
        replayed = answer.headers.get("idempotency-replayed") == "true"
        return Answer(answer.status_code, body, began, time.monotonic(), replayed)

    def close(self) -> None:
        self._http.close()


class Clients:
    """Two for each peer, in threads: one submits, one reads. Usage: start, then stop in any case."""

    def __init__(self, urls: Sequence[str], key: str, history: History, seed: int) -> None:
        self._urls, self._key, self._seed = urls, key, seed
        self._history = history
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        for peer in range(len(self._urls)):
            for what in (self._submit_on, self._read_on):
                self._threads.append(threading.Thread(target=what, args=(peer,)))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(JOIN_S_MAX)
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        assert not stuck, f"clients that do not end: {stuck}"

    def _submit_on(self, peer: int) -> None:
        caller, chance = Caller(self._urls, self._key), random.Random(f"submit/{peer}/{self._seed}")
        number = 0
        while not self._stop.wait(SUBMIT_EVERY_S):
            number += 1
            key = f"client{peer}-{number}-{self._seed}"
            words = chance.randint(1, WORDS_MAX)
            prompt = " ".join((key, *(["word"] * words)))
            self._history.begin(key, prompt)
            task_id = self._submit(caller, peer, key, prompt)
            if task_id and chance.random() < CANCELLED:
                answer = caller.call(peer, "DELETE", f"/tasks/{task_id}")
                self._history.cancelled(f"client{peer}", key, answer)
            elif task_id and chance.random() < WAITED_FOR:
                answer = caller.call(peer + 1, "GET", f"/tasks/{task_id}?wait=2")
                self._history.read(f"client{peer}", key, answer)
        caller.close()

    def _submit(self, caller: Caller, peer: int, key: str, prompt: str) -> str:
        headers = {"Idempotency-Key": key}
        attempt = 0
        while True:
            answer = caller.call(peer + attempt, "POST", "/tasks", json=submission(prompt), headers=headers)
            task_id = self._history.submitted(f"client{peer}", key, answer)
            if task_id or self._stop.wait(PAUSE_S):
                return task_id
            attempt += 1

    def _read_on(self, peer: int) -> None:
        caller, chance = Caller(self._urls, self._key), random.Random(f"read/{peer}/{self._seed}")
        while not self._stop.wait(READ_EVERY_S):
            found = self._history.waiting() if chance.random() > REREAD else []
            found = found or self._history.acknowledged()
            if found:
                told = chance.choice(found)
                answer = caller.call(peer, "GET", f"/tasks/{told.task_id}")
                self._history.read(f"reader{peer}", told.key, answer)
        caller.close()
