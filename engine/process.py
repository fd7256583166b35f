"""What every engine process does, stand-in or real: take its socket, die with its peer, greet, write logs.

Nothing here imports numpy or tinygrad: the stand-in engine must start in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from typing import NoReturn

import msgspec

from engine.protocol import (
    SOCKET_ENV,
    VERSION_MAX,
    VERSION_MIN,
    Configure,
    Frames,
    Hello,
    ProtocolError,
    Unusable,
    encode,
)

RECV_BYTES = 256 * 1024
EXIT_OK = 0
EXIT_USAGE = 64  # EX_USAGE: started without a socket
EXIT_UNUSABLE = 69  # EX_UNAVAILABLE: `Unusable` has been sent
EXIT_FAULT = 70  # EX_SOFTWARE: the device or the engine failed; the peer respawns it
EXIT_PROTOCOL = 76  # EX_PROTOCOL: the peer sent bytes that are not the protocol
_PR_SET_PDEATHSIG = 1


def log(event: str, **fields: object) -> None:
    """One JSON line on stderr. Callers never pass prompts or generated text."""
    record = {"t": round(time.time(), 3), "event": event, **fields}
    sys.stderr.write(msgspec.json.encode(record, enc_hook=str).decode() + "\n")
    sys.stderr.flush()


def exit_now(status: int) -> NoReturn:
    """Leave without running finalisers: a hung device must not keep the process alive."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent goes, so that no device stays occupied."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        log("no_parent_death_signal", errno=ctypes.get_errno())
    if os.getppid() != parent:  # it went in between
        exit_now(EXIT_OK)


def inherited_socket() -> socket.socket:
    """The stream socket whose descriptor is named in the environment. Exits with EX_USAGE without one."""
    number = os.environ.get(SOCKET_ENV, "")
    try:
        sock = socket.socket(fileno=int(number))
    except (ValueError, OSError) as error:
        sys.stderr.write(
            f"python -m engine is started by a peer; {SOCKET_ENV}={number!r} is no socket: {error}\n"
        )
        exit_now(EXIT_USAGE)
    sock.setblocking(True)
    os.set_inheritable(sock.fileno(), False)
    return sock


def greet(sock: socket.socket, product: str) -> tuple[Configure, Frames, list[object]]:
    """Exchange `Hello` and wait for `Configure`.

    Returns it with the frame parser and the messages that came in the same bytes. Exits at end of stream,
    on bytes that are not the protocol, and, after `Unusable`, when no version is shared.
    """
    sock.sendall(encode(Hello(product=product)))
    frames = Frames("engine")
    waiting: list[object] = []
    while True:
        while waiting:
            message = waiting.pop(0)
            if isinstance(message, Hello):
                _check_version(sock, message)
            elif isinstance(message, Configure):
                return message, frames, waiting
            else:
                log("protocol_error", error=f"{type(message).__name__} before Configure")
                exit_now(EXIT_PROTOCOL)
        data = sock.recv(RECV_BYTES)
        if not data:
            exit_now(EXIT_OK)
        try:
            waiting.extend(frames.feed(data))
        except ProtocolError as error:
            log("protocol_error", error=str(error))
            exit_now(EXIT_PROTOCOL)


def _check_version(sock: socket.socket, hello: Hello) -> None:
    if hello.version_max >= VERSION_MIN and hello.version_min <= VERSION_MAX:
        return
    text = (
        f"this engine speaks protocol versions {VERSION_MIN} to {VERSION_MAX}, the peer "
        f"{hello.version_min} to {hello.version_max}: install the same bitinglip for both"
    )
    refuse(sock, "protocol_version", text)


def refuse(sock: socket.socket, code: str, message: str) -> NoReturn:
    """Say `Unusable` and exit."""
    log("unusable", code=code, message=message)
    sock.sendall(encode(Unusable(code=code, message=message)))
    exit_now(EXIT_UNUSABLE)
