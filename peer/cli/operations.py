"""`bitinglip leadership transfer` and `bitinglip gossip-key rotate`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from peer.cli.common import client_options, emit, json_option, shown
from peer.cli.exits import Exit

if TYPE_CHECKING:
    from peer.cli.client import Client

ROTATION_S_MAX = 300.0  # each step waits for every member


@click.group()
def leadership() -> None:
    """Who leads."""


@leadership.command()
@json_option
@client_options
def transfer(client: Client, as_json: bool) -> int:
    """Let another peer lead, before the leader's host is worked on.

    A peer that is stopped does the same by itself.
    """
    began = time.monotonic()
    answer = client.post("/cluster/leadership/transfer", None)
    seconds = time.monotonic() - began
    found = answer.data
    if as_json:
        emit(answer)
    elif found["moved"]:
        print(f"{shown(found['leader'])} leads, after {seconds:.1f} s; before it {shown(found['previous'])}")
    else:
        print(f"no other peer took it: {shown(found['leader'])} leads again")
    return Exit.OK if found["moved"] else Exit.FAILED


@click.group()
def gossip_key() -> None:
    """The key that gossip is encrypted with."""


@gossip_key.command()
@click.option(
    "--force", is_flag=True, help="Also while hosts are away: they will not find back by themselves."
)
@json_option
@client_options
def rotate(client: Client, force: bool, as_json: bool) -> None:
    """Give all hosts a new key and void the old one, while gossip goes on.

    Interrupted anywhere it can be run again.
    """
    answer = client.post("/cluster/gossip-key", {"force": force}, wait_s=ROTATION_S_MAX)
    if as_json:
        emit(answer)
        return
    members, removed = answer.data["members"], answer.data["removed"]
    print(f"{members} members use a new key; {removed} older {'one is' if removed == 1 else 'ones are'} void")
