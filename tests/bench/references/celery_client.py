"""Closed loop: CLIENTS tasks are out at any time; a task is done when its result has come back.

`celery_client.py CLIENTS SECONDS WARMUP_S WAY` prints an outcome as JSON. WAY: `events` (results come over
the backend's pub/sub, one thread keeps all tasks going) or `threads` (a thread a client calls `.get()`).
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time

from celery_app import app, echo

LIMIT_S = 20.0


def by_events(clients: int, until_s: float, done: list[tuple[float, float]]) -> None:
    waiting: dict[str, tuple[float, object]] = {}
    finished: list[str] = []

    def send() -> None:
        began = time.perf_counter()
        result = echo.delay("hello", 4)
        waiting[result.id] = (began, result)
        result.then(lambda ended: finished.append(ended.id))

    for _ in range(clients):
        send()
    consumer = app.backend.result_consumer
    while waiting and time.perf_counter() < until_s + LIMIT_S:
        try:
            consumer.drain_events(timeout=1.0)
        except (TimeoutError, OSError):
            continue
        while finished:
            began, _ = waiting.pop(finished.pop())
            now = time.perf_counter()
            done.append((now, now - began))
            if now < until_s:
                send()


def by_threads(clients: int, until_s: float, done: list[tuple[float, float]]) -> None:
    def client() -> None:
        while (began := time.perf_counter()) < until_s:
            echo.delay("hello", 4).get(timeout=LIMIT_S)
            now = time.perf_counter()
            done.append((now, now - began))

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S + max(0.0, until_s - time.perf_counter()))


def main() -> None:
    clients, seconds, warmup_s, way = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    echo.delay("hello", 4).get(timeout=LIMIT_S)  # the worker is there
    began = time.perf_counter()
    done: list[tuple[float, float]] = []
    run = by_events if way == "events" else by_threads
    run(clients, began + warmup_s + seconds, done)
    counted = sorted(took for at, took in done if began + warmup_s <= at <= began + warmup_s + seconds)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    picked = {
        f"p{p}": counted[min(len(counted) - 1, len(counted) * p // 100)] * 1e3
        for p in (50, 90, 99)
        if counted
    }
    print(
        json.dumps(
            {
                "exchanges": len(counted),
                "total": len(done) + 1,
                "window_s": seconds,
                "per_s": round(len(counted) / seconds, 2),
                "latency_ms": picked,
                "client_cpu_s": usage.ru_utime + usage.ru_stime,
            }
        )
    )


if __name__ == "__main__":
    main()
