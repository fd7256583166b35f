"""Tensor tasks through the API: arrays in, arrays out."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import msgspec
import pytest

from peer.state import command
from peer.state.model import Model
from peer.state.task import TENSORS_MAX, Array, Status, TaskResult
from tests.api.conftest import RunningServer
from tests.api.test_refusals import check_error

TOKENS = {"dtype": "int64", "shape": [1, 3], "data": [1, 2, 3]}


def submission(**inputs: Any) -> dict[str, Any]:
    return {"task_type": "tensor", "model_name": "magika", "parameters": {"inputs": inputs}}


@pytest.fixture(autouse=True)
def _with_a_model(server: RunningServer) -> None:
    magika = Model(name="magika", source="file:/m", family="onnx", context=1, task_types=("tensor",))
    server.cluster.catalogue = {**server.cluster.catalogue, "magika": magika}


def test_arrays_are_passed_on(client: httpx.Client, server: RunningServer) -> None:
    packed = {"dtype": "float32", "shape": [], "data": base64.b64encode(bytes(4)).decode()}
    mixed = {"dtype": "float64", "shape": [3], "data": [1, 2.5, -1e300]}
    answer = client.post("/tasks", json=submission(a=TOKENS, b=packed, c=mixed))
    assert answer.status_code == 201, answer.text
    sent = server.cluster.requests[-1]
    assert isinstance(sent, command.SubmitTask)
    assert (sent.task_type, sent.parameters) == ("tensor", {"inputs": {"a": TOKENS, "b": packed, "c": mixed}})


def test_arrays_come_back(client: httpx.Client, server: RunningServer) -> None:
    task_id = client.post("/tasks", json=submission(a=TOKENS)).json()["task_id"]
    arrays = (
        Array("shares", "float32", (2, 2), struct.pack("<4f", 0.5, float("nan"), float("inf"), -2.0)),
        Array("best", "int64", (2,), struct.pack("<2q", -(2**63), 7)),
        Array("sure", "bool", (), b"\x01"),
    )
    result = TaskResult(
        task_id=task_id, attempt=1, worker_id="worker-001", generated_text="", tokens_generated=0,
        prompt_tokens=0, finish_reason="stop", processing_s=0.5, first_token_s=0.0, arrays=arrays,
    )  # fmt: skip
    view = server.cluster.views[task_id]
    server.cluster.views[task_id] = msgspec.structs.replace(view, result=result)
    server.cluster.change(task_id, status=Status.COMPLETED)
    found = client.get(f"/tasks/{task_id}").json()["result"]
    assert found["outputs"] == {
        "shares": {"dtype": "float32", "shape": [2, 2], "data": [0.5, None, None, -2.0]},
        "best": {"dtype": "int64", "shape": [2], "data": [-(2**63), 7]},
        "sure": {"dtype": "bool", "shape": [], "data": [True]},
    }
    assert (found["task_type"], found["processing_time"]) == ("tensor", "0.5s")


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({}, "parameters.inputs"),
        ({f"i{number}": TOKENS for number in range(TENSORS_MAX + 1)}, "parameters.inputs"),
        ({"a": [1, 2]}, "parameters.inputs[...]"),
        ({"a": {**TOKENS, "dtype": "complex64"}}, "parameters.inputs[...].dtype"),
        ({"a": {**TOKENS, "shape": [-1]}}, "parameters.inputs[...].shape[0]"),
        ({"a": {**TOKENS, "shape": [1] * 17}}, "parameters.inputs[...].shape"),
        ({"a": {**TOKENS, "data": ["x"]}}, "parameters.inputs[...].data[0]"),
        ({"a": {**TOKENS, "data": [[1]]}}, "parameters.inputs[...].data[0]"),
        ({"a": {**TOKENS, "data": None}}, "parameters.inputs[...].data"),
        ({"a": {**TOKENS, "axis": 1}}, "parameters.inputs[...].axis"),
    ],
)
def test_wrong_arrays_are_named(client: httpx.Client, inputs: dict[str, Any], field: str) -> None:
    error = check_error(client.post("/tasks", json=submission(**inputs)), 400)
    assert error["details"]["field"] == field
