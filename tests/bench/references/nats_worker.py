"""A JetStream worker: takes tasks from a work queue, stores results in a second stream, then acknowledges.

`nats_worker.py PORT`. Both streams are on disk; the server fsyncs each write (sync_interval: always).
A task that crosses a fetch's end on its way is lost to it and comes again after `ack_wait`.
"""

from __future__ import annotations

import asyncio
import json
import sys

import nats
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, RetentionPolicy, StorageType, StreamConfig

BATCH = 64


async def main() -> None:
    connection = await nats.connect(f"nats://127.0.0.1:{sys.argv[1]}")
    jet = connection.jetstream()
    await jet.add_stream(
        StreamConfig(
            name="TASKS", subjects=["tasks.*"], storage=StorageType.FILE, retention=RetentionPolicy.WORK_QUEUE
        )
    )
    await jet.add_stream(
        StreamConfig(name="RESULTS", subjects=["results.*"], storage=StorageType.FILE, max_msgs=1_000_000)
    )

    async def work(message: Msg) -> None:
        task = json.loads(message.data)
        words = task["prompt"].split()[: task["max_tokens"]]
        result = {"generated_text": " ".join(words), "tokens_generated": len(words)}
        await jet.publish("results." + message.subject.split(".")[1], json.dumps(result).encode())
        await message.ack()

    subscription = await jet.pull_subscribe(
        "tasks.*", durable="worker", config=ConsumerConfig(max_ack_pending=1000, ack_wait=2)
    )
    print("ready", flush=True)
    running: set[asyncio.Task[None]] = set()
    while True:
        try:
            messages = await subscription.fetch(BATCH, timeout=5)
        except TimeoutError:  # nats-py raises its own kind of it, or the plain one
            continue
        for message in messages:
            task = asyncio.create_task(work(message))
            running.add(task)
            task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(main())
