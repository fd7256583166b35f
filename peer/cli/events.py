"""`bitinglip events`: the cluster's events as they happen."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from peer.cli.common import client_options, emit_object, json_option, shown
from peer.cli.exits import CliError, Exit
from peer.state.event import EVENT_NAMES

if TYPE_CHECKING:
    from peer.cli.client import Client

FINAL = {  # close codes after which another try would not help
    1008: (Exit.UNAUTHORIZED, "is the key revoked or expired? See `bitinglip key list`"),
    4410: (Exit.NOT_FOUND, "those events are no longer kept: follow from now on, without --since"),
}
RETRIES_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # pauses before each new try when the connection is lost


@click.command()
@click.option("--events", "names", metavar="A,B", help="Only these events.")
@click.option("--since", type=click.IntRange(min=0), metavar="ID", help="First those after this one.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many.")
@json_option
@client_options
def events(client: Client, names: str | None, since: int | None, count: int | None, as_json: bool) -> int:
    """Follow the cluster's events until interrupted; a lost connection is taken up where it broke."""
    _check(names)
    left = count
    tries = 0
    while True:
        try:
            for event in _follow(client, names, since):
                tries, since = 0, event["id"]
                _print(event, as_json)
                left = None if left is None else left - 1
                if left == 0:
                    return Exit.OK
            reason = "the peer closed the connection"
        except ConnectionError as error:
            reason = str(error)
        if tries == len(RETRIES_S):
            raise CliError(f"{client.target.url}: {reason}", Exit.UNREACHABLE)
        time.sleep(RETRIES_S[tries])
        tries += 1


def _check(names: str | None) -> None:
    from peer.settings import nearest

    for name in (names or "").split(","):
        if name and name not in EVENT_NAMES:
            raise CliError(
                f"there is no event `{name}`{nearest(name, EVENT_NAMES)}",
                Exit.USAGE,
                f"events: {', '.join(EVENT_NAMES)}",
            )


def _follow(client: Client, names: str | None, since: int | None) -> Any:
    """Events of one connection. Raises ConnectionError when it is lost, CliError when it is refused."""
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
    from websockets.sync.client import connect

    from peer.cli.client import local

    target = client.target
    query = {name: value for name, value in (("events", names), ("since", since)) if value is not None}
    url = "ws" + target.url.removeprefix("http") + "/ws" + (f"?{urlencode(query)}" if query else "")
    headers = {"Authorization": f"Bearer {target.key}"}
    try:
        with connect(
            url, additional_headers=headers, open_timeout=10, proxy=None if local(target.url) else True
        ) as socket:
            for message in socket:
                yield json.loads(message)
    except InvalidStatus as error:
        raise _refused(error.response.status_code, bytes(error.response.body or b"")) from None
    except ConnectionClosed as error:
        closed = error.rcvd
        if closed is not None and closed.code in FINAL:
            code, hint = FINAL[closed.code]
            raise CliError(f"the peer closed the connection: {shown(closed.reason)}", code, hint) from None
        raise ConnectionError("the connection was lost") from None
    except ConnectionRefusedError:
        raise ConnectionError("no peer answers") from None
    except (OSError, InvalidHandshake) as error:
        raise ConnectionError(str(error)) from None


def _refused(status: int, body: bytes) -> CliError:
    import httpx

    from peer.cli.client import refusal

    return refusal(httpx.Response(status, content=body, request=httpx.Request("GET", "http://peer/ws")))


def _print(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_object(event)
        return
    data = "  ".join(
        f"{name}={shown(value)}"
        for name, value in event["data"].items()
        if name.removesuffix("_seconds").removesuffix("_bytes") not in event["data"].keys() - {name}
    )
    print(f"{event['id']}  {shown(event['timestamp'])}  {shown(event['event'])}  {data}", flush=True)
