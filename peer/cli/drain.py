"""`bitinglip drain`: empty a host before it is maintained, and take it back into use."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import client_options, emit, json_option, say, shown
from peer.cli.exits import CliError, Exit

if TYPE_CHECKING:
    from peer.cli.client import Client

POLL_S = 1.0


@click.command()
@click.argument("host")
@click.option("--undo", is_flag=True, help="Take the host back into use.")
@click.option("--wait/--no-wait", default=True, help="Until the host holds nothing; the default.")
@click.option(
    "--timeout", "timeout_s", metavar="T", default="30m", show_default=True, help="Wait no longer: 90s, 2h."
)
@json_option
@client_options
def drain(client: Client, host: str, undo: bool, wait: bool, timeout_s: str, as_json: bool) -> int:
    """Move models and tasks away from HOST; nothing is loaded there until --undo.

    A model is loaded elsewhere before it leaves, and what runs comes to its end.
    """
    from peer.cli.tasks import path_part
    from peer.units import parse_seconds

    try:
        limit_s = parse_seconds(timeout_s)
    except ValueError as error:
        raise CliError(f"--timeout: {error}", Exit.USAGE) from None
    path = f"/cluster/hosts/{path_part(host)}/drain"
    answer = client.request("DELETE" if undo else "POST", path)
    peer_id = answer.data["peer_id"]
    if undo or not wait:
        if as_json:
            emit(answer)
        else:
            print(f"{shown(peer_id)} is {'back in use' if undo else 'being emptied'}")
        return Exit.OK
    return _follow(client, peer_id, limit_s, as_json)


def _follow(client: Client, peer_id: str, limit_s: float, as_json: bool) -> int:
    end = time.monotonic() + limit_s
    told = ""
    while True:
        answer = client.get("/cluster/hosts")
        hosts: list[dict[str, Any]] = answer.data["hosts"]
        found = next((each for each in hosts if each["peer_id"] == peer_id), None)
        if found is None or found["status"] == "revoked":
            raise CliError(f"{shown(peer_id)} is no host of the cluster any more", Exit.FAILED)
        left = f"{found['models']} models, {found['tasks']} tasks"
        if not found["models"] and not found["tasks"]:
            if as_json:
                emit(answer)
            else:
                print(f"{shown(peer_id)} holds nothing any more")
                say(f"take it back into use: bitinglip drain {shown(peer_id)} --undo")
            return Exit.OK
        if not found["draining"]:
            raise CliError(f"{shown(peer_id)} was taken back into use", Exit.FAILED)
        if time.monotonic() > end:
            hint = "what does not fit elsewhere stays: `bitinglip unload` it, or make room"
            raise CliError(f"{shown(peer_id)} still holds {left}", Exit.FAILED, hint)
        if left != told and not as_json:
            say(f"{shown(peer_id)} holds {left}")
            told = left
        time.sleep(POLL_S)
