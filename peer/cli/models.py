"""`bitinglip models`, `load`, `unload`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import client_options, console, emit, json_option, poll_pause, say, shown, table
from peer.cli.exits import CliError, Exit

if TYPE_CHECKING:
    from peer.cli.client import Client

LOADED = frozenset({"loaded"})
Show = Callable[[str, str, float | None], None]  # worker, status, percent


@click.command()
@json_option
@client_options
def models(client: Client, as_json: bool) -> None:
    """List the catalogue and where its models are."""
    answer = client.get("/models")
    if as_json:
        emit(answer)
        return
    rows = (
        (
            model["name"],
            model["family"],
            model["context"],
            model["size"],
            [f"{replica['worker_id']} {replica['status']}" for replica in model.get("replicas", ())],
            model.get("queued_tasks", 0),
        )
        for model in answer.data["models"]
    )
    columns = ("MODEL", "FAMILY", ">CONTEXT", ">SIZE", "WORKERS", ">QUEUED")
    table(columns, rows, empty="the catalogue is empty")


@click.command()
@click.argument("model")
@click.option("--worker", "worker_ids", multiple=True, metavar="ID", help="Where; else where it fits best.")
@click.option("--priority", type=click.Choice(["low", "normal", "high", "critical"]))
@click.option("--on-first-use", is_flag=True, help="Only assign it; load it when a task needs it.")
@click.option("--wait/--no-wait", default=None, help="Until it is loaded; the default without --json.")
@json_option
@client_options
def load(
    client: Client,
    model: str,
    worker_ids: tuple[str, ...],
    priority: str | None,
    on_first_use: bool,
    wait: bool | None,
    as_json: bool,
) -> None:
    """Load MODEL on workers."""
    body: dict[str, Any] = {"model_name": model, "worker_ids": list(worker_ids), "preload": not on_first_use}
    if priority is not None:
        body["priority"] = priority
    answer = client.post("/models/assign", body)
    placed = answer.data["assignments"]
    if as_json:
        emit(answer)
    else:
        for item in placed:
            reason = f" ({shown(item['reason'])})" if item.get("reason") else ""
            state = f"{shown(item['status'])}, {shown(item['estimated_time'])} estimated"
            print(f"{shown(item['worker_id'])}: {state}{reason}")
    if on_first_use or not (wait if wait is not None else not as_json):
        return
    follow_load(client, model, [str(item["worker_id"]) for item in placed])


def follow_load(client: Client, model: str, worker_ids: list[str]) -> None:
    """Show the load's progress until it is done. Raises CliError if it fails anywhere."""
    waiting = dict.fromkeys(worker_ids)
    seen: set[str] = set()
    began = time.monotonic()
    with progress(model) as show:
        while waiting:
            states = _states(client, model)
            for worker_id, state in states.items():
                if worker_id not in waiting:
                    continue
                seen.add(worker_id)
                stage = f", {shown(state['stage'])}" if state.get("stage") else ""
                show(worker_id, f"{state['status']}{stage}", state.get("progress"))
                if state["status"] in LOADED:
                    del waiting[worker_id]
                elif state["status"] == "failed":
                    raise CliError(
                        f"{model} could not be loaded on {worker_id}: {shown(state.get('error'))}",
                        Exit.FAILED,
                    )
            gone = seen & set(waiting) - set(states)
            if gone:
                raise CliError(f"{model} is no longer wanted on {', '.join(sorted(gone))}", Exit.FAILED)
            if waiting:
                time.sleep(poll_pause(time.monotonic() - began))


def _states(client: Client, model: str) -> dict[str, dict[str, Any]]:
    """The model's state on each worker."""
    return {
        str(worker["worker_id"]): state
        for worker in client.get("/models/assignments").data["assignments"]
        for state in worker["models"]
        if state["name"] == model
    }


@contextmanager
def progress(model: str) -> Iterator[Show]:
    """Bars on a terminal, a line for each change elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        last: dict[str, str] = {}

        def line(worker_id: str, status: str, percent: float | None) -> None:
            if last.get(worker_id) != status:
                last[worker_id] = status
                say(f"{model} on {worker_id}: {status}")

        yield line
        return
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    bars: dict[str, TaskID] = {}
    text = TextColumn("{task.description}", markup=False)
    with Progress(text, BarColumn(), TimeElapsedColumn(), console=console(stderr=True)) as drawn:

        def bar(worker_id: str, status: str, percent: float | None) -> None:
            if worker_id not in bars:
                bars[worker_id] = drawn.add_task("", total=None)
            full = status in LOADED
            drawn.update(
                bars[worker_id],
                description=f"{model} on {worker_id}: {status}",
                total=100.0 if full or percent is not None else None,
                completed=100.0 if full else percent or 0.0,
            )

        yield bar


@click.command()
@click.argument("model")
@click.option("--worker", "worker_ids", multiple=True, metavar="ID", help="Where; else everywhere.")
@click.option("--force", is_flag=True, help="Interrupt its tasks; none loads it again for 10 minutes.")
@json_option
@client_options
def unload(client: Client, model: str, worker_ids: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Unload MODEL from workers, when its running tasks have ended or with --force at once."""
    answer = client.post(
        "/models/unload", {"model_name": model, "worker_ids": list(worker_ids), "force": force}
    )
    if as_json:
        emit(answer)
        return
    print(f"{shown(answer.data['message'])}: {shown(answer.data['affected_workers'])}")
    if answer.data.get("requeued_tasks"):
        print(f"queued again: {shown(answer.data['requeued_tasks'])}")
