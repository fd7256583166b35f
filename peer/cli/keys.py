"""`bitinglip key`: through the peer or, on its host, in its store while it does not run."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import emit_object, json_option, pairs, peer_options, say, shown, table
from peer.cli.exits import BY_STATUS, CliError, Exit, foreseen
from peer.errors import BitinglipError, ConfigError
from peer.state import key as keys
from peer.state.key import SCOPES, ApiKey

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from peer.cli.client import Client

MINUTE_SHARE = 10  # a minute's burst is a tenth of the hour's limit, as in the default, at least BURST_MIN
BURST_MIN = 100


@click.group()
def key() -> None:
    """Make, list and revoke API keys.

    Works on the peer's host also while the peer does not run, and through any peer with an admin key.
    """


@key.command()
@click.option("--owner", required=True, metavar="NAME")
@click.option(
    "--scope", "scopes", required=True, multiple=True, type=click.Choice(SCOPES), help="May be repeated."
)
@click.option("--rate-limit", metavar="none|N/hour", help="Requests; the default is the configured limit.")
@click.option("--expires", metavar="T", help="After a time (30d, 12h) or at one (2027-01-31, ISO-8601).")
@json_option
@peer_options
def create(
    owner: str,
    scopes: tuple[str, ...],
    rate_limit: str | None,
    expires: str | None,
    as_json: bool,
    **where: str | None,
) -> None:
    """Make a key. It is shown this once."""
    limits_ = None if rate_limit is None else parse_rate(rate_limit)
    expires_at = None if expires is None else parse_expiry(expires, time.time())
    directory = offline_directory(where, make=where["data_dir"] is not None)
    if directory is None:
        made = _create_online(where, owner, scopes, limits_, expires_at)
    else:
        made = _create_offline(directory, owner, scopes, limits_, expires_at)
    if as_json:
        emit_object(made)
        return
    pairs(_described(made))
    print(f"\n{made['key']}")
    say("this is shown once; send it as `Authorization: Bearer KEY`")


@key.command(name="list")
@json_option
@peer_options
def list_(as_json: bool, **where: str | None) -> None:
    """List keys, without their secrets."""
    directory = offline_directory(where)
    if directory is None:
        with _client(where) as client:
            found = client.get("/keys").data
    else:
        from peer.offline_keys import list_keys

        listed = [_view(item) for item in _offline(list_keys, directory)]
        found = {"keys": listed, "total": len(listed)}
    if as_json:
        emit_object(found)
        return
    rows = (
        (
            item["key_id"],
            item["owner"],
            item["scopes"],
            _rate(item),
            item["created_at"],
            item["expires_at"],
            item["revoked_at"],
        )
        for item in found["keys"]
    )
    table(("KEY", "OWNER", "SCOPES", "LIMIT", "CREATED", "EXPIRES", "REVOKED"), rows, empty="no keys")


@key.command()
@click.argument("key_id")
@json_option
@peer_options
def revoke(key_id: str, as_json: bool, **where: str | None) -> None:
    """Revoke a key; it is refused from then on. KEY_ID may be an owner's name where that is unique."""
    directory = offline_directory(where)
    if directory is None:
        from peer.cli.tasks import path_part

        with _client(where) as client:
            gone = client.request("DELETE", f"/keys/{path_part(key_id)}").data
    else:
        from peer.offline_keys import revoke_key

        gone = _view(_offline(revoke_key, directory, key_id))
    if as_json:
        emit_object(gone)
    else:
        print(f"{shown(gone['key_id'])} of {shown(gone['owner'])} is revoked")


def offline_directory(where: dict[str, str | None], *, make: bool = False) -> Path | None:
    """The data directory to open, or None where a peer is to be asked.

    With `make` it may be one that does not exist yet: keys can be made before the peer's first start.
    """
    from peer.cli.client import find_data_dir

    if where["url"] or (os.environ.get("BITINGLIP_URL") and not where["data_dir"]):
        return None
    directory = find_data_dir(where["data_dir"], os.environ)
    try:
        descriptor = os.open(directory / "lock", os.O_RDONLY)
    except FileNotFoundError:
        if not make and not directory.is_dir():
            raise CliError(
                f"there is no peer's data in {directory}",
                Exit.NOT_FOUND,
                "name it with --data-dir DIR, or a peer with --url URL",
            ) from None
        return directory
    except OSError as error:
        hint = "run as the peer's user, or name a peer with --url URL"
        raise CliError(f"{directory}: {error.strerror}", Exit.UNAUTHORIZED, hint) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    finally:
        os.close(descriptor)
    return directory


def _client(where: dict[str, str | None]) -> Client:
    from peer.cli.client import Client, find

    return Client(find(where["url"], where["key_file"], where["data_dir"], os.environ))


def _create_online(
    where: dict[str, str | None],
    owner: str,
    scopes: tuple[str, ...],
    limits_: tuple[int | None, int | None] | None,
    expires_at: float | None,
) -> dict[str, Any]:
    body: dict[str, Any] = {"owner": owner, "scopes": list(dict.fromkeys(scopes))}
    if limits_ is not None:
        body["requests_per_hour"], body["requests_per_minute"] = limits_
    if expires_at is not None:
        body["expires_at"] = datetime.fromtimestamp(expires_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with _client(where) as client:
        made: dict[str, Any] = client.post("/keys", body).data
    return made


def _create_offline(
    directory: Path,
    owner: str,
    scopes: tuple[str, ...],
    limits_: tuple[int | None, int | None] | None,
    expires_at: float | None,
) -> dict[str, Any]:
    from peer import limits
    from peer.offline_keys import create_key

    if not 1 <= len(owner) <= limits.NAME_CHARS_MAX or not owner.isprintable():
        raise CliError(f"--owner: expected 1 to {limits.NAME_CHARS_MAX} printable characters", Exit.USAGE)
    rates: tuple[keys.RateLimit, keys.RateLimit] = limits_ or ("default", "default")
    secret = secrets.token_hex(32)
    made = ApiKey(
        key_id=secrets.token_hex(6),
        owner=owner,
        scopes=tuple(dict.fromkeys(scopes)),
        secret_sha256=keys.digest(secret),
        created_at=time.time(),
        expires_at=expires_at,
        requests_per_hour=rates[0],
        requests_per_minute=rates[1],
    )
    _offline(create_key, directory, made)
    return {**_view(made), "key": keys.token(made.key_id, secret)}


def _offline(work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    import trio

    try:
        return trio.run(work, *arguments)
    except (BitinglipError, ConfigError, OSError, ExceptionGroup) as error:
        known = foreseen(error, (BitinglipError, ConfigError, OSError))
        if isinstance(known, BitinglipError):
            raise CliError(known.message, BY_STATUS.get(known.status, Exit.FAILED)) from None
        if isinstance(known, ConfigError):
            raise CliError(str(known), Exit.USAGE) from None
        if isinstance(known, OSError):
            raise CliError(f"{known.filename or arguments[0]}: {known.strerror}", Exit.FAILED) from None
        raise


def _view(item: ApiKey) -> dict[str, Any]:
    """As the API shows a key; default limits are the documented ones, for no configuration is read here."""
    import msgspec

    from api.keys import shown
    from peer.config import Limits

    per_hour, per_minute = Limits().of(item)
    view: dict[str, Any] = msgspec.to_builtins(shown(item, per_hour, per_minute))
    return view


def _described(item: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("key", item["key_id"]),
        ("owner", item["owner"]),
        ("scopes", item["scopes"]),
        ("limit", _rate(item)),
        ("expires", item["expires_at"] or "never"),
    ]


def _rate(item: dict[str, Any]) -> str:
    rates = ((item["requests_per_hour"], "hour"), (item["requests_per_minute"], "min"))
    return ", ".join(f"{number}/{per}" for number, per in rates if number is not None) or "none"


def parse_rate(text: str) -> tuple[int | None, int | None]:
    """(per hour, per minute) of "none" or "N/hour". Raises CliError."""
    if text == "none":
        return None, None
    found = re.fullmatch(r"([0-9]{1,9})/(hour|h)", text)
    if found is None or int(found[1]) < 1:
        raise CliError(f"--rate-limit: `{text}` is not none or N/hour, like 5000/hour", Exit.USAGE)
    per_hour = int(found[1])
    return per_hour, max(per_hour // MINUTE_SHARE, min(per_hour, BURST_MIN))


def parse_expiry(text: str, now: float) -> float:
    """When a key ends, in seconds since 1970. Raises CliError."""
    from peer.units import parse_seconds

    try:
        expires_at = now + parse_seconds(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise CliError(
                f"--expires: `{text}` is not a time like 30d, 2027-01-31 or 2027-01-31T12:00:00Z", Exit.USAGE
            ) from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        expires_at = moment.timestamp()
    if not now < expires_at < now + 100 * 366 * 86_400:
        raise CliError(f"--expires: `{text}` is past, or too far away", Exit.USAGE)
    return expires_at
