"""`bitinglip submit`, `tasks`, `cancel`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from peer.cli.common import (
    client_options,
    emit,
    emit_object,
    json_option,
    pairs,
    printable,
    say,
    shown,
    table,
)
from peer.cli.exits import CliError, Exit

if TYPE_CHECKING:
    from peer.cli.client import Answer, Client

FINISHED = frozenset({"completed", "failed", "cancelled"})
POLL_WAIT_S = 60
STATUSES = ("queued", "running", "completed", "failed", "cancelled")
PRIORITIES = ("low", "normal", "high", "critical", *(str(number) for number in range(1, 11)))


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--stream", is_flag=True, help="Print the text as it is generated.")
@click.option("--wait", is_flag=True, help="Wait for the end and print the text.")
@click.option("--max-tokens", type=click.IntRange(min=1))
@click.option("--temperature", type=float)
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--min-p", type=float)
@click.option("--repetition-penalty", type=float)
@click.option("--presence-penalty", type=float)
@click.option("--frequency-penalty", type=float)
@click.option(
    "--logit-bias", multiple=True, metavar="TOKEN=BIAS", help="Of a token's number. May be repeated."
)
@click.option("--logprobs", is_flag=True, help="Log probabilities of the tokens, seen with --json.")
@click.option("--top-logprobs", type=click.IntRange(0, 20), help="And those of so many likeliest ones.")
@click.option("--json-object", is_flag=True, help="The text is a JSON object.")
@click.option(
    "--json-schema", type=click.File("rb"), metavar="FILE", help="The text is JSON of the schema in FILE."
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be repeated.")
@click.option("--seed", type=click.IntRange(min=0))
@click.option("--priority", type=click.Choice(PRIORITIES), help="1 is the highest, 10 the lowest.")
@click.option("--timeout", type=float, metavar="SECONDS", help="From submission to the end.")
@click.option("--idempotency-key", metavar="TEXT", help="The same key again gives the same task.")
@json_option
@client_options
def submit(
    client: Client,
    model: str,
    prompt: str,
    stream: bool,
    wait: bool,
    stop: tuple[str, ...],
    logit_bias: tuple[str, ...],
    logprobs: bool,
    json_object: bool,
    json_schema: BinaryIO | None,
    priority: str | None,
    timeout: float | None,
    idempotency_key: str | None,
    as_json: bool,
    **sampling: float | int | None,
) -> int:
    """Submit PROMPT (- reads it from standard input) to MODEL.

    Prints the task's id, or with --wait or --stream the text. With --stream and --json each line is an event.
    """
    parameters: dict[str, Any] = {"prompt": sys.stdin.read() if prompt == "-" else prompt}
    parameters.update({name: value for name, value in sampling.items() if value is not None})
    if stop:
        parameters["stop"] = list(stop)
    if logit_bias:
        parameters["logit_bias"] = dict(map(_bias, logit_bias))
    if logprobs:
        parameters["logprobs"] = True
    if json_object or json_schema is not None:
        parameters["response_format"] = _response_format(json_object, json_schema)
    if stream:
        parameters["stream"] = True
    body, headers = submission("text_generation", model, parameters, priority, timeout, idempotency_key)
    answer = client.post("/tasks", body, headers=headers)
    task_id = str(answer.data["task_id"])
    if stream:
        with _left_running(task_id):
            return _stream(client, task_id, as_json)
    if wait:
        answer = finished(client, answer)
    if as_json:
        emit(answer)
    elif wait:
        _print_text(answer.data)
    else:
        print(task_id)
        say(f"{shown(answer.data['status'])}; see it with `bitinglip tasks {task_id}`")
        return Exit.OK
    return outcome(answer.data) if wait else Exit.OK


def submission(
    task_type: str,
    model: str,
    parameters: dict[str, Any],
    priority: str | None,
    timeout: float | None,
    idempotency_key: str | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Body and headers of `POST /tasks`."""
    body: dict[str, Any] = {"task_type": task_type, "model_name": model, "parameters": parameters}
    if priority is not None:
        body["priority"] = int(priority) if priority.isdigit() else priority
    if timeout is not None:
        body["timeout"] = timeout
    return body, {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}


def _bias(text: str) -> tuple[str, float]:
    token, _, bias = text.partition("=")
    try:
        return token, float(bias)
    except ValueError:
        raise CliError(f"`{text}` is not a token's number and its bias, like 42=-1.5", Exit.USAGE) from None


def _response_format(json_object: bool, json_schema: BinaryIO | None) -> dict[str, Any]:
    if json_schema is None:
        return {"type": "json_object"}
    if json_object:
        raise CliError("either --json-object or --json-schema", Exit.USAGE)
    try:
        return {"type": "json_schema", "schema": json.load(json_schema)}
    except ValueError as error:
        raise CliError(f"{json_schema.name} is no JSON: {error}", Exit.USAGE) from None


@contextmanager
def _left_running(task_id: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        say(
            f"\n{task_id} goes on: `bitinglip tasks {task_id}` shows it, `bitinglip cancel {task_id}` ends it"
        )
        raise


def finished(client: Client, answer: Answer) -> Answer:
    """The task of this answer once it has ended."""
    task_id = str(answer.data["task_id"])
    with _left_running(task_id):
        while answer.data["status"] not in FINISHED:
            answer = client.get(f"/tasks/{task_id}", {"wait": POLL_WAIT_S}, wait_s=POLL_WAIT_S)
    return answer


def _stream(client: Client, task_id: str, as_json: bool) -> int:
    """Follow a task's text. Exit code of its end."""
    with client.stream(f"/tasks/{task_id}/stream") as events:
        for name, data in events:
            if as_json:
                emit_object({"event": name, **data})
            elif name == "token":
                text = data["text"]
                sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
                sys.stdout.flush()
            elif name == "restart":
                say(f"\n[begins anew, what came before is void: {shown(data.get('reason'))}]")
            if name == "done":
                return _streamed(data, as_json)
            if name == "error":
                error = data.get("error", data)
                raise CliError(printable(str(error.get("message", error))), Exit.FAILED)
    raise CliError(
        "the stream broke off before the task's end", Exit.UNREACHABLE, f"see `bitinglip tasks {task_id}`"
    )


def _streamed(task: dict[str, Any], as_json: bool) -> int:
    if not as_json:
        print()
        if task["status"] != "completed":
            say(_failure(task))
    return outcome(task)


def _print_text(task: dict[str, Any]) -> None:
    if task["status"] == "completed":
        text = str((task.get("result") or {}).get("generated_text", ""))
        print(printable(text) if sys.stdout.isatty() else text)
    else:
        say(_failure(task))


def say_failure(task: dict[str, Any]) -> None:
    say(_failure(task))


def _failure(task: dict[str, Any]) -> str:
    error = task.get("error") or {}
    reason = f": {error.get('message', '')} ({error.get('code', '')})" if error else ""
    return f"{task['task_id']} {task['status']}{reason}"


def outcome(task: dict[str, Any]) -> int:
    return Exit.FAILED if task["status"] in ("failed", "cancelled") else Exit.OK


@click.command()
@click.argument("task_id", required=False)
@click.option("--status", type=click.Choice(STATUSES))
@click.option("--worker", metavar="ID", help="Only tasks of this worker.")
@click.option("--limit", type=click.IntRange(1, 500), default=50, show_default=True)
@click.option("--offset", type=click.IntRange(min=0), default=0, show_default=True)
@json_option
@client_options
def tasks(
    client: Client,
    task_id: str | None,
    status: str | None,
    worker: str | None,
    limit: int,
    offset: int,
    as_json: bool,
) -> None:
    """List tasks, newest first, or show one with its result, or why it is pending."""
    if task_id is not None:
        answer = client.get(f"/tasks/{path_part(task_id)}")
        emit(answer) if as_json else _show(answer.data)
        return
    answer = client.get("/tasks", {"status": status, "worker_id": worker, "limit": limit, "offset": offset})
    if as_json:
        emit(answer)
        return
    found = answer.data["tasks"]
    columns = ("TASK", "STATUS", "MODEL", "WORKER", ">DURATION", "CREATED")
    table(
        columns,
        (
            (
                task["task_id"],
                task["status"],
                task.get("model_name"),
                task["assigned_worker"],
                task["duration"],
                task["created_at"],
            )
            for task in found
        ),
        empty="no tasks",
    )
    total = answer.data["total"]
    if len(found) < total:
        first = offset + 1 if found else 0
        say(f"{first} to {offset + len(found)} of {total}; more with --offset and --limit")


def _show(task: dict[str, Any]) -> None:
    result = task.get("result") or {}
    error = task.get("error") or {}
    rows: list[tuple[str, Any]] = [
        ("task", task["task_id"]),
        ("status", task["status"]),
        ("model", task.get("model_name")),
        ("worker", task["assigned_worker"]),
        ("created", task["created_at"]),
        ("started", task["started_at"]),
        ("ended", task["completed_at"]),
        ("duration", task["duration"]),
    ]
    if task.get("attempt"):
        rows.append(("attempt", task["attempt"]))
    if task["status"] not in FINISHED and task.get("estimated_wait_time"):
        rows.append(("wait, estimated", task["estimated_wait_time"]))
    if error:
        rows.append(("error", f"{error.get('code')}: {error.get('message')}"))
    if "embeddings" in result:
        rows.append(
            ("vectors", f"{len(result['embeddings'])} of {result.get('dimensions')} numbers; see --json")
        )
    elif "outputs" in result:
        rows.append(("arrays", f"{', '.join(map(str, result['outputs']))}; see --json"))
    elif result:
        rows.append(("tokens", result.get("tokens_generated")))
    if result:
        rows.append(("processing time", result.get("processing_time")))
    for pending in task.get("pending_reasons") or ():
        rows.append(("pending", f"{pending['worker_id'] or 'cluster'}: {pending['reason']}"))
    pairs(rows)
    if result.get("generated_text"):
        print()
        print(printable(str(result["generated_text"])))


@click.command()
@click.argument("task_id")
@json_option
@client_options
def cancel(client: Client, task_id: str, as_json: bool) -> None:
    """Cancel a queued or running task."""
    answer = client.request("DELETE", f"/tasks/{path_part(task_id)}")
    if as_json:
        emit(answer)
    else:
        print(f"{shown(answer.data['task_id'])} {shown(answer.data['status'])}")


def path_part(name: str) -> str:
    """An id as one segment of a path."""
    from urllib.parse import quote

    if name in ("", ".", ".."):
        raise CliError(f"`{name}` is not an id", Exit.USAGE)
    return quote(name, safe="")
