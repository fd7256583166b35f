"""`bitinglip embed` against a stub."""

from __future__ import annotations

import io
from typing import Any

import pytest

from peer.cli.exits import Exit
from tests.cli.conftest import Run
from tests.cli.stub import Stub
from tests.cli.test_commands import FAILED, TASK

RESULT = {
    "embeddings": [[0.5, -1.0], [1e-07, 2.0]],
    "dimensions": 2,
    "prompt_tokens": 4,
    "processing_time": "0.1s",
}
DONE: dict[str, Any] = {**TASK, "result": RESULT}
WAITING = {**TASK, "status": "queued", "result": None}


def test_a_vector_for_each_text(run: Run, stub: Stub) -> None:
    stub.replies["POST /tasks"] = (201, WAITING)
    stub.replies["GET /tasks/task-1"] = [(200, WAITING), (200, DONE)]
    ran = run("embed", "minilm", "one", "two words")
    assert (ran.code, ran.out.splitlines()) == (0, ["[0.5, -1.0]", "[1e-07, 2.0]"])
    assert stub.requests[0][2] == {
        "task_type": "embedding",
        "model_name": "minilm",
        "parameters": {"input": ["one", "two words"]},
    }


def test_its_options(run: Run, stub: Stub) -> None:
    stub.replies["POST /tasks"] = (201, DONE)
    ran = run(
        "embed", "m", "x", "--no-normalize", "--truncate", "--priority", "3", "--timeout", "9",
        "--idempotency-key", "k", "--json",
    )  # fmt: skip
    assert ran.json == DONE
    assert stub.requests[0][2] == {
        "task_type": "embedding",
        "model_name": "m",
        "parameters": {"input": ["x"], "normalize": False, "truncate": True},
        "priority": 3,
        "timeout": 9.0,
    }
    assert stub.headers[0]["idempotency-key"] == "k"


def test_lines_from_a_pipe(run: Run, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.replies["POST /tasks"] = (201, DONE)
    monkeypatch.setattr("sys.stdin", io.StringIO("first line\n\nsecond\n"))
    assert run("embed", "m", "-").code == 0
    assert stub.requests[0][2]["parameters"]["input"] == ["first line", "second"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert run("embed", "m", "-").code == Exit.USAGE


def test_a_failure(run: Run, stub: Stub) -> None:
    stub.replies["POST /tasks"] = (201, FAILED)
    ran = run("embed", "m", "x")
    assert (ran.code, ran.out) == (Exit.FAILED, "")
    assert "took too long" in ran.err


def test_tasks_tells_how_many_vectors_there_are(run: Run, stub: Stub) -> None:
    stub.replies["GET /tasks/task-1"] = (200, DONE)
    assert "2 of 2 numbers" in run("tasks", "task-1").out


def test_tasks_names_the_arrays_of_a_tensor_task(run: Run, stub: Stub) -> None:
    outputs = {name: {"dtype": "int8", "shape": [1], "data": [1]} for name in ("shares", "best")}
    result = {"outputs": outputs, "processing_time": "0.1s"}
    stub.replies["GET /tasks/task-1"] = (200, {**TASK, "result": result})
    out = run("tasks", "task-1").out
    assert "shares, best; see --json" in out
    assert "tokens" not in out
