"""The real small model on the CPU device: tokens a second and time to first token, alone and 8 at once.

Clients read `GET /tasks/{id}/stream`; few enough events that plain threads do. There is no reference: the
figures stand beside DESIGN's and ENGINE's own, measured on a machine like this one.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.bench.peer import Peer, peer
from tests.bench.processes import Missing
from tests.bench.report import Options, Result, Row, median

MODEL = "smollm2-135m"
TOKENS = 48
CONCURRENT = 8
START_S = 300.0
STREAM_S = 120.0
LINE_BYTES_MAX = 65536
PROMPTS = (
    "Once upon a time there was",
    "The history of the steam engine begins",
    "A good way to learn a language is",
    "The three most common mistakes in cooking are",
    "In the year 2050 people will",
    "The mountains in the north are",
    "To repair a bicycle you first",
    "Music is important because",
)


@dataclass
class Generation:
    """Seconds are since the request was sent."""

    tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    failure: str = ""
    pieces: list[float] = field(default_factory=list)


def generate(running: Peer, prompt: str, tokens: int) -> Generation:
    """One task, read token by token."""
    one = Generation()
    parameters = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    task = {"task_type": "text_generation", "model_name": MODEL, "parameters": parameters}
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=STREAM_S)
    try:
        began = time.perf_counter()
        body = json.dumps(task).encode()
        headers = running.headers() | {"Content-Type": "application/json"}
        connection.request("POST", "/tasks", body, headers)
        answer = json.loads(connection.getresponse().read())
        if "task_id" not in answer:
            return Generation(failure=str(answer))
        connection.request("GET", f"/tasks/{answer['task_id']}/stream", headers=running.headers())
        _read(connection.getresponse(), one, began)
    except (OSError, ValueError, http.client.HTTPException) as error:
        one.failure = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return one


def _read(response: http.client.HTTPResponse, one: Generation, began: float) -> None:
    event = ""
    while line := response.readline(LINE_BYTES_MAX):
        if line.startswith(b"event: "):
            event = line[7:].strip().decode()
        elif line.startswith(b"data: ") and event == "token":
            now = time.perf_counter() - began
            one.tokens += int(json.loads(line[6:])["count"])
            one.first_s = one.first_s or now
            one.last_s = now
            one.pieces.append(now)
        elif line.startswith(b"data: "):
            answer = json.loads(line[6:])
            if answer.get("status") != "completed":
                one.failure = str(answer)[:300]
            return


def together(running: Peer, count: int, tokens: int) -> list[Generation]:
    """`count` requests at once."""
    done: list[Generation] = []
    threads = [
        threading.Thread(target=lambda prompt=prompt: done.append(generate(running, prompt, tokens)))
        for prompt in (PROMPTS * (1 + count // len(PROMPTS)))[:count]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def measure(options: Options) -> Result:
    tokens = TOKENS // 3 if options.quick else TOKENS
    rounds: dict[int, list[list[Generation]]] = {1: [], CONCURRENT: []}
    raw: dict[str, Any] = {"model": MODEL, "tokens": tokens}
    note = ""
    try:
        with peer("CPU", arguments=("--model", MODEL)) as running:
            began = time.perf_counter()
            first = _first(running)
            raw |= {"load_and_first_task_s": time.perf_counter() - began, "first_task": asdict(first)}
            for _ in range(1 if options.quick else min(2, options.rounds)):
                for count, every in rounds.items():
                    every.append(together(running, count, tokens))
    except Missing as error:
        note = str(error)
    failures = [one.failure for every in rounds.values() for done in every for one in done if one.failure]
    raw["rounds"] = {
        count: [[asdict(one) for one in done] for done in every] for count, every in rounds.items()
    }
    raw["failures"] = failures
    note = note or "; ".join(failures[:2])
    rows = [row for count, every in rounds.items() for row in _rows(count, every, note)]
    return Result(rows, raw)


def _first(running: Peer) -> Generation:
    """A task to its end, so that the model is loaded and its graphs are there. Raises Missing."""
    deadline = time.perf_counter() + START_S
    while True:
        one = generate(running, PROMPTS[0], 4)
        if not one.failure:
            return one
        if time.perf_counter() > deadline or "unknown" in one.failure or "not_installed" in one.failure:
            raise Missing(one.failure)
        time.sleep(1.0)


def _rows(count: int, every: list[list[Generation]], note: str) -> list[Row]:
    rates, firsts = [], []
    for done in every:
        good = [one for one in done if not one.failure and one.tokens]
        if good:
            rates.append(sum(one.tokens for one in good) / max(one.last_s for one in good))
            firsts.append(median([one.first_s for one in good]) or 0.0)
    name = f"{MODEL} on the CPU, {count} at once"
    return [
        Row(f"{name}, all tokens (prefill included)", median(rates), None, "tokens/s", note=note),
        Row(f"{name}, time to first token", median(firsts), None, "s"),
    ]
