"""Tasks: submitted, watched, listed, cancelled."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Annotated, Any, Literal, cast

import msgspec
import trio
from msgspec import Meta

from api import format, results, schemas, schemas_submit, stale
from api.decode import BodyDecoder
from api.http import ID, Call, Param, Reply, Route, query_choice, query_float, query_int
from api.models import priority_number
from api.stale import STALE, STALE_HEADER
from peer import limits
from peer.errors import BadRequest, BitinglipError, Unavailable
from peer.state import command
from peer.state.model import Model
from peer.state.task import (
    SHOWN_STATUSES,
    TERMINAL,
    Embedding,
    JsonSchema,
    Task,
    TensorInputs,
    TextGeneration,
    schema_problem,
    shown,
)

_encode = msgspec.json.Encoder().encode
_decode_submit = BodyDecoder[schemas_submit.SubmitTask](cast(Any, schemas_submit.SubmitTask))

# more than any chat template adds around a prompt, and around each message
TEMPLATE_TOKENS_MAX = 64
MESSAGE_TOKENS_MAX = 16
AT_STOP_S = 1.0  # what a stopping peer waits for its cluster's last word on a task


def duration_s(task: Task) -> float | None:
    """From the start on a worker to the end."""
    if task.started_at is None or task.completed_at is None:
        return None
    return max(0.0, task.completed_at - task.started_at)


def _error(task: Task) -> schemas.TaskError | None:
    return schemas.TaskError(code=task.error.code, message=task.error.message) if task.error else None


def detail(view: command.TaskView) -> schemas.TaskDetail:
    task = view.task
    took_s = duration_s(task)
    return schemas.TaskDetail(
        task_id=task.task_id,
        status=shown(task.status),
        assigned_worker=task.worker_id,
        created_at=format.timestamp(task.created_at),
        started_at=format.timestamp_or_none(task.started_at),
        completed_at=format.timestamp_or_none(task.completed_at),
        duration=None if took_s is None else format.duration(took_s),
        result=results.shown(view),
        estimated_wait_time=format.estimate_or_none(view.estimated_wait_s),
        task_type=task.task_type,
        model_name=task.model_name,
        priority=task.priority,
        timeout=task.timeout_s,
        attempt=task.attempt,
        tokens_so_far=view.tokens_so_far,
        duration_seconds=None if took_s is None else round(took_s, 6),
        estimated_wait_seconds=view.estimated_wait_s,
        error=_error(task),
        pending_reasons=[
            schemas.PendingReason(worker_id=pending.worker_id, reason=pending.reason)
            for pending in view.pending
        ],
        requeued_because=task.requeued_because,
        request_id=task.request_id,
    )


def summary(task: Task) -> schemas.TaskSummary:
    took_s = duration_s(task)
    return schemas.TaskSummary(
        task_id=task.task_id,
        status=shown(task.status),
        task_type=task.task_type,
        assigned_worker=task.worker_id,
        duration=None if took_s is None else format.duration(took_s),
        created_at=format.timestamp(task.created_at),
        model_name=task.model_name,
        priority=task.priority,
        started_at=format.timestamp_or_none(task.started_at),
        completed_at=format.timestamp_or_none(task.completed_at),
        duration_seconds=None if took_s is None else round(took_s, 6),
        error=_error(task),
    )


def _tokens_at_most(parameters: TextGeneration | Embedding | TensorInputs) -> int:
    """An upper bound that costs nothing: no tokenizer makes more tokens than there are bytes."""
    if isinstance(parameters, TensorInputs):
        return 0
    if isinstance(parameters, Embedding):
        texts = [parameters.input] if isinstance(parameters.input, str) else parameters.input
        return max(len(text.encode()) for text in texts) + TEMPLATE_TOKENS_MAX
    if parameters.prompt is not None:
        return len(parameters.prompt.encode()) + TEMPLATE_TOKENS_MAX
    messages = parameters.messages or ()
    size = sum(len(message.content.encode()) + MESSAGE_TOKENS_MAX for message in messages)
    return size + TEMPLATE_TOKENS_MAX


async def _check_fits(
    call: Call, model: Model, task_type: str, parameters: Any, plain: dict[str, Any]
) -> None:
    if task_type not in model.task_types or _tokens_at_most(parameters) < model.context:
        return  # of another type, which the leader refuses, or short
    if isinstance(parameters, Embedding) and parameters.truncate:
        return
    counted = await call.api.cluster.count_tokens(model.name, plain)
    if counted is None:
        return
    tokens, context = counted
    if isinstance(parameters, Embedding):
        if tokens > context:
            field = "parameters.input"
            raise BadRequest(
                f"{field}: a text of {tokens} tokens is longer than the {context} that {model.name} takes; shorten it,"
                " or send truncate: true",
                code="prompt_too_long",
                details={"field": field, "tokens": tokens, "context": context},
            )
    elif tokens >= context:
        field = "parameters.messages" if parameters.prompt is None else "parameters.prompt"
        raise BadRequest(
            f"{field}: {tokens} tokens leave no room in the context of {model.name}, {context} tokens",
            code="prompt_too_long",
            details={"field": field, "tokens": tokens, "context": context},
        )


def _idempotency_key(call: Call) -> str:
    raw = call.headers.get(b"idempotency-key")
    if raw is None:
        return ""
    key = raw.decode("latin-1")
    if not 1 <= len(key) <= limits.IDEMPOTENCY_KEY_CHARS_MAX or not (key.isascii() and key.isprintable()):
        raise BadRequest(
            f"Idempotency-Key must be 1 to {limits.IDEMPOTENCY_KEY_CHARS_MAX} printable ASCII characters",
            details={"field": "Idempotency-Key"},
        )
    return key


def _check_parameters(parameters: TextGeneration | Embedding | TensorInputs) -> None:
    if not isinstance(parameters, TextGeneration):
        return
    if (parameters.prompt is None) == (parameters.messages is None):
        raise BadRequest(
            "parameters: exactly one of prompt and messages is needed",
            details={"field": "parameters.prompt", "one_of": ["prompt", "messages"]},
        )
    if isinstance(parameters.response_format, JsonSchema):
        problem = schema_problem(parameters.response_format.schema)
        if problem:
            field = "parameters.response_format.schema"
            raise BadRequest(f"{field}: {problem}", details={"field": field, "reason": problem})


def _digest(task_type: str, body: schemas_submit.SubmitTask) -> str:
    """Of what the request means: it tells a repetition from another request under the same key."""
    meant = {
        "task_type": task_type,
        "model_name": body.model_name,
        "parameters": body.parameters,
        "priority": body.priority,
        "timeout": body.timeout,
    }
    return hashlib.sha256(_encode(meant)).hexdigest()


async def submit(call: Call) -> Reply:
    body = _decode_submit(call.body)
    parameters = body.parameters
    _check_parameters(parameters)
    task_type = str(body.__struct_config__.tag)
    idempotency_key = _idempotency_key(call)
    wait_s = query_float(call.query, "wait", 0.0, 0.0, limits.WAIT_S_MAX)
    model = call.api.model(body.model_name)
    plain: dict[str, Any] = msgspec.to_builtins(parameters)
    await _check_fits(call, model, task_type, parameters, plain)
    key = call.caller
    submitted: command.Submitted = await call.api.cluster.call(
        command.SubmitTask(
            task_type=task_type,
            model_name=body.model_name,
            parameters=plain,
            priority=priority_number(body.priority),
            timeout_s=body.timeout,
            owner=key.owner,
            key_id=key.key_id,
            request_id=call.request_id,
            idempotency_key=idempotency_key,
            body_digest=_digest(task_type, body) if idempotency_key else "",
        )
    )
    view = submitted.view
    task_id = view.task.task_id
    if wait_s and view.task.status not in TERMINAL:
        with contextlib.suppress(Unavailable):  # the peer stops; the task is accepted all the same
            view = await _wait(call, task_id, wait_s)
    headers = [(b"location", b"/tasks/" + task_id.encode("ascii"))]
    if submitted.replayed:
        headers.append((b"idempotency-replayed", b"true"))
    return Reply(_encode(detail(view)), 201, headers)


async def _wait(call: Call, task_id: str, wait_s: float) -> command.TaskView:
    query = command.GetTask(task_id=task_id, wait_s=wait_s)
    try:
        view: command.TaskView = await call.unless_gone(lambda: stale.read(call, query))
    except Unavailable:
        ended = await ended_at_stop(call, task_id)
        if ended is None:
            raise
        return ended
    return view


async def ended_at_stop(call: Call, task_id: str) -> command.TaskView | None:
    """The task, if the peer stops and the task has ended.

    A peer that drains stops as soon as its runs have ended, which cuts those off who waited for just these ends.
    """
    if not call.api.stopping.is_set():
        return None
    with trio.move_on_after(AT_STOP_S), contextlib.suppress(BitinglipError):
        view: command.TaskView = await stale.read(call, command.GetTask(task_id=task_id))
        return view if view.task.status in TERMINAL else None
    return None


async def get_task(call: Call) -> Reply:
    wait_s = query_float(call.query, "wait", 0.0, 0.0, limits.WAIT_S_MAX)
    task_id = call.args[0]
    if wait_s:
        view = await _wait(call, task_id, wait_s)
    else:
        view = await stale.read(call, command.GetTask(task_id=task_id))
    return stale.reply(call, detail(view))


async def list_tasks(call: Call) -> Reply:
    query = call.query
    limit = query_int(query, "limit", limits.PAGE_DEFAULT, 1, limits.PAGE_MAX)
    offset = query_int(query, "offset", 0, 0, limits.OFFSET_MAX)
    status = query_choice(query, "status", SHOWN_STATUSES)
    worker_id = query.get("worker_id")
    if worker_id is not None and not ID.match(worker_id):
        raise BadRequest("worker_id is not a worker's id", details={"field": "worker_id"})
    page: command.TaskPage = await stale.read(
        call, command.ListTasks(status=status, worker_id=worker_id, limit=limit, offset=offset)
    )
    return stale.reply(
        call,
        schemas.TaskList(
            tasks=[summary(task) for task in page.tasks], total=page.total, limit=limit, offset=offset
        ),
    )


async def cancel(call: Call) -> Reply:
    view: command.TaskView = await call.api.cluster.call(command.CancelTask(task_id=call.args[0]))
    return Reply(
        _encode(
            schemas.TaskCancelled(
                message="Task cancelled", task_id=view.task.task_id, status=shown(view.task.status)
            )
        )
    )


WAIT = Param(
    "wait",
    Annotated[float, Meta(ge=0, le=limits.WAIT_S_MAX)],
    "Seconds to wait for the task's end; the answer comes when it ends, or then",
)
LOCATION = Param("Location", str, "Path of what was made")

ROUTES = (
    Route(
        "POST",
        "/tasks",
        submit,
        "submit",
        "Submit a task",
        schemas.TaskDetail,
        201,
        body=schemas_submit.SubmitTask,
        example={
            "task_type": "text_generation",
            "model_name": "llama-2-7b",
            "parameters": {"prompt": "Explain quantum computing", "max_tokens": 512, "temperature": 0.7},
            "priority": "normal",
            "timeout": 300,
        },
        query=(WAIT,),
        headers=(
            Param(
                "Idempotency-Key",
                Annotated[str, Meta(max_length=limits.IDEMPOTENCY_KEY_CHARS_MAX, pattern=r"^[ -~]+$")],
                "The same key with the same body gives the first task again, with another body 409",
            ),
        ),
        errors=(404, 409),
        response_headers=(LOCATION,),
    ),
    Route(
        "GET",
        "/tasks",
        list_tasks,
        "read",
        "Tasks, newest first",
        schemas.TaskList,
        query=(
            Param(
                "status",
                Literal["queued", "running", "completed", "failed", "cancelled"],
                "Only tasks of this status",
            ),
            Param("worker_id", Annotated[str, Meta(pattern=f"^{ID.pattern}")], "Only tasks of this worker"),
            Param("limit", Annotated[int, Meta(ge=1, le=limits.PAGE_MAX)], "Default 50"),
            Param("offset", Annotated[int, Meta(ge=0, le=limits.OFFSET_MAX)], "Default 0"),
            STALE,
        ),
        response_headers=(STALE_HEADER,),
    ),
    Route(
        "GET",
        "/tasks/{task_id}",
        get_task,
        "read",
        "Status and result of a task",
        schemas.TaskDetail,
        query=(WAIT, STALE),
        errors=(404,),
        response_headers=(STALE_HEADER,),
    ),
    Route(
        "DELETE",
        "/tasks/{task_id}",
        cancel,
        "submit",
        "Cancel a queued or running task",
        schemas.TaskCancelled,
        errors=(404, 409),
    ),
)  # fmt: skip
