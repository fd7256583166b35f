"""A task, its attempts, and the one table of what may happen to it.

Times are wall seconds since 1970 (UTC) as the leader's clock gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


_RECORDS_BYTES: Final = 1_024  # a finished task without its parameters and result, with its keys


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
    result_bytes: int = 0
    status: Status = Status.QUEUED
    attempt: int = 0
    strikes: int = 0
    worker_id: str | None = None
    assigned_at: float | None = None
    started_at: float | None = None
    completed_at: float | None = None
    error: TaskError | None = None
    requeued_because: str = ""  # of the last attempt that did not finish

    @property
    def kept_bytes(self) -> int:
        """About how much the store holds of it once it is finished: then its input is gone."""
        return _RECORDS_BYTES + self.result_bytes


def run_s(task: Task) -> float | None:
    """From the start of the last attempt to the end; None if it never started or has not ended."""
    if task.started_at is None or task.completed_at is None:
        return None
    return max(0.0, task.completed_at - task.started_at)


class TaskInput(Record, frozen=True):
    """A task's validated parameters."""

    task_id: str
    parameters: dict[str, Any]


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token's natural logarithm of its probability. `piece` is its UTF-8, maybe of a part of a character."""

    token: int
    piece: bytes
    logprob: float


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one generated token; `best` are the likeliest ones in its place, best first."""

    own: TokenLogprob
    best: tuple[TokenLogprob, ...] = ()

    @property
    def nbytes(self) -> int:
        """About how many bytes it is in the store."""
        return sum(_LOGPROB_BYTES + len(each.piece) for each in (self.own, *self.best))


_LOGPROB_BYTES: Final = 24  # of one in the store, without its piece


# numpy's name of a type -> `struct`'s
ARRAY_FORMATS: Final = MappingProxyType(
    {
        "float32": "f",
        "float64": "d",
        "float16": "e",
        "bool": "?",
        "int8": "b",
        "int16": "h",
        "int32": "i",
        "int64": "q",
        "uint8": "B",
        "uint16": "H",
        "uint32": "I",
        "uint64": "Q",
    }
)
ArrayType = Literal[
    "float32",
    "float64",
    "float16",
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]


class Array(msgspec.Struct, frozen=True, array_like=True):
    """Numbers in row-major order, little endian. `dtype` is numpy's name of their type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def nbytes(self) -> int:
        """About how many bytes it is in the store."""
        return len(self.data) * 4 // 3


def result_bytes(text: str, logprobs: tuple[Logprobs, ...], arrays: tuple[Array, ...] = ()) -> int:
    """About how many bytes a result is in the store, beyond the few of every record."""
    return len(text) + sum(each.nbytes for each in logprobs) + sum(each.nbytes for each in arrays)


class TaskResult(Record, frozen=True):
    """What the first finished attempt gave. Written once, with the transition to completed; never changed.

    `logprobs` are those of the first tokens, as many as limits.LOGPROBS_BYTES_MAX leaves room for, if asked for.
    Of an embedding task `arrays` are the vectors, one below the other, and there is no text.
    """

    task_id: str
    attempt: int
    worker_id: str
    generated_text: str
    tokens_generated: int
    prompt_tokens: int
    finish_reason: str  # stop, length
    processing_s: float
    first_token_s: float
    cached_tokens: int = 0  # of the prompt's, those that the device had in its cache from an earlier task
    stand_in: bool = False
    logprobs: tuple[Logprobs, ...] = ()
    arrays: tuple[Array, ...] = ()

    @property
    def nbytes(self) -> int:
        return result_bytes(self.generated_text, self.logprobs, self.arrays)


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
TOP_LOGPROBS_MAX: Final = 20
BIASES_MAX: Final = 1_024
SCHEMA_BYTES_MAX: Final = 64 * 1024
SCHEMA_DEPTH_MAX: Final = 64
INPUTS_MAX: Final = 1_024
TENSORS_MAX: Final = 64
DIMENSIONS_MAX: Final = 16
_INTEGERS: Final = range(-(2**63), 2**64)  # that a frame between peers can hold

Text = Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)]
EmbeddedText = Annotated[str, Meta(min_length=1, max_length=PROMPT_CHARS_MAX)]
StopText = Annotated[str, Meta(min_length=1, max_length=STOP_CHARS_MAX)]
TokenNumber = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,8})\Z")]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: Text


class _Format(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of what a text can be asked to be."""


class JsonObject(_Format, frozen=True, tag="json_object"):
    """The text is a JSON object."""


class JsonSchema(_Format, frozen=True, tag="json_schema"):
    """The text is JSON of this schema. The engine refuses what it cannot keep to."""

    schema: dict[str, Any]


class TextGeneration(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Parameters of a `text_generation` task: exactly one of `prompt` and `messages`.

    `logit_bias` is by token number. `top_logprobs` above 0 asks for `logprobs` too.
    """

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
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[TokenNumber, Bias], Meta(max_length=BIASES_MAX)] = {}
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] = 0
    response_format: JsonObject | JsonSchema | None = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parameters of an `embedding` task. `normalize` null: as the model's own files say. A text that is longer than
    the model takes is refused, or with `truncate` cut.
    """

    input: EmbeddedText | Annotated[list[EmbeddedText], Meta(min_length=1, max_length=INPUTS_MAX)]
    normalize: bool | None = None
    truncate: bool = False


class TensorInput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An array. `data` are its numbers in row-major order, or their little-endian bytes in base64."""

    dtype: ArrayType
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=2**31)]], Meta(max_length=DIMENSIONS_MAX)]
    data: str | list[bool | int | float]


class TensorInputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of a `tensor` task: the model's inputs by name."""

    inputs: Annotated[dict[str, TensorInput], Meta(min_length=1, max_length=TENSORS_MAX)]


def schema_problem(schema: dict[str, Any]) -> str:
    """Why a JSON schema cannot be taken, "" if it can: its size, its depth, its numbers."""
    level: list[Any] = [schema]
    for _ in range(SCHEMA_DEPTH_MAX):
        if any(isinstance(node, int) and node not in _INTEGERS for node in level):
            return "an integer of more than 64 bits"
        level = [child for node in level for child in _children(node)]
        if not level:
            break
    else:
        return f"nested more than {SCHEMA_DEPTH_MAX} deep"
    size = len(msgspec.json.encode(schema))
    return f"{size} bytes, at most {SCHEMA_BYTES_MAX}" if size > SCHEMA_BYTES_MAX else ""


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()
