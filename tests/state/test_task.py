"""The transition table, exhaustively, and what hangs on it."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from peer.state.task import (
    SHOWN_STATUSES,
    TERMINAL,
    TRANSITIONS,
    Happening,
    IllegalTransition,
    Status,
    Task,
    TextGeneration,
    run_s,
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
    [b'{"prompt":""}', b'{"max_tokens":0}', b'{"top_p":0}', b'{"wrong":1}', b'{"stop":[""]}', b'{"seed":-1}'],
)
def test_parameters_are_bounded(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=TextGeneration)
