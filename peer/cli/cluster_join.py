"""`bitinglip init`, `token`, `join`, `host`: how hosts become a cluster, who is in it, and how one is put out."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import client_options, emit, emit_object, json_option, pairs, say, shown, table
from peer.cli.exits import CliError, Exit, guarded
from peer.errors import ConfigError

if TYPE_CHECKING:
    from peer.cli.client import Client

NAME_CHARS_MAX = 128

data_dir_option = click.option(
    "--data-dir", metavar="DIR", help="The peer's folder; else $BITINGLIP_DATA_DIR, else the configured one."
)
advertise_option = click.option(
    "--advertise",
    "addresses",
    multiple=True,
    metavar="HOST",
    help="A name or address that other hosts reach this one at, if not its own. May be repeated.",
)


@click.command()
@click.option("--cluster", metavar="NAME", help="Make a cluster of this name; other hosts can join it.")
@click.option("--single", is_flag=True, help="This host stays alone.")
@advertise_option
@data_dir_option
@json_option
def init(
    cluster: str | None, single: bool, addresses: tuple[str, ...], data_dir: str | None, as_json: bool
) -> None:
    """Prepare this host: as the first of a cluster, or alone.

    --cluster makes the cluster's own certificate authority and this host's certificate, in the data directory.
    """
    if (cluster is None) != single:
        raise CliError("give either --cluster NAME or --single", Exit.USAGE)
    if cluster is not None and (
        not cluster.strip() or len(cluster) > NAME_CHARS_MAX or not cluster.isprintable()
    ):
        raise CliError(f"--cluster: expected 1 to {NAME_CHARS_MAX} printable characters", Exit.USAGE)
    _check_addresses(addresses)
    directory = _directory(data_dir)
    peer_id, own = guarded(directory, lambda: _init(directory, cluster, addresses))
    if own and not addresses and _only_here(own):
        say(f"warning: no way to the outside was found, so other hosts would be sent to {own[0]}")
        say(
            f"  before the first start: rm -r {directory / 'cluster'}, then init again with --advertise ADDRESS"
        )
    if as_json:
        emit_object({"peer_id": peer_id, "cluster": cluster, "data_dir": str(directory)})
        return
    if cluster is None:
        print(f"{peer_id} is ready in {directory}")
    else:
        print(f"{peer_id} is the first host of {shown(cluster)}, in {directory}")
        say("keep this folder private: it holds the key that lets hosts in")
    say("start it: bitinglip up" + (f" --data-dir {directory}" if data_dir else ""))
    if cluster is not None:
        say("then, for each further host: bitinglip token")


def _init(directory: Path, cluster: str | None, addresses: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The peer's name, and what its certificate is for; that is empty without a cluster."""
    import trio

    from peer import identity
    from peer.adapters.links.cluster_files import ClusterFiles
    from peer.adapters.links.own_addresses import own_address, own_names

    identity.make_folder(directory)
    with identity.exclusive(directory):
        peer_id = identity.peer_id(directory)
        if cluster is None:
            return peer_id, ()
        own = addresses or (own_address(), *trio.run(own_names))
        ClusterFiles(directory).found(cluster, peer_id, own, time.time())
    return peer_id, own


@click.command()
@click.option(
    "--expires", metavar="T", default="30m", show_default=True, help="How long it may be used: 10m, 2h."
)
@click.option("--no-voter", is_flag=True, help="The host that joins with it never leads.")
@json_option
@client_options
def token(client: Client, expires: str, no_voter: bool, as_json: bool) -> None:
    """Make a one-time token that lets one host join. It is shown this once."""
    answer = client.post("/cluster/tokens", {"ttl_s": parse_ttl(expires), "voter": not no_voter})
    if as_json:
        emit(answer)
        return
    print(answer.data["token"])
    say(f"it lets one host in until {shown(answer.data['expires_at'])}; on that host:")
    say("  bitinglip join HOST --token TOKEN   (HOST is the address of any host of the cluster)")


@click.command()
@click.argument("host")
@click.option(
    "--token",
    "token_text",
    metavar="T",
    help="From `bitinglip token`, `-` for standard input; else $BITINGLIP_TOKEN, else the credential join.token.",
)
@advertise_option
@data_dir_option
@json_option
def join(
    host: str, token_text: str | None, addresses: tuple[str, ...], data_dir: str | None, as_json: bool
) -> None:
    """Join the cluster of HOST (HOST:PORT where it has another link port than the default).

    The token says which cluster it is for: its secret is sent to a host of that cluster only.
    """
    text = token_text or os.environ.get("BITINGLIP_TOKEN", "") or _token_credential()
    if text == "-":
        text = sys.stdin.readline()
    if not text:
        raise CliError(
            "no token", Exit.USAGE, "`bitinglip token` on a host of the cluster makes one; give --token T"
        )
    _check_addresses(addresses)
    address = parse_host(host)
    directory = _directory(data_dir)
    joined = guarded(directory, lambda: _join(directory, address, text, addresses))
    if as_json:
        emit_object(joined)
        return
    pairs([("cluster", joined["cluster"]), ("peer", joined["peer_id"]), ("may lead", joined["voter"])])
    say("start it: bitinglip up" + (f" --data-dir {directory}" if data_dir else ""))


def _token_credential() -> str:
    """Where systemd runs this command with the token as a credential; else "". Raises CliError."""
    from peer import credentials

    try:
        return credentials.read(credentials.JOIN_TOKEN, os.environ) or ""
    except ConfigError as error:
        raise CliError(str(error), Exit.USAGE) from None


def _join(
    directory: Path, address: tuple[str, int], token_text: str, addresses: tuple[str, ...]
) -> dict[str, Any]:
    import trio

    from peer import identity
    from peer.adapters.links import enrolment
    from peer.adapters.links.cluster_files import ClusterFiles
    from peer.state.enrol import Enrolled

    identity.make_folder(directory)
    with identity.exclusive(directory):
        files = ClusterFiles(directory)
        peer_id, key = identity.peer_id(directory), files.pending_key()

        async def ask() -> Enrolled:
            return await enrolment.join(
                *address, token_text, peer_id=peer_id, key_pem=key, now=time.time(), addresses=addresses
            )

        belonging = files.joined(key, trio.run(ask))
    return {
        "cluster": belonging.cluster,
        "peer_id": belonging.peer_id,
        "voter": belonging.voter,
        "seeds": list(belonging.seeds),
    }


@click.group()
def host() -> None:
    """List the cluster's hosts, or put one out."""


@host.command(name="list")
@json_option
@client_options
def list_(client: Client, as_json: bool) -> None:
    """List hosts, and those that are revoked."""
    answer = client.get("/cluster/hosts")
    if as_json:
        emit(answer)
        return
    rows = [
        (
            each["peer_id"],
            "draining" if each["draining"] else each["status"],
            each["voter"],
            f"{each['models']}/{each['tasks']}",
            each["addresses"],
            each["certificate_expires_at"] or each["revoked_at"],
        )
        for each in answer.data["hosts"]
    ]
    columns = ("HOST", "STATUS", "MAY LEAD", ">MODELS/TASKS", "ADDRESSES", "EXPIRES OR REVOKED")
    table(columns, rows, empty="this host is in no cluster")


@host.command()
@click.argument("name")
@json_option
@client_options
def revoke(client: Client, name: str, as_json: bool) -> None:
    """Revoke the host NAME at once: its connections end, and it cannot come back under this name."""
    from peer.cli.tasks import path_part

    answer = client.request("DELETE", f"/cluster/hosts/{path_part(name)}")
    if as_json:
        emit(answer)
    else:
        print(f"{shown(answer.data['peer_id'])} is revoked")
        say("it still knows the key of gossip: once it is down, run `bitinglip gossip-key rotate`")


def parse_ttl(text: str) -> float:
    """Seconds of "30m". Raises CliError."""
    from peer.state.enrol import TOKEN_S_MAX, TOKEN_S_MIN
    from peer.units import format_seconds, parse_seconds

    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise CliError(f"--expires: {error}", Exit.USAGE) from None
    if not TOKEN_S_MIN <= seconds <= TOKEN_S_MAX:
        low, high = format_seconds(TOKEN_S_MIN), format_seconds(TOKEN_S_MAX)
        raise CliError(f"--expires: `{text}` is out of range: {low} to {high}", Exit.USAGE)
    return seconds


def parse_host(text: str) -> tuple[str, int]:
    """(host, port) of HOST or HOST:PORT; IPv6 addresses with a port go in brackets. Raises CliError."""
    import ipaddress

    from peer.adapters.links.tls_network import PORT_DEFAULT
    from peer.settings import split_bind

    with suppress(ValueError):
        return str(ipaddress.ip_address(text.strip("[]"))), PORT_DEFAULT
    try:
        return split_bind(text if ":" in text else f"{text}:{PORT_DEFAULT}")
    except ValueError as error:
        raise CliError(f"HOST: {error}", Exit.USAGE) from None


def _only_here(own: tuple[str, ...]) -> bool:
    """Whether others are sent to a loopback address: the first one is what they are told."""
    import ipaddress

    with suppress(ValueError):
        return ipaddress.ip_address(own[0]).is_loopback
    return False


def _check_addresses(addresses: tuple[str, ...]) -> None:
    from peer.state.enrol import ADDRESSES_MAX, is_address

    if len(addresses) > ADDRESSES_MAX:
        raise CliError(f"--advertise: at most {ADDRESSES_MAX} addresses", Exit.USAGE)
    for address in addresses:
        if not is_address(address):
            raise CliError(
                f"--advertise: `{address}` is not a host's name or IP address (without a port)", Exit.USAGE
            )


def _directory(data_dir: str | None) -> Path:
    from peer.cli.client import find_data_dir

    return find_data_dir(data_dir, os.environ)
