"""`bitinglip embed`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import client_options, emit, json_option
from peer.cli.exits import CliError, Exit
from peer.cli.tasks import PRIORITIES, finished, outcome, say_failure, submission

if TYPE_CHECKING:
    from peer.cli.client import Client


@click.command()
@click.argument("model")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option(
    "--normalize/--no-normalize", default=None, help="Vectors of length 1. [default: the model's own]"
)
@click.option("--truncate", is_flag=True, help="Cut texts that are longer than the model takes.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="1 is the highest, 10 the lowest.")
@click.option("--timeout", type=float, metavar="SECONDS", help="From submission to the end.")
@click.option("--idempotency-key", metavar="TEXT", help="The same key again gives the same task.")
@json_option
@client_options
def embed(
    client: Client,
    model: str,
    texts: tuple[str, ...],
    normalize: bool | None,
    truncate: bool,
    priority: str | None,
    timeout: float | None,
    idempotency_key: str | None,
    as_json: bool,
) -> int:
    """Give each TEXT's vector by MODEL, one line of JSON for each (TEXT - reads lines from standard input)."""
    parameters: dict[str, Any] = {"input": _lines() if texts == ("-",) else list(texts)}
    if normalize is not None:
        parameters["normalize"] = normalize
    if truncate:
        parameters["truncate"] = True
    body, headers = submission("embedding", model, parameters, priority, timeout, idempotency_key)
    answer = finished(client, client.post("/tasks", body, headers=headers))
    if as_json:
        emit(answer)
    elif answer.data["status"] == "completed":
        for vector in answer.data["result"]["embeddings"]:
            print(json.dumps(vector))
    else:
        say_failure(answer.data)
    return outcome(answer.data)


def _lines() -> list[str]:
    found = [line for line in sys.stdin.read().splitlines() if line]
    if not found:
        raise CliError("there is no text on standard input", Exit.USAGE)
    return found
