"""`bitinglip demo`: a peer of its own, one real model, one text over REST, and everything stopped again."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import printable
from peer.cli.exits import CliError, Exit
from peer.cli.own_peer import READY_S_MAX, await_ready, own_peer, with_log

if TYPE_CHECKING:
    from peer.cli.client import Client

MODEL = "smollm2-135m"
PROMPT = "Why do cats purr? Answer in two sentences."


@click.command(hidden=True)
@click.option("--data-dir", default=".data/demo", show_default=True, metavar="DIR")
@click.option("--device", default="CPU", show_default=True)
@click.option("--model", default=MODEL, show_default=True)
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--max-tokens", default=64, show_default=True)
def demo(data_dir: str, device: str, model: str, prompt: str, max_tokens: int) -> int:
    """Start a peer, load a model, stream a text from it, stop."""
    from peer.cli.client import Client, find
    from peer.cli.models import follow_load

    directory = Path(data_dir).absolute()
    log = directory.with_suffix(".log")
    began = time.monotonic()
    arguments = ["--api", "127.0.0.1:0", "--config", os.devnull, "--device", device, "--model", model]
    with own_peer(directory, log, arguments) as process:
        await_ready(process, directory, log)
        target = find(None, str(directory / "admin.key"), str(directory), {})
        with Client(target) as client:
            print(f"the peer is ready at {target.url} after {time.monotonic() - began:.1f} s; its log: {log}")
            try:
                print(
                    f"loading {model} on {device}; its first start compiles, which takes longest", flush=True
                )
                follow_load(client, model, [_worker(client)])
                _generate(client, model, prompt, max_tokens)
            except CliError as error:
                raise with_log(error, log) from None
    print(f"the peer is stopped; all of it took {time.monotonic() - began:.1f} s")
    return Exit.OK


def _worker(client: Client) -> str:
    """The peer's one worker, when it has reported."""
    end = time.monotonic() + READY_S_MAX
    while time.monotonic() < end:
        for worker in client.get("/workers").data["workers"]:
            if worker["status"] == "error":
                raise CliError(f"{worker['worker_id']}: {worker.get('message')}", Exit.FAILED)
            return str(worker["worker_id"])
        time.sleep(0.1)
    raise CliError("the peer has no worker", Exit.FAILED)


def _generate(client: Client, model: str, prompt: str, max_tokens: int) -> None:
    """Submit, stream, and say how fast it was."""
    parameters = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "stream": True}
    body = {"task_type": "text_generation", "model_name": model, "parameters": parameters}
    submitted = time.monotonic()
    task_id = client.post("/tasks", body).data["task_id"]
    print(f"POST /tasks -> {task_id}\n\n> {prompt}\n", flush=True)
    first: float | None = None
    with client.stream(f"/tasks/{task_id}/stream") as events:
        for name, data in events:
            if name == "token":
                first = first or time.monotonic()
                print(printable(data["text"]), end="", flush=True)
            elif name == "restart":
                print(f"\n[begins anew: {printable(str(data.get('reason')))}]", flush=True)
            elif name in ("done", "error"):
                print("\n")
                _summary(data, (first or time.monotonic()) - submitted)
                return
    raise CliError("the stream broke off before the task's end", Exit.FAILED)


def _summary(task: dict[str, Any], first_s: float) -> None:
    if task.get("status") != "completed":
        error = task.get("error") or task
        raise CliError(f"the task {task.get('status')}: {error.get('message', error)}", Exit.FAILED)
    result = task["result"]
    tokens, seconds = result["tokens_generated"], result["processing_time_seconds"]
    rate = tokens / seconds if seconds else 0.0
    print(f"{tokens} tokens in {seconds:.2f} s: {rate:.1f} tokens/s; first text after {first_s:.2f} s")
