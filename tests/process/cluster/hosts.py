"""Hosts of a test: a network namespace and a mount namespace each, joined by a switch in a third one.

    root namespace (clients) ── switch ──┬── h1  10.x.y.1
      10.x.y.254                         ├── h2  10.x.y.2
                                         └── ...

Nothing here has a name outside: each namespace is held by one sleeping process which dies with the test, and what is in
it (interfaces, rules, mounts) goes with its last process. So nothing is left either when the test is killed itself:
all processes are started such that the kernel kills them when the thread that started them ends. Start them in the
main thread.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

import psutil

from peer.adapters.processes.child import launched
from tests.process.peers import poll

RULES: Final = """
add table inet tried
add chain inet tried in { type filter hook input priority 0; }
add rule inet tried in numgen random mod 100 < 20 drop
"""
PROGRAMS: Final = ("ip", "nft", "nsenter", "unshare", "mount")
RUN_S_MAX: Final = 20.0
END_S_MAX: Final = 10.0
DISK_BYTES: Final = 1024 * 1024 * 1024  # etcd lays out 128 MiB at its start, and its log of 200 faults takes 400
PASSED_ON: Final = ("PATH", "HOME", "LANG", "TZ", "TMPDIR")
SUBNETS: Final = 128 * 256
_serial = itertools.count()


@cache
def unusable() -> str:
    """Why there can be no hosts here; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (.ci/setup test installs them)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "nft", "-f", "-"],
        input=RULES,
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
    )
    return f"this kernel lets nobody cut networks: {tried.stderr.strip()}" if tried.returncode else ""


def environment() -> dict[str, str]:
    """What programs in hosts see: nothing of this test's own."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


class Namespace:
    """A network namespace, with `mounts` a mount namespace too, and the processes that were started in it."""

    def __init__(self, name: str, *, mounts: bool = False) -> None:
        self.name = name
        kinds = ["--net", *(["--mount", "--propagation=private"] if mounts else [])]
        self._kinds = ["--net", *(["--mount"] if mounts else [])]
        self._holder = subprocess.Popen(
            launched(["unshare", *kinds, "sleep", "infinity"]),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment(),
        )
        self._started: list[subprocess.Popen[bytes]] = []
        try:
            poll(f"the namespace of {name} is there", self._entered)
        except BaseException:
            self.close()
            raise

    def _entered(self) -> bool:
        assert self._holder.poll() is None, f"the namespace of {self.name} cannot be made"
        with suppress(psutil.Error):
            return str(psutil.Process(self.pid).name()) == "sleep"
        return False

    @property
    def pid(self) -> int:
        """Of the process that holds it."""
        return self._holder.pid

    def command(self, command: Sequence[str]) -> list[str]:
        """The same, in here; it keeps its pid."""
        return ["nsenter", f"--target={self.pid}", *self._kinds, "--", *command]

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: str = "",
        check: bool = True,
        within_s: float = RUN_S_MAX,
        more_environment: Mapping[str, str] | None = None,
    ) -> str:
        """Its standard output. Fails, unless told not to `check`, when it does not end with 0."""
        done = subprocess.run(
            self.command(command),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=within_s,
            env=environment() | dict(more_environment or {}),
        )
        problem = f"{self.name}: {' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}"
        assert not check or done.returncode == 0, problem
        return done.stdout

    def popen(
        self, command: Sequence[str], log: Path, more_environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start it in a session of its own; its output goes to the end of `log`. Call this in the main thread."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                launched(self.command(command)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment() | dict(more_environment or {}),
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """All that run in here, but the holder."""
        with suppress(OSError):
            mine = os.readlink(f"/proc/{self.pid}/ns/net")
            return [each for each in psutil.process_iter() if each.pid != self.pid and _network(each) == mine]
        return []

    def kill_all(self) -> None:
        """As when the power fails: everything in here ends at once."""
        doomed = self.processes()
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.suspend()  # so that nobody sees another one die
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._collect()
        poll(f"all processes of {self.name} have ended", lambda: not self.processes(), END_S_MAX)

    def close(self) -> None:
        try:
            self.kill_all()
        finally:
            self._holder.kill()
            self._holder.wait(END_S_MAX)

    def _collect(self) -> None:
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S_MAX)
        self._started.clear()


def _network(process: psutil.Process) -> str:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/net")
    except OSError:
        return ""


class Host(Namespace):
    """One machine: an address, a small disk of its own at `disk`, and logs that outlive it in `folder`.

    `disk_bytes` 0: its disk is a folder of the test's own, where an fsync takes as long as it does.
    """

    def __init__(self, name: str, address: str, folder: Path, disk_bytes: int = DISK_BYTES) -> None:
        folder.mkdir(parents=True)
        self.address = address
        self.folder = folder
        self.disk = folder / "disk"
        self.disk.mkdir()
        super().__init__(name, mounts=True)
        try:
            if disk_bytes:
                options = f"size={disk_bytes},mode=0700"
                self.run(["mount", "-t", "tmpfs", "-o", options, "disk", str(self.disk)])
            self.run(["ip", "link", "set", "lo", "up"])
        except BaseException:
            self.close()
            raise

    def seen(self, path: Path) -> Path:
        """A path of this host's as the test sees it."""
        return Path(f"/proc/{self.pid}/root") / path.relative_to("/")


class Network:
    """Hosts and the switch between them. The test itself is at `address`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        number = next(_serial)
        subnet = (os.getpid() + number * 7_919) % SUBNETS
        self._prefix = f"10.{128 + subnet // 256}.{subnet % 256}"
        self.address = f"{self._prefix}.254"
        self.hosts: list[Host] = []
        self._own = f"blip{os.getpid()}{chr(ord('a') + number % 26)}"
        self.switch = Namespace("switch")
        try:
            self.switch.run(
                ["ip", "-batch", "-"], stdin="link set lo up\nlink add sw type bridge\nlink set sw up\n"
            )
            self._ip(f"link add {self._own} type veth peer name test netns {self.switch.pid}")
            self._ip(f"addr add {self.address}/24 dev {self._own}", f"link set {self._own} up")
            self.plug("test")
        except BaseException:
            self.close()
            raise

    def _ip(self, *lines: str) -> None:
        done = subprocess.run(
            ["ip", "-batch", "-"],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            timeout=RUN_S_MAX,
        )
        assert done.returncode == 0, f"ip: {lines}: {done.stderr}"

    def add(self, disk_bytes: int = DISK_BYTES) -> Host:
        """One more host, with nothing on it."""
        number = len(self.hosts) + 1
        name = f"h{number}"
        host = Host(name, f"{self._prefix}.{number}", self.folder / name, disk_bytes)
        self.hosts.append(host)
        self._ip(
            f"link add {self._own}t type veth peer name eth0 netns {host.pid}",
            f"link set {self._own}t netns {self.switch.pid} name {name}",
        )
        host.run(
            ["ip", "-batch", "-"],
            stdin=f"addr add {host.address}/24 dev eth0\nlink set eth0 up\n",
        )
        self.plug(name)
        return host

    def plug(self, port: str) -> None:
        """Join a port of the switch to it: "h1" is the cable to host h1."""
        self.switch.run(["ip", "link", "set", port, "master", "sw", "up"])

    def unplug(self, port: str) -> None:
        """The port stays up, for whoever reads from it by itself."""
        self.switch.run(["ip", "link", "set", port, "nomaster"])

    def close(self) -> None:
        for namespace in (*self.hosts, self.switch):
            with suppress(AssertionError, subprocess.TimeoutExpired):
                namespace.close()
        subprocess.run(["ip", "link", "del", self._own], capture_output=True, timeout=RUN_S_MAX)


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network for the body of the `with`; nothing of it is left after."""
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()
