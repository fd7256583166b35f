"""`bitinglip demo`: a peer of its own, one real model, one text over REST, and everything stopped again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import printable
from peer.cli.exits import CliError, Exit

if TYPE_CHECKING:
    from peer.cli.client import Client

MODEL = "smollm2-135m"
PROMPT = "Why do cats purr? Answer in two sentences."
READY_S_MAX = 60.0
STOP_S_MAX = 45.0
LOG_LINES = 25


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
    with _peer(directory, log, device, model) as process:
        _await_ready(process, directory, log)
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
                raise _with_log(error, log) from None
    print(f"the peer is stopped; all of it took {time.monotonic() - began:.1f} s")
    return Exit.OK


@contextmanager
def _peer(directory: Path, log: Path, device: str, model: str) -> Iterator[subprocess.Popen[bytes]]:
    """A peer process on a free port, which ends with the block."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "peer.json").unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BITINGLIP_")}
    command = [sys.executable, "-m", "peer", "up", "--data-dir", str(directory), "--api", "127.0.0.1:0"]
    command += ["--config", os.devnull, "--device", device, "--model", model]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_S_MAX)
        if code:
            raise _with_log(CliError(f"the peer ended with {code}", Exit.FAILED), log)
    except subprocess.TimeoutExpired:
        raise CliError(f"the peer did not stop within {STOP_S_MAX:.0f} s", Exit.FAILED) from None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever happened, nothing is left behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(process: subprocess.Popen[bytes], directory: Path, log: Path) -> None:
    import httpx

    from peer.cli.client import running

    end = time.monotonic() + READY_S_MAX
    while time.monotonic() < end:
        if process.poll() is not None:
            raise _with_log(CliError(f"the peer ended with {process.returncode}", Exit.FAILED), log)
        url, pid = running(directory)
        if url is not None and pid == process.pid:
            try:
                if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
        time.sleep(0.05)
    raise _with_log(CliError(f"the peer is not ready after {READY_S_MAX:.0f} s", Exit.FAILED), log)


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


def _with_log(error: CliError, log: Path) -> CliError:
    try:
        last = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        last = []
    message = "\n".join([error.message, *(f"  | {printable(line)}" for line in last)])
    return CliError(message, error.code, error.hint or f"all of its log: {log}")
