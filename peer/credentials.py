"""Secrets that systemd hands to the service: files in $CREDENTIALS_DIRECTORY, which only the service can read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from peer.errors import ConfigError
from peer.state import key as keys

VARIABLE: Final = "CREDENTIALS_DIRECTORY"
SCHEME: Final = "credential:"
ADMIN_KEY: Final = "admin.key"
JOIN_TOKEN: Final = "join.token"
BYTES_MAX: Final = 65_536
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def resolve(text: str, environ: Mapping[str, str]) -> str:
    """The path of `credential:NAME`; outside a service that has credentials the text itself.

    Raises ValueError if it is no name, or the service was given none of that name.
    """
    name = text.removeprefix(SCHEME)
    if not _NAME.fullmatch(name):
        raise ValueError(f"`{text}` names no credential; expected {SCHEME}NAME, like {SCHEME}tls.key")
    if not environ.get(VARIABLE):
        return text
    found = _find(name, environ)
    if found is None:
        raise ValueError(f"systemd gave no credential `{name}`; docs/service.md says where it is put")
    return str(found)


def read(name: str, environ: Mapping[str, str]) -> str | None:
    """The text of a credential without the white space around it; None if there is none. Raises ConfigError."""
    path = _find(name, environ)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            content = file.read(BYTES_MAX + 1)
        if len(content) > BYTES_MAX:
            raise ConfigError(f"{path} is longer than {BYTES_MAX} bytes")
        return content.decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the credential {path} cannot be read: {error}") from None


def admin_key(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """(key id, secret) of the API key that the owner gave as `admin.key`; None if none was. Raises ConfigError."""
    text = read(ADMIN_KEY, environ)
    if text is None:
        return None
    parts = keys.split(text)
    if parts is None:
        raise ConfigError(f"the credential {ADMIN_KEY} is no API key: expected blk_ID_SECRET")
    return parts


def _find(name: str, environ: Mapping[str, str]) -> Path | None:
    directory = environ.get(VARIABLE, "")
    path = Path(directory, name)
    return path if directory and path.is_file() else None
