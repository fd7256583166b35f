"""What goes wrong: cut and lossy and slow networks, killed and frozen processes, full disks. `heal` ends all of it.

Rules drop what comes *in* at a host, as a network does: the sender notices nothing. The test itself still reaches every
host, so that clients can talk to one that is cut off from the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

import psutil

from tests.process.cluster.hosts import Host, Network
from tests.process.peers import poll

Role = Literal["peer", "engine", "serf", "etcd"]

CABLE: Final = Path(__file__).with_name("cable.py")
BALLAST: Final = "ballast"
BLOCK_BYTES: Final = 64 * 1024
KILL_S_MAX: Final = 5.0


class Faults:
    """Of one network."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._ruled: set[str] = set()
        self._cables: dict[str, subprocess.Popen[bytes]] = {}
        self._frozen: list[psutil.Process] = []

    # ---------------------------------------------------------------- the network

    def cut(self, one: Host, other: Host, *, one_way: bool = False) -> None:
        """Nothing of `one` reaches `other` any more; unless `one_way` nor the other way round."""
        self._drop(other, f"ip saddr {one.address}")
        if not one_way:
            self._drop(one, f"ip saddr {other.address}")

    def isolate(self, host: Host, *, direction: Literal["both", "in", "out"] = "both") -> None:
        """Cut a host off from all others: what it sends ("out"), what is sent to it ("in"), or both."""
        for other in self._others(host):
            if direction in ("both", "out"):
                self._drop(other, f"ip saddr {host.address}")
            if direction in ("both", "in"):
                self._drop(host, f"ip saddr {other.address}")

    def lose(self, host: Host, percent: int) -> None:
        """So much of what goes between this host and the others is lost, by chance."""
        for other in self._others(host):
            self._drop(other, f"ip saddr {host.address} numgen random mod 100 < {percent}")
            self._drop(host, f"ip saddr {other.address} numgen random mod 100 < {percent}")

    def block(self, port: int) -> None:
        """Nothing comes in from other hosts for this TCP port, anywhere, nor from it."""
        for host in self._network.hosts:
            for other in self._others(host):
                self._drop(host, f"ip saddr {other.address} tcp dport {port}")
                self._drop(host, f"ip saddr {other.address} tcp sport {port}")

    def delay(self, host: Host, seconds: float) -> None:
        """All that goes to and comes from this host arrives so much later; also what its clients say."""
        if host.name in self._cables:
            return
        switch, far, near = self._network.switch, f"{host.name}far", f"{host.name}near"
        switch.run(["ip", "link", "add", near, "type", "veth", "peer", "name", far])
        switch.run(["ip", "link", "set", near, "up"])
        self._network.unplug(host.name)
        self._network.plug(far)
        log = self._network.folder / f"cable-{host.name}.log"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-I", "-S", str(CABLE), str(seconds), host.name, near]
        self._cables[host.name] = switch.popen(command, log)
        poll(f"the cable of {host.name} carries", lambda: "carrying" in log.read_text())

    def _straighten(self, host: Host) -> None:
        cable = self._cables.pop(host.name, None)
        if cable is None:
            return
        cable.kill()
        cable.wait(KILL_S_MAX)
        self._network.switch.run(["ip", "link", "del", f"{host.name}near"])
        self._network.plug(host.name)

    def _others(self, host: Host) -> list[Host]:
        return [other for other in self._network.hosts if other is not host]

    def _drop(self, host: Host, what: str) -> None:
        rules = f"add rule inet faults in {what} drop\n"
        if host.name not in self._ruled:
            chain = "add chain inet faults in { type filter hook input priority 0; policy accept; }\n"
            rules = f"add table inet faults\n{chain}{rules}"
            self._ruled.add(host.name)
        host.run(["nft", "-f", "-"], stdin=rules)

    # ---------------------------------------------------------------- processes

    def freeze(self, processes: Iterable[psutil.Process]) -> None:
        """They stand still until `thaw`."""
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                self._frozen.append(process)

    def thaw(self) -> None:
        for process in self._frozen:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen.clear()

    @contextmanager
    def frozen(self, processes: Iterable[psutil.Process], seconds: float) -> Iterator[None]:
        """For so long at least, and for the body."""
        until = time.monotonic() + seconds
        self.freeze(processes)
        try:
            yield
            time.sleep(max(0.0, until - time.monotonic()))
        finally:
            self.thaw()

    # ---------------------------------------------------------------- everything again as it was

    def heal(self) -> None:
        """Networks, frozen processes and disks. What was killed is started by whoever watches over it."""
        self.thaw()
        for host in self._network.hosts:
            if host.name in self._ruled:
                host.run(["nft", "flush", "chain", "inet", "faults", "in"])
            self._straighten(host)
            free_disk(host)


def having(host: Host, role: Role) -> list[psutil.Process]:
    """The processes of this role on a host."""
    found = []
    for process in host.processes():
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if role_of(process.cmdline()) == role:
                found.append(process)
    return found


def role_of(command: list[str]) -> Role | None:
    """What the process with this command line is to a peer."""
    if command[-2:] == ["-m", "engine"]:
        return "engine"
    names = [os.path.basename(part) for part in command[:3]]
    if names[:2] == ["serf", "agent"]:
        return "serf"
    if names[:1] == ["etcd"]:
        return "etcd"
    return "peer" if names[1:] == ["bitinglip", "up"] else None


def kill(processes: Iterable[psutil.Process]) -> list[int]:
    """SIGKILL, all before the first is waited for. Returns their pids."""
    doomed = list(processes)
    for process in doomed:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    return [process.pid for process in doomed]


def fill_disk(host: Host, left_bytes: int = 0) -> None:
    """Take what is free on a host's disk, but `left_bytes`."""
    disk = host.seen(host.disk)
    with open(disk / BALLAST, "ab") as file:
        while (free := _free_bytes(disk) - left_bytes) > 0:
            try:
                os.posix_fallocate(file.fileno(), file.tell(), min(free, max(BLOCK_BYTES, free // 2)))
            except OSError:
                break  # somebody was quicker
            file.seek(0, os.SEEK_END)


def free_disk(host: Host) -> None:
    (host.seen(host.disk) / BALLAST).unlink(missing_ok=True)


def _free_bytes(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize
