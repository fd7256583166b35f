"""Closed loop: publishes a task (durable once acknowledged), then waits for its result, also durable by then.

`nats_client.py PORT CLIENTS SECONDS WARMUP_S` prints an outcome as JSON.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time

import nats
from nats.aio.msg import Msg

LIMIT_S = 20.0


async def main() -> None:
    port, clients, seconds, warmup_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    connection = await nats.connect(f"nats://127.0.0.1:{port}")
    jet = connection.jetstream()
    waiting: dict[str, asyncio.Future[bytes]] = {}
    done: list[tuple[float, float]] = []

    async def result(message: Msg) -> None:
        future = waiting.pop(message.subject.split(".")[1], None)
        if future is not None and not future.done():
            future.set_result(message.data)

    await connection.subscribe("results.*", cb=result)
    body = json.dumps({"prompt": "hello", "max_tokens": 4}).encode()
    run_id = time.time_ns()

    async def client(number: int, until_s: float) -> None:
        count = 0
        while (began := time.perf_counter()) < until_s:
            count += 1
            name = f"{run_id}-{number}-{count}"
            future = asyncio.get_running_loop().create_future()
            waiting[name] = future
            await jet.publish("tasks." + name, body)
            await asyncio.wait_for(future, LIMIT_S)
            now = time.perf_counter()
            done.append((now, now - began))

    began = time.perf_counter()
    until_s = began + warmup_s + seconds
    await asyncio.gather(*(client(number, until_s) for number in range(clients)))
    counted = sorted(took for at, took in done if began + warmup_s <= at <= until_s)
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
                "total": len(done),
                "window_s": seconds,
                "per_s": round(len(counted) / seconds, 2),
                "latency_ms": picked,
                "client_cpu_s": usage.ru_utime + usage.ru_stime,
            }
        )
    )
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
