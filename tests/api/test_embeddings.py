"""Embedding tasks through the API: what is taken, what is refused, and the vectors back."""

from __future__ import annotations

import json
import struct
from typing import Any

import httpx
import msgspec
import pytest

from peer.state import command
from peer.state.model import Model
from peer.state.task import INPUTS_MAX, Array, Status, TaskResult
from tests.api.conftest import RunningServer
from tests.api.test_refusals import check_error

VECTORS = ((0.25, -1.0, 3.5), (1e-7, 0.1, 0.0))


def submission(**parameters: Any) -> dict[str, Any]:
    return {"task_type": "embedding", "model_name": "minilm", "parameters": parameters}


@pytest.fixture(autouse=True)
def _with_an_embedder(server: RunningServer) -> None:
    minilm = Model(name="minilm", source="file:/m", family="bert", context=256, task_types=("embedding",))
    server.cluster.catalogue = {**server.cluster.catalogue, "minilm": minilm}


def sent(server: RunningServer) -> command.SubmitTask:
    found = [each for each in server.cluster.requests if isinstance(each, command.SubmitTask)]
    return found[-1]


def test_what_is_asked_for_is_passed_on(client: httpx.Client, server: RunningServer) -> None:
    for given in ({"input": "a"}, {"input": ["a", "b"], "normalize": False, "truncate": True}):
        answer = client.post("/tasks", json=submission(**given))
        assert answer.status_code == 201, answer.text
        assert (sent(server).task_type, sent(server).parameters) == ("embedding", given)
    client.post("/tasks", json=submission(input="a", normalize=None, truncate=False))
    assert sent(server).parameters == {"input": "a"}


def test_vectors_come_back_as_numbers(client: httpx.Client, server: RunningServer) -> None:
    task_id = client.post("/tasks", json=submission(input=["a", "b"])).json()["task_id"]
    data = b"".join(struct.pack("<3f", *vector) for vector in VECTORS)
    result = TaskResult(
        task_id=task_id, attempt=1, worker_id="worker-001", generated_text="", tokens_generated=0,
        prompt_tokens=7, finish_reason="stop", processing_s=2.81, first_token_s=0.0,
        arrays=(Array("embeddings", "float32", (2, 3), data),),
    )  # fmt: skip
    view = server.cluster.views[task_id]
    server.cluster.views[task_id] = msgspec.structs.replace(view, result=result)
    server.cluster.change(task_id, status=Status.COMPLETED)
    found = client.get(f"/tasks/{task_id}").json()["result"]
    assert found.pop("embeddings") == [pytest.approx(vector, rel=1e-6) for vector in VECTORS]
    assert found == {
        "task_type": "embedding",
        "dimensions": 3,
        "prompt_tokens": 7,
        "processing_time": "2.8s",
        "processing_time_seconds": 2.81,
        "stand_in": False,
    }


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({}, "parameters.input"),
        ({"input": ""}, "parameters.input"),
        ({"input": []}, "parameters.input"),
        ({"input": ["a", 1]}, "parameters.input[1]"),
        ({"input": ["a"] * (INPUTS_MAX + 1)}, "parameters.input"),
        ({"input": "a", "normalize": "yes"}, "parameters.normalize"),
        ({"input": "a", "truncate": None}, "parameters.truncate"),
        ({"input": "a", "prompt": "a"}, "parameters.prompt"),
        ({"prompt": "a"}, "parameters.prompt"),
    ],
)
def test_wrong_parameters_are_named(client: httpx.Client, parameters: dict[str, Any], field: str) -> None:
    error = check_error(client.post("/tasks", json=submission(**parameters)), 400)
    assert error["details"]["field"] == field


def test_texts_that_are_too_long_are_refused_unless_they_may_be_cut(
    client: httpx.Client, server: RunningServer
) -> None:
    long = "word " * 300
    server.cluster.counted = (256, 256)
    assert client.post("/tasks", json=submission(input=long)).status_code == 201
    server.cluster.counted = (257, 256)
    error = check_error(client.post("/tasks", json=submission(input=["a", long])), 400)
    assert error["code"] == "prompt_too_long"
    assert error["details"] == {"field": "parameters.input", "tokens": 257, "context": 256}
    assert client.post("/tasks", json=submission(input=long, truncate=True)).status_code == 201
    assert client.post("/tasks", json=submission(input=["a"] * 900)).status_code == 201  # no text is long
    server.cluster.counted = None
    assert client.post("/tasks", json=submission(input=long)).status_code == 201  # the engine will say


def test_a_key_of_idempotency_tells_bodies_apart(client: httpx.Client, server: RunningServer) -> None:
    digests = set()
    bodies = (submission(input="a"), submission(input=["a"]), submission(input="a", truncate=True))
    for number, body in enumerate(bodies):
        client.post("/tasks", json=body, headers={"Idempotency-Key": str(number)})
        digests.add(sent(server).body_digest)
    assert len(digests) == 3
    reordered = json.dumps({"parameters": {"input": "a"}, "model_name": "minilm", "task_type": "embedding"})
    client.post(
        "/tasks", content=reordered, headers={"Idempotency-Key": "k", "Content-Type": "application/json"}
    )
    assert sent(server).body_digest in digests
