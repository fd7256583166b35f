"""Embedding tasks on the full product: durable as any other, their vectors one event of a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.process.peers import Peers

pytestmark = pytest.mark.process


def task(*texts: str, model: str = "echo", **fields: Any) -> dict[str, Any]:
    return {"task_type": "embedding", "model_name": model, "parameters": {"input": list(texts)}, **fields}


def test_from_submission_to_vectors(peers: Peers) -> None:
    peer = peers.start()
    answer = peer.client.post("/tasks?wait=20", json=task("one two", "three", "one two"))
    assert answer.status_code == 201, answer.text
    done = answer.json()
    assert (done["status"], done["task_type"]) == ("completed", "embedding")
    first, second, again = done["result"]["embeddings"]
    assert first == again != second
    assert done["result"]["dimensions"] == len(first) == 8
    assert done["result"]["prompt_tokens"] == 5
    with peer.client.stream("GET", f"/tasks/{done['task_id']}/stream") as stream:
        events = [line for line in stream.iter_lines() if line.startswith(("event:", "data:"))]
    assert events[0] == "event: done"
    assert json.loads(events[1].removeprefix("data: "))["result"] == done["result"]
    assert len(events) == 2
    refused = peer.client.post("/tasks", json=task("x", model="smollm2-135m"))
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "wrong_task_type"
    long = peer.client.post("/tasks", json=task("word " * 9_000))
    assert (long.status_code, long.json()["error"]["code"]) == (400, "prompt_too_long")
    cut = task("word " * 9_000)
    cut["parameters"]["truncate"] = True
    assert peer.client.post("/tasks?wait=20", json=cut).json()["result"]["prompt_tokens"] == 8_192
    peer.stop()
    peer.start()
    assert peer.task(done["task_id"])["result"] == done["result"]
