"""Celery's no-op task with Redis as broker and result backend. Its best settings for many small tasks."""

import os

from celery import Celery

URL = os.environ["BENCH_REDIS_URL"]
app = Celery("celery_app", broker=URL, backend=URL)
app.conf.update(
    task_serializer="json",
    result_serializer="json",
    accept_content=["json"],
    worker_prefetch_multiplier=32,
    worker_send_task_events=False,
    task_send_sent_event=False,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    redis_max_connections=256,
)


@app.task(name="echo")
def echo(prompt: str, max_tokens: int) -> dict[str, object]:
    words = prompt.split()[:max_tokens]
    return {"generated_text": " ".join(words), "tokens_generated": len(words)}
