"""What the peer tells systemd that runs it: ready, reloading, stopping, alive. Without systemd nothing is said.

The protocol is sd_notify(3): datagrams of NAME=VALUE lines to the socket that $NOTIFY_SOCKET names.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import Final

import structlog
import trio

STOP_MARGIN_S: Final = 30.0  # after a drain: engines, serf, etcd and the store come to their end
SEND_S_MAX: Final = 1.0  # the manager reads at once or is itself in trouble
STATUS_CHARS_MAX: Final = 500

log = structlog.get_logger("service")


class ServiceManager:
    """`address` is a path or, with a leading "@", an abstract name; "" is nobody. `watchdog_s` None: no watchdog."""

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        self._address = address
        self._watchdog_s = watchdog_s
        self._failed = False

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> ServiceManager:
        """Takes the variables out: what this process starts is not the service's main process."""
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog_usec = environment.pop("WATCHDOG_USEC", "")
        watchdog_pid = environment.pop("WATCHDOG_PID", "")
        if address and address[0] not in "/@":
            log.warning(
                "service_manager_unknown", address=address, note="a path or an abstract name is understood"
            )
            address = ""
        ours = watchdog_pid in ("", str(os.getpid()))
        watched = bool(address) and ours and watchdog_usec.isdecimal() and int(watchdog_usec) > 0
        return cls(address, int(watchdog_usec) / 1e6 if watched else None)

    def ready(self, status: str = "serving") -> None:
        """The start is over; also ends `reloading`."""
        self._say("READY=1", f"MAINPID={os.getpid()}", _status(status))

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._say(_status(text))

    def reloading(self) -> None:
        """Say it before the configuration is read again, and `ready` after, whether it was taken or refused."""
        self._say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", _status("reloading"))

    def stopping(self, drain_s: float) -> None:
        """The stop may take so long and the margin after it; then the manager kills."""
        extend = f"EXTEND_TIMEOUT_USEC={int((drain_s + STOP_MARGIN_S) * 1e6)}"
        self._say("STOPPING=1", extend, _status(f"draining for at most {drain_s:g} s"))

    async def watchdog(self, stuck: Callable[[], str]) -> None:
        """Give signs of life, twice as often as needed, while `stuck` returns "" and not what stands still.

        Runs until cancelled; returns at once where nobody asks for signs.
        """
        if self._watchdog_s is None:
            return
        while True:
            why = stuck()
            if why:
                log.error(
                    "no_sign_of_life",
                    why=why,
                    note=f"after {self._watchdog_s:g} s without one it is restarted",
                )
                self.status(f"stuck: {why}")
            else:
                self._say("WATCHDOG=1")
            await trio.sleep(self._watchdog_s / 2)

    def _say(self, *lines: str) -> None:
        """One datagram. A manager that does not listen is logged, once; the peer serves without it."""
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(SEND_S_MAX)
                sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            if not self._failed:
                log.warning("service_manager_silent", address=self._address, why=str(error))
            self._failed = True
        else:
            self._failed = False


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())[:STATUS_CHARS_MAX]
