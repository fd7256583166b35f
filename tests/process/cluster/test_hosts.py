"""The faults themselves, on plain programs: each does what it says, ends when it is healed, and leaves nothing."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.process.cluster import faults
from tests.process.cluster.faults import Faults
from tests.process.cluster.hosts import Host, Network, network, unusable
from tests.process.peers import REPOSITORY, poll

pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(unusable()), reason=unusable())]

PORT = 9000
ECHO = """
import contextlib, socketserver

class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):  # its client has gone
            while data := self.request.recv(65536):
                self.request.sendall(data)

socketserver.ThreadingTCPServer(("0.0.0.0", 9000), Echo).serve_forever()
"""
ASK = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 9000), timeout=float(sys.argv[2])) as connection:
        connection.sendall(b"x" * 100_000)
        left = 100_000
        while left:
            left -= len(connection.recv(65536)) or 10**9
    print("answered")
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with network(tmp_path_factory.mktemp("net")) as made:
        for _ in range(3):
            host = made.add()
            host.popen([sys.executable, "-c", ECHO], host.folder / "echo.log")
        for host in made.hosts:
            poll(f"{host.name} answers", partial(from_here, host))
        yield made


@pytest.fixture
def bad(net: Network) -> Iterator[Faults]:
    made = Faults(net)
    yield made
    made.heal()


def from_here(host: Host) -> bool:
    try:
        socket.create_connection((host.address, PORT), timeout=1.0).close()
        return True
    except OSError:
        return False


def asks(host: Host, other: Host, within_s: float = 0.5) -> str:
    return host.run([sys.executable, "-c", ASK, other.address, str(within_s)]).strip()


def test_a_cut_is_between_two_and_ends(net: Network, bad: Faults) -> None:
    h1, h2, h3 = net.hosts
    bad.cut(h1, h2)
    assert asks(h1, h2) == "TimeoutError"
    assert asks(h2, h1) == "TimeoutError"
    assert asks(h1, h3) == asks(h3, h2) == "answered"
    bad.heal()
    assert asks(h1, h2) == "answered"


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_one_way_cut_lets_the_other_way_through(net: Network, bad: Faults, direction: str) -> None:
    h1, h2, _ = net.hosts
    bad.isolate(h1, direction="in" if direction == "in" else "out")
    listeners = {host.name: listening(host) for host in (h1, h2)}
    say(h1, h2)
    say(h2, h1)
    deaf, hears = (h1, h2) if direction == "in" else (h2, h1)
    assert listeners[hears.name].wait(5.0) == 0
    assert listeners[deaf.name].poll() is None
    listeners[deaf.name].kill()
    listeners[deaf.name].wait()
    assert from_here(h1)


def listening(host: Host) -> subprocess.Popen[bytes]:
    """One that ends with 0 when a datagram comes."""
    log = host.folder / "listening.log"
    log.unlink(missing_ok=True)
    code = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('0.0.0.0', 9001)); s.settimeout(10);"
        "print('up', flush=True); s.recv(9)"
    )
    process = host.popen([sys.executable, "-c", code], log)
    poll(f"{host.name} listens", lambda: "up" in log.read_text())
    return process


def say(host: Host, other: Host) -> None:
    code = f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ({other.address!r}, 9001))"
    host.run([sys.executable, "-c", code])


def test_loss_loses_about_so_many(net: Network, bad: Faults) -> None:
    h1, h2, _ = net.hosts
    bad.lose(h1, 20)
    log = h2.folder / "count.log"
    log.unlink(missing_ok=True)
    count = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('0.0.0.0', 9002));"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20); print('up', flush=True); s.settimeout(1); n = 0\n"
        "try:\n  while True: n += bool(s.recv(9))\nexcept TimeoutError: print(n, flush=True)"
    )
    counting = h2.popen([sys.executable, "-c", count], log)
    poll("it counts", lambda: "up" in log.read_text())
    send = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM)\n"
        f"for _ in range(1000): s.sendto(b'x', ({h2.address!r}, 9002))"
    )
    h1.run([sys.executable, "-c", send])
    assert counting.wait(10.0) == 0
    arrived = int(log.read_text().split()[-1])
    assert 700 < arrived < 890, arrived
    assert asks(h1, h2, 20.0) == "answered"  # TCP repeats what is lost


def test_a_blocked_port_is_blocked_between_hosts_only(net: Network, bad: Faults) -> None:
    h1, h2, _ = net.hosts
    bad.block(PORT)
    assert asks(h1, h2) == "TimeoutError"
    assert from_here(h2)


def test_a_delay_is_both_ways_and_whole(net: Network, bad: Faults) -> None:
    h1, h2, h3 = net.hosts
    bad.delay(h1, 0.2)
    began = time.monotonic()
    assert (
        asks(h2, h1, 5.0) == "answered"
    )  # 100 kB each way, the hand-shake and the data: two round trips and more
    took = time.monotonic() - began
    assert took > 0.8
    assert asks(h2, h3) == "answered"
    bad.heal()
    poll("it is quick again", lambda: asks(h2, h1) == "answered")


def test_what_is_frozen_stands_still_and_goes_on(net: Network, bad: Faults) -> None:
    h1, h2, _ = net.hosts
    with bad.frozen(h2.processes(), 0.3):
        assert asks(h1, h2) == "TimeoutError"
    assert asks(h1, h2) == "answered"


def test_a_full_disk_takes_nothing_and_others_are_not_full(net: Network, bad: Faults) -> None:
    h1, h2, _ = net.hosts
    for host in (h1, h2):
        host.run([sys.executable, "-c", f"open({str(host.disk / 'file')!r}, 'w').write('x' * 100_000)"])
    faults.fill_disk(h1)
    code = (
        "import os, sys\ntry: os.write(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), b'x' * 100_000); print(0)\n"
        "except OSError as error: print(error.errno)"
    )
    assert int(h1.run([sys.executable, "-c", code, str(h1.disk / "more")])) in (errno.ENOSPC, 0)
    assert (h1.seen(h1.disk) / "more").stat().st_size < 100_000
    assert int(h2.run([sys.executable, "-c", code, str(h2.disk / "more")])) == 0
    bad.heal()
    assert int(h1.run([sys.executable, "-c", code, str(h1.disk / "again")])) == 0
    assert not (h1.disk / "file").exists()  # the disk is that of the host alone


def test_all_of_a_host_ends_at_once(tmp_path: Path) -> None:
    with network(tmp_path) as made:
        host = made.add()
        started = [host.popen(["sleep", "100"], host.folder / "log") for _ in range(3)]
        poll("they run", lambda: sum(each.name() == "sleep" for each in host.processes()) == 3)
        host.kill_all()
        assert [each.returncode for each in started] == [-signal.SIGKILL] * 3
        assert host.processes() == []


def test_processes_are_known_by_what_they_are() -> None:
    assert faults.role_of(["/v/bin/python", "-m", "engine"]) == "engine"
    assert faults.role_of(["/v/bin/python", "/v/bin/bitinglip", "up", "--config", "x"]) == "peer"
    assert faults.role_of(["serf", "agent", "-config-file=x"]) == "serf"
    assert faults.role_of(["/usr/bin/etcd", "--name=h1"]) == "etcd"
    assert faults.role_of(["/v/bin/python", "-I", "-S", "child_start.py", "7", "etcd"]) is None
    assert faults.role_of([]) is None


def test_nothing_is_left_of_a_killed_test(tmp_path: Path) -> None:
    """Not even what a kill -9 of the test itself keeps it from taking down."""
    code = (
        "import os, pathlib, time\nfrom tests.process.cluster.hosts import Network\n"
        f"net = Network(pathlib.Path({str(tmp_path / 'net')!r}))\nhost = net.add()\n"
        "process = host.popen(['sleep', '100'], host.folder / 'log')\n"
        "print(net._own, net.switch.pid, host.pid, process.pid, flush=True)\ntime.sleep(100)"
    )
    test = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert test.stdout is not None
        with test.stdout:
            interface, *pids = test.stdout.readline().split()
        assert os.path.exists(f"/sys/class/net/{interface}")
    finally:
        test.kill()
        test.wait()
    poll("its processes have ended", lambda: not any(psutil.pid_exists(int(pid)) for pid in pids))
    poll("its network is gone", lambda: not os.path.exists(f"/sys/class/net/{interface}"))
