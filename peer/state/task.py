"""A task, its attempts, and the one table of what may happen to it.

Times are wall seconds since 1970 (UTC) as the leader's clock gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from peer.state.base import Record


class Status(StrEnum):
    QUEUED = "queued"
    ASSIGNED = "assigned"  # committed to a worker, not yet started there; clients see "running"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Happening(Enum):
    """What can happen to a task that is in the table."""

    ASSIGN = "assign"
    START = "start"
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"
    REQUEUE = "requeue"


TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})

TRANSITIONS: Mapping[Status, Mapping[Happening, Status]] = MappingProxyType(
    {
        Status.QUEUED: {
            Happening.ASSIGN: Status.ASSIGNED,
            Happening.FAIL: Status.FAILED,
            Happening.CANCEL: Status.CANCELLED,
        },
        Status.ASSIGNED: {
            Happening.START: Status.RUNNING,
            Happening.COMPLETE: Status.COMPLETED,
            Happening.FAIL: Status.FAILED,
            Happening.CANCEL: Status.CANCELLED,
            Happening.REQUEUE: Status.QUEUED,
        },
        Status.RUNNING: {
            Happening.COMPLETE: Status.COMPLETED,
            Happening.FAIL: Status.FAILED,
            Happening.CANCEL: Status.CANCELLED,
            Happening.REQUEUE: Status.QUEUED,
        },
        Status.COMPLETED: {},
        Status.FAILED: {},
        Status.CANCELLED: {},
    }
)


class IllegalTransition(Exception):
    """A bug: the leader tried what the table does not allow."""


def step(status: Status, happening: Happening) -> Status:
    """The state after `happening`. Raises IllegalTransition where the table has no such entry."""
    try:
        return TRANSITIONS[status][happening]
    except KeyError:
        raise IllegalTransition(f"{happening.value} cannot happen to a task that is {status.value}") from None


def shown(status: Status) -> str:
    """The state as clients see it: an assigned task is `running`."""
    return "running" if status is Status.ASSIGNED else status.value


def stage(task: Task) -> int:
    """How far an unfinished task has come: it grows when an attempt is assigned and when one ends without a result."""
    return 2 * task.attempt - (task.status is not Status.QUEUED)


SHOWN_STATUSES = ("queued", "running", "completed", "failed", "cancelled")

PRIORITY_NAMES: Mapping[str, int] = MappingProxyType({"critical": 1, "high": 3, "normal": 5, "low": 8})


class TaskError(Record, frozen=True):
    """Why a task failed: a code for programs, a sentence for people."""

    code: str
    message: str


class Task(Record, frozen=True):
    """One task without its parameters and result, which are records of their own (they can be large).

    `attempt` counts tries: 0 before the first assignment; `worker_id` is that of the current or last attempt.
    `strikes` counts those that an engine, worker or peer failed; being moved by the owner is none.
    """

    task_id: str
    task_type: str
    model_name: str
    priority: int  # 1 (highest) to 10
    timeout_s: float
    created_at: float
    deadline: float  # created_at + timeout_s
    owner: str = ""
    key_id: str = ""
    request_id: str = ""
    idempotency_key: str = ""
    parameters_bytes: int = 0
    status: Status = Status.QUEUED
    attempt: int = 0
    strikes: int = 0
    worker_id: str | None = None
    assigned_at: float | None = None
    started_at: float | None = None
    completed_at: float | None = None
    error: TaskError | None = None
    requeued_because: str = ""  # of the last attempt that did not finish


def run_s(task: Task) -> float | None:
    """From the start of the last attempt to the end; None if it never started or has not ended."""
    if task.started_at is None or task.completed_at is None:
        return None
    return max(0.0, task.completed_at - task.started_at)


class TaskInput(Record, frozen=True):
    """A task's validated parameters."""

    task_id: str
    parameters: dict[str, Any]


class TaskResult(Record, frozen=True):
    """What the first finished attempt gave. Written once, with the transition to completed; never changed."""

    task_id: str
    attempt: int
    worker_id: str
    generated_text: str
    tokens_generated: int
    prompt_tokens: int
    finish_reason: str  # stop, length
    processing_s: float
    first_token_s: float
    stand_in: bool = False


class Idempotency(Record, frozen=True):
    """The first task made under a client's Idempotency-Key."""

    owner: str
    key: str
    task_id: str
    body_digest: str


# ------------------------------------------------------------------ parameters of the task types

PROMPT_CHARS_MAX: Final = 1_000_000
MESSAGES_MAX: Final = 1_000
STOP_STRINGS_MAX: Final = 16
STOP_CHARS_MAX: Final = 256
TOKENS_MAX: Final = 131_072

Text = Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)]
StopText = Annotated[str, Meta(min_length=1, max_length=STOP_CHARS_MAX)]


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: Text


class TextGeneration(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Parameters of a `text_generation` task: exactly one of `prompt` and `messages`."""

    prompt: Annotated[str, Meta(min_length=1, max_length=PROMPT_CHARS_MAX)] | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MESSAGES_MAX)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=TOKENS_MAX)] = 256
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] = 0.7
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    repetition_penalty: Annotated[float, Meta(ge=0.1, le=10.0)] = 1.0
    stop: StopText | Annotated[list[StopText], Meta(max_length=STOP_STRINGS_MAX)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stream: bool = False
