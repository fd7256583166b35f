"""Real etcd members for tests: started, killed, stopped, and always gone at the end. Every wait has a bound."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h11
import pytest

from peer.adapters.processes.child import launched
from peer.adapters.stores.etcd_member import SOCKET, MemberConfig, member_command

START_S_MAX = 20.0  # on a busy host

needs_etcd = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="etcd is not installed (apt: etcd-server)"
)


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0)) as taken:
        return int(taken.getsockname()[1])


def poll(what: str, condition: Callable[[], bool], within_s: float = START_S_MAX) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(0.01)


class EtcdProcess:
    """One member's data folder and, from `start` on, its process."""

    def __init__(self, config: MemberConfig) -> None:
        self.config = config
        self.address = f"unix:{config.folder / SOCKET}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.config.folder.mkdir(parents=True, exist_ok=True)
        (self.config.folder / SOCKET).unlink(missing_ok=True)
        with (self.config.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                launched(member_command(self.config)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.config.folder,
                env={"PATH": os.environ["PATH"]},
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, also if it is stopped or has ended."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)

    def ask(self, path: str) -> bytes | None:
        """The answer to an empty request, None if there is none soon. Without the code under test."""
        target = os.open(self.config.folder, os.O_PATH)
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1.0)
                client.connect(f"/proc/self/fd/{target}/{SOCKET}")
                http = h11.Connection(h11.CLIENT)
                headers = [("Host", "etcd"), ("Content-Length", "2"), ("Connection", "close")]
                request = h11.Request(method="POST", target=path, headers=headers)
                client.sendall(b"".join(http.send(each) or b"" for each in (request, h11.Data(data=b"{}"))))
                body = b""
                while not isinstance(event := http.next_event(), h11.EndOfMessage):
                    if event is h11.NEED_DATA:
                        http.receive_data(client.recv(65536))
                    elif isinstance(event, h11.Data):
                        body += event.data
                return body
        except (OSError, h11.RemoteProtocolError):
            return None
        finally:
            os.close(target)

    def status(self) -> dict[str, object]:
        """Of this member, {} while it does not answer."""
        try:
            found = json.loads(self.ask("/v3/maintenance/status") or b"{}")
        except ValueError:
            return {}
        return found if "header" in found else {}

    def log(self) -> str:
        return (self.config.folder / "log").read_text(errors="replace")


class EtcdCluster:
    """Members that start together."""

    def __init__(self, folder: Path, size: int, *, heartbeat_ms: int = 100, election_ms: int = 1_000) -> None:
        urls = {f"m{number}": f"http://127.0.0.1:{free_port()}" for number in range(size)}
        self.members = [
            EtcdProcess(
                MemberConfig(
                    name=name,
                    folder=folder / name,
                    peer_url=url,
                    initial_cluster=urls,
                    token=folder.name,
                    heartbeat_ms=heartbeat_ms,
                    election_ms=election_ms,
                )
            )
            for name, url in urls.items()
        ]

    def start(self) -> None:
        for member in self.members:
            member.start()
        self.await_leader()

    def await_leader(self) -> EtcdProcess:
        """Until all members that run know the same leader; it."""
        poll("the members agree on a leader", lambda: self.leader() is not None)
        leader = self.leader()
        assert leader is not None
        return leader

    def leader(self) -> EtcdProcess | None:
        running = [each for each in self.members if each.process is not None and each.process.poll() is None]
        found = [(each, each.status()) for each in running]
        leaders = {status.get("leader") for _, status in found}
        if len(leaders) != 1 or None in leaders:
            return None
        (leader,) = leaders
        for each, status in found:
            header = status["header"]
            assert isinstance(header, dict)
            if header["member_id"] == leader:
                return each
        return None

    def kill(self) -> None:
        for member in self.members:
            member.kill()


@contextmanager
def running_cluster(
    folder: Path, size: int, *, heartbeat_ms: int = 100, election_ms: int = 1_000
) -> Iterator[EtcdCluster]:
    cluster = EtcdCluster(folder, size, heartbeat_ms=heartbeat_ms, election_ms=election_ms)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()
