"""The transition table, exhaustively, and what hangs on it."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from peer.state.record import decode, encode
from peer.state.task import (
    INPUTS_MAX,
    SCHEMA_BYTES_MAX,
    SCHEMA_DEPTH_MAX,
    SHOWN_STATUSES,
    TERMINAL,
    TRANSITIONS,
    Array,
    Embedding,
    Happening,
    IllegalTransition,
    Logprobs,
    Status,
    Task,
    TaskResult,
    TextGeneration,
    TokenLogprob,
    run_s,
    schema_problem,
    shown,
    stage,
    step,
)

S, H = Status, Happening
ALLOWED = {
    (S.QUEUED, H.ASSIGN): S.ASSIGNED,
    (S.QUEUED, H.FAIL): S.FAILED,
    (S.QUEUED, H.CANCEL): S.CANCELLED,
    (S.ASSIGNED, H.START): S.RUNNING,
    (S.ASSIGNED, H.COMPLETE): S.COMPLETED,
    (S.ASSIGNED, H.FAIL): S.FAILED,
    (S.ASSIGNED, H.CANCEL): S.CANCELLED,
    (S.ASSIGNED, H.REQUEUE): S.QUEUED,
    (S.RUNNING, H.COMPLETE): S.COMPLETED,
    (S.RUNNING, H.FAIL): S.FAILED,
    (S.RUNNING, H.CANCEL): S.CANCELLED,
    (S.RUNNING, H.REQUEUE): S.QUEUED,
}


@pytest.mark.parametrize(("status", "happening"), list(itertools.product(Status, Happening)))
def test_every_entry_of_the_table(status: Status, happening: Happening) -> None:
    if (status, happening) in ALLOWED:
        assert step(status, happening) is ALLOWED[status, happening]
    else:
        with pytest.raises(IllegalTransition, match=f"{happening.value} cannot happen to a task that is"):
            step(status, happening)


def test_what_is_terminal_stays() -> None:
    assert {status for status in Status if not TRANSITIONS[status]} == TERMINAL


def test_what_clients_see() -> None:
    assert {shown(status) for status in Status} == set(SHOWN_STATUSES)
    assert shown(Status.ASSIGNED) == "running"


def test_each_attempts_beginning_and_end_is_a_stage() -> None:
    task = Task(task_id="t", task_type="x", model_name="m", priority=5, timeout_s=1, created_at=0, deadline=1)
    life = [(S.QUEUED, 0), (S.ASSIGNED, 1), (S.RUNNING, 1), (S.QUEUED, 1), (S.ASSIGNED, 2), (S.QUEUED, 2)]
    stages = [
        stage(msgspec.structs.replace(task, status=status, attempt=attempt)) for status, attempt in life
    ]
    assert stages == [0, 1, 1, 2, 3, 4]


def test_run_time() -> None:
    task = Task(task_id="t", task_type="x", model_name="m", priority=5, timeout_s=1, created_at=0, deadline=1)
    assert run_s(task) is None
    assert run_s(msgspec.structs.replace(task, started_at=2.0)) is None
    assert run_s(msgspec.structs.replace(task, completed_at=2.0)) is None
    assert run_s(msgspec.structs.replace(task, started_at=2.0, completed_at=5.5)) == 3.5
    assert run_s(msgspec.structs.replace(task, started_at=6.0, completed_at=5.5)) == 0.0


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":""}', b'{"max_tokens":0}', b'{"top_p":0}', b'{"wrong":1}', b'{"stop":[""]}', b'{"seed":-1}',
        b'{"min_p":2}', b'{"presence_penalty":3}', b'{"frequency_penalty":-3}', b'{"logit_bias":{"x":1}}',
        b'{"logit_bias":{"1":101}}', b'{"top_logprobs":21}', b'{"response_format":{"type":"text"}}',
    ],
)  # fmt: skip
def test_parameters_are_bounded(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=TextGeneration)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_schemas_are_bounded() -> None:
    assert schema_problem({}) == ""
    assert schema_problem({"enum": [1, "a", None, 2**64 - 1, -(2**63), True, 1e300]}) == ""
    assert schema_problem(nested(SCHEMA_DEPTH_MAX)) == ""
    for depth in (SCHEMA_DEPTH_MAX + 1, 100_000):
        assert schema_problem(nested(depth)) == f"nested more than {SCHEMA_DEPTH_MAX} deep"
    for number in (2**64, -(2**63) - 1):
        assert "64 bits" in schema_problem({"enum": [[{"const": number}]]})
    assert schema_problem({"title": "x" * (SCHEMA_BYTES_MAX - 12)}) == ""
    assert schema_problem({"title": "x" * (SCHEMA_BYTES_MAX - 11)}) == "65537 bytes, at most 65536"


def test_arrays_of_a_result_are_stored_as_bytes_and_counted() -> None:
    plain = TaskResult(
        task_id="t", attempt=1, worker_id="w", generated_text="", tokens_generated=0, prompt_tokens=1,
        finish_reason="stop", processing_s=1.0, first_token_s=0.0,
    )  # fmt: skip
    assert b"arrays" not in encode(plain)
    told = msgspec.structs.replace(plain, arrays=(Array("embeddings", "float32", (64, 384), bytes(98_304)),))
    assert decode(TaskResult, encode(told)) == told
    assert told.nbytes == 131_072
    assert len(encode(told)) - len(encode(plain)) == pytest.approx(told.nbytes, rel=0.01)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", "missing required field `input`"),
        (b'{"input": ""}', "length >= 1"),
        (b'{"input": []}', "length >= 1"),
        (b'{"input": ["a", ""]}', r"length >= 1 - at `\$.input\[1\]`"),
        (b'{"input": [1]}', r"Expected `str`, got `int` - at `\$.input\[0\]`"),
        (b'{"input": "a", "normalize": 1}', "Expected `bool"),
        (b'{"input": "a", "prompt": "a"}', "unknown field `prompt`"),
    ],
)
def test_parameters_of_embeddings(body: bytes, message: str) -> None:
    assert msgspec.json.decode(b'{"input": ["a", "b"], "truncate": true}', type=Embedding).truncate
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.json.decode(body, type=Embedding)
    texts = msgspec.json.encode({"input": ["a"] * (INPUTS_MAX + 1)})
    with pytest.raises(msgspec.ValidationError, match=f"length <= {INPUTS_MAX}"):
        msgspec.json.decode(texts, type=Embedding)


def test_logprobs_of_a_result_are_stored_compactly_and_counted() -> None:
    best = tuple(TokenLogprob(number, b"\xff piece", -1.234567) for number in range(20))
    plain = TaskResult(
        task_id="t", attempt=1, worker_id="w", generated_text="abc", tokens_generated=1, prompt_tokens=1,
        finish_reason="stop", processing_s=1.0, first_token_s=0.1,
    )  # fmt: skip
    assert plain.nbytes == 3
    assert b"logprobs" not in encode(plain)
    told = msgspec.structs.replace(plain, logprobs=(Logprobs(best[0], best),) * 50)
    assert decode(TaskResult, encode(told)) == told
    assert told.nbytes == 3 + 50 * 21 * (24 + 7)
    assert len(encode(told)) - len(encode(plain)) == pytest.approx(told.nbytes, rel=0.2)
