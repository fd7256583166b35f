"""What systemd is told: over a real datagram socket, of both kinds of address."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import trio

from peer.adapters.processes.service_manager import ServiceManager
from peer.health import LATE_S, stuck


class Listener:
    """The manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self.socket.settimeout(5)

    def hear(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())

    def nothing_more(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(4096)
        except BlockingIOError:
            return True
        return False


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    listening = Listener(str(tmp_path / "n") if request.param == "path" else f"@bitinglip-test-{os.getpid()}")
    yield listening
    listening.socket.close()


def test_a_life(listener: Listener) -> None:
    manager = ServiceManager.from_environment({"NOTIFY_SOCKET": listener.address})
    manager.ready("serving at\nhere")
    assert listener.hear() == {"READY": "1", "MAINPID": str(os.getpid()), "STATUS": "serving at here"}
    manager.status("two tasks")
    assert listener.hear() == {"STATUS": "two tasks"}
    manager.reloading()
    heard = listener.hear()
    assert heard["RELOADING"] == "1"
    assert int(heard["MONOTONIC_USEC"]) > 0
    manager.stopping(90.0)
    heard = listener.hear()
    assert heard["STOPPING"] == "1"
    assert int(heard["EXTEND_TIMEOUT_USEC"]) > 90_000_000  # the drain, and then the children


def test_what_it_starts_is_not_the_service() -> None:
    environment = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "1", "PATH": "/bin"}
    ServiceManager.from_environment(environment)
    assert environment == {"PATH": "/bin"}


async def test_without_systemd_nothing_is_said() -> None:
    manager = ServiceManager.from_environment({})
    manager.ready()
    manager.stopping(1.0)
    with trio.fail_after(5):
        await manager.watchdog(lambda: "never asked")  # returns at once


@pytest.mark.parametrize(
    "environment", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}]
)
async def test_a_watchdog_that_is_not_for_this_process(environment: dict[str, str], tmp_path: Path) -> None:
    listener = Listener(str(tmp_path / "n"))
    manager = ServiceManager.from_environment(
        {"NOTIFY_SOCKET": listener.address, "WATCHDOG_USEC": "20000"} | environment
    )
    with trio.fail_after(5):
        await manager.watchdog(lambda: "")
    assert listener.nothing_more()
    listener.socket.close()


async def test_signs_of_life_stop_while_something_is_stuck(
    listener: Listener, autojump_clock: trio.abc.Clock
) -> None:
    manager = ServiceManager.from_environment(
        {"NOTIFY_SOCKET": listener.address, "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}
    )
    why = ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.watchdog, lambda: why)
        await trio.sleep(31)
        assert [listener.hear(), listener.hear()] == [{"WATCHDOG": "1"}] * 2  # at 0 and at 30 s
        why = "the leader"
        await trio.sleep(30)
        assert listener.hear() == {"STATUS": "stuck: the leader"}
        why = ""
        await trio.sleep(30)
        assert listener.hear() == {"WATCHDOG": "1"}
        nursery.cancel_scope.cancel()
    assert listener.nothing_more()


def test_a_manager_that_is_gone_is_logged_once(tmp_path: Path) -> None:
    manager = ServiceManager(str(tmp_path / "nobody"))
    with structlog.testing.capture_logs() as lines:
        manager.ready()
        manager.status("still here")
    assert [line["event"] for line in lines] == ["service_manager_silent"]


@pytest.mark.parametrize("address", ["vsock:2:1234", "relative"])
def test_addresses_of_other_kinds_are_left_alone(address: str) -> None:
    with structlog.testing.capture_logs() as lines:
        ServiceManager.from_environment({"NOTIFY_SOCKET": address}).ready()
    assert [line["event"] for line in lines] == ["service_manager_unknown"]


def test_which_loop_is_stuck() -> None:
    now = 1_000.0
    assert stuck(now, leader=None, executor=now - LATE_S) == ""
    assert stuck(now, leader=now - LATE_S - 1, executor=now) == "the leader has not come round for 31 s"
