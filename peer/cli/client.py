"""A peer as the commands see it: where it is, which key opens it, and its answers and errors."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from peer.cli.exits import BY_STATUS, CliError, Exit
from peer.errors import ConfigError
from peer.version import VERSION

URL_DEFAULT = "http://127.0.0.1:8000"
TIMEOUT_S = 40.0  # the peer itself gives up on a command after 30 s
KEY_BYTES_MAX = 4_096


class Target(NamedTuple):
    """Where a peer is. `data_dir` is where its key may be read, "" where that must not be tried."""

    url: str
    key: str
    data_dir: Path
    pid: int = 0  # of the peer that wrote peer.json


class Answer(NamedTuple):
    body: bytes
    data: Any


def find_data_dir(named: str | None, environ: Mapping[str, str]) -> Path:
    """--data-dir, else $BITINGLIP_DATA_DIR, else that of the default configuration."""
    from peer import settings

    chosen = named or environ.get("BITINGLIP_DATA_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    file = settings.find_file(None, environ)
    if file is None:
        return settings.default_data_dir(environ)
    try:
        return Path(settings.load(file=file, environ=environ).data_dir)
    except ConfigError as error:
        raise CliError(str(error), Exit.USAGE) from None


def find(url: str | None, key_file: str | None, data_dir: str | None, environ: Mapping[str, str]) -> Target:
    """The peer to talk to and the key. Raises CliError when there is no key.

    A data directory's admin key goes to its own peer only: to the address found beside it, to this host, or
    where the directory is named together with the address.
    """
    directory = find_data_dir(data_dir, environ)
    given = url or environ.get("BITINGLIP_URL")
    found, pid = (given, 0) if given else running(directory)
    address = _checked(found or URL_DEFAULT)
    own = not given or data_dir is not None or local(address)
    return Target(address, _key(key_file, directory if own else None, environ), directory, pid)


def local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise CliError(f"`{url}` is not an address like {URL_DEFAULT}", Exit.USAGE)
    return url.rstrip("/")


def running(directory: Path) -> tuple[str | None, int]:
    """What the peer of this data directory wrote of itself."""
    try:
        content = json.loads((directory / "peer.json").read_text())
        return str(content["url"]), int(content.get("pid", 0))
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0


def _key(key_file: str | None, directory: Path | None, environ: Mapping[str, str]) -> str:
    if key_file is None and environ.get("BITINGLIP_KEY"):
        return environ["BITINGLIP_KEY"].strip()
    if key_file is None and directory is None:
        raise CliError(
            "no API key for this peer", Exit.UNAUTHORIZED, "give --key-file FILE or set BITINGLIP_KEY"
        )
    path = Path(key_file).expanduser() if key_file is not None else (directory or Path()) / "admin.key"
    try:
        with open(path, "rb") as stream:
            key = stream.read(KEY_BYTES_MAX).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise CliError(
            f"no API key: {path}: {reason}",
            Exit.UNAUTHORIZED,
            "run as the peer's user, name its --data-dir DIR, give --key-file FILE or set BITINGLIP_KEY",
        ) from None
    if not key:
        raise CliError(f"{path} is empty", Exit.UNAUTHORIZED)
    return key


class Client:
    """Requests to one peer. Every failure becomes a CliError."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._http = httpx.Client(
            base_url=target.url,
            headers={"Authorization": f"Bearer {target.key}", "User-Agent": f"bitinglip/{VERSION}"},
            timeout=httpx.Timeout(TIMEOUT_S, connect=5.0),
            verify=httpx.create_ssl_context(),  # SSL_CERT_FILE counts also where no proxy does
            trust_env=not local(target.url),  # a proxy has no business between a host and itself
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, params: Mapping[str, Any] | None = None, *, wait_s: float = 0.0) -> Answer:
        return self.request("GET", path, params=params, wait_s=wait_s)

    def post(self, path: str, body: Any, **more: Any) -> Answer:
        return self.request("POST", path, body=body, **more)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
    ) -> Answer:
        """`wait_s` is how long the peer may take beyond the usual."""
        query = {name: value for name, value in (params or {}).items() if value is not None}
        with self._translated():
            response = self._http.request(
                method,
                path,
                json=body,
                params=query,
                headers=dict(headers or {}),
                timeout=httpx.Timeout(TIMEOUT_S + wait_s, connect=5.0),
            )
        if response.is_error:
            raise refusal(response)
        return Answer(response.content, _parsed(response))

    @contextmanager
    def stream(self, path: str) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
        """Server-sent events of a path as (name, data)."""
        with (
            self._translated(),
            self._http.stream("GET", path, headers={"Accept": "text/event-stream"}) as response,
        ):
            if response.is_error:
                response.read()
                raise refusal(response)
            yield sent_events(response.iter_bytes())

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Failures of the connection as CliError."""
        url = self.target.url
        try:
            yield
        except httpx.ConnectError as error:
            if "certificate" in str(error).lower():
                raise CliError(
                    f"{url}: {error}", Exit.UNREACHABLE, "name the authority's certificate in SSL_CERT_FILE"
                ) from None
            raise self._nobody() from None
        except httpx.ConnectTimeout:
            raise self._nobody() from None
        except httpx.TimeoutException:
            raise CliError(f"the peer at {url} did not answer in time", Exit.UNREACHABLE) from None
        except httpx.HTTPError as error:
            text = str(error) or type(error).__name__
            raise CliError(f"the connection to {url} failed: {text}", Exit.UNREACHABLE) from None

    def _nobody(self) -> CliError:
        target = self.target
        hint = "start a peer with `bitinglip up`, or name another with --url URL or --data-dir DIR"
        if target.pid and not _alive(target.pid):
            hint = f"the peer of {target.data_dir} has ended: start it with `bitinglip up`"
        return CliError(f"no peer answers at {target.url}", Exit.UNREACHABLE, hint)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _parsed(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise CliError(
            f"{response.url} did not answer with JSON", Exit.FAILED, "is that address a bitinglip peer?"
        ) from None


def refusal(response: httpx.Response) -> CliError:
    """The API's error as ours."""
    try:
        error = response.json()["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):
        return CliError(
            f"{response.url} answered {response.status_code}",
            BY_STATUS.get(response.status_code, Exit.FAILED),
            "is that address a bitinglip peer?",
        )
    hint = {
        401: "is the key right, not revoked, not expired, and has it the scope? See `bitinglip key list`",
        500: f"the peer's log has more under request {error.get('request_id', '')}",
    }.get(response.status_code, "")
    wait = response.headers.get("retry-after", "")
    if response.status_code in (429, 503) and wait:
        hint = f"try again in {wait} s"
    return CliError(message, BY_STATUS.get(response.status_code, Exit.FAILED), hint)


def sent_events(chunks: Iterator[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parse server-sent events. Lines end at line feeds only: JSON may hold Unicode's other line ends."""
    rest = b""
    name, data = "message", b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            field, _, value = line.rstrip(b"\r").partition(b":")
            value = value.removeprefix(b" ")
            if field == b"event":
                name = value.decode()
            elif field == b"data":
                data = data + b"\n" + value if data else value
            elif not line.strip():
                if data:
                    yield name, json.loads(data)
                name, data = "message", b""
