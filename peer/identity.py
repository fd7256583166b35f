"""A peer's folder: its lock, its identity, its admin key. Made on the first start, private to the user (0700)."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peer.errors import ConfigError, Conflict

LOCK_FILE = "lock"
STORE_FILE = "store.sqlite"
ADMIN_KEY_FILE = "admin.key"
PEER_FILE = "peer.json"  # where the running peer serves, for the command line
_IDENTITY_FILE = "identity.json"


def make_folder(path: Path) -> None:
    """Create the folder as 0700, or make sure that it is ours alone. Raises ConfigError, OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to another user; a peer's folder must be its own")
    if found.st_mode & 0o077:
        path.chmod(0o700)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises Conflict while another process holds it."""
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"another peer runs on {path}; stop it first, or choose another --data-dir",
                code="data_dir_in_use",
            ) from None
        yield
    finally:
        os.close(descriptor)


def write_private(path: Path, content: str) -> None:
    """Replace the file's content at once, mode 0600, and make it durable."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def peer_id(path: Path) -> str:
    """This peer's name, the same for ever: the host's name and a few random digits."""
    file = path / _IDENTITY_FILE
    if file.exists():
        try:
            known = json.loads(file.read_text())["peer_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is damaged ({error}); restore it, or remove it to be a new peer"
            ) from None
        return str(known)
    host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:40] or "host"
    made = f"{host}-{secrets.token_hex(3)}"
    write_private(file, json.dumps({"peer_id": made}) + "\n")
    return made


def read_admin_token(path: Path) -> str | None:
    """The admin key that an earlier start wrote; None if there is none."""
    file = path / ADMIN_KEY_FILE
    return file.read_text().strip() if file.exists() else None
