"""Real peers as processes: started, watched, killed, and always cleaned up.

Every wait has a bound and fails when it is exceeded; nothing sleeps and hopes. Processes are ended by their pid.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
BITINGLIP = Path(sys.executable).with_name("bitinglip")
START_S_MAX = 20.0  # on a busy host; what the product promises is asserted where it is tested
STOP_S_MAX = 15.0
LOG_CHARS_SHOWN = 8_000
POLL_S = 0.01

T = TypeVar("T")


def poll(what: str, condition: Callable[[], T], within_s: float = 10.0, every_s: float = POLL_S) -> T:
    """The first true value of `condition`. Fails, naming `what`, when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s; last: {value!r}"
        time.sleep(every_s)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def alive(pid: int) -> bool:
    """Whether it runs: a zombie that nobody has collected does not."""
    try:
        return str(psutil.Process(pid).status()) != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_engine(pid: int) -> bool:
    """Whether the pid is a running engine, not a process that got its number later."""
    try:
        return alive(pid) and psutil.Process(pid).cmdline()[-2:] == ["-m", "engine"]
    except psutil.NoSuchProcess:
        return False


class Peer:
    """One data folder and, from `start` to its end, one process. `life` counts the starts."""

    def __init__(
        self,
        home: Path,
        config: Mapping[str, Any] | None = None,
        *,
        device: str = "fake",
        arguments: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        port: int = 0,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.data = home / "data"
        self.config_file = home / "bitinglip.yaml"
        self.device = device
        self.arguments = arguments
        self.environment = dict(environment or {})
        self.port = port
        self.url = ""
        self.life = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._client: httpx.Client | None = None
        self.configure(config or {})

    # ------------------------------------------------------------ life and death

    def configure(self, config: Mapping[str, Any]) -> None:
        """Write the file that the next start, or a SIGHUP, reads. JSON is YAML."""
        self.config_file.write_text(yaml.safe_dump(json.loads(json.dumps(config))))

    def spawn(self) -> subprocess.Popen[bytes]:
        assert self.process is None or self.process.poll() is not None, "it runs already"
        self.life += 1
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BITINGLIP_")}
        command = [str(BITINGLIP), "up", "--data-dir", str(self.data), "--api", f"127.0.0.1:{self.port}"]
        command += ["--device", self.device, "--config", str(self.config_file), *self.arguments]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | self.environment,
                cwd=self.home,
            )
        return self.process

    def start(self, within_s: float = START_S_MAX) -> float:
        """Start it and wait until it serves; returns after how many seconds."""
        began = time.monotonic()
        self.spawn()
        self.await_ready(within_s)
        return time.monotonic() - began

    def await_ready(self, within_s: float = START_S_MAX) -> None:
        def serves() -> bool:
            self.check()
            return self._find_url() and self._is_ready()

        poll(f"peer {self.home.name} serves", serves, within_s)
        self._close_client()

    def _find_url(self) -> bool:
        try:
            found = json.loads((self.data / "peer.json").read_text())
        except (FileNotFoundError, ValueError):
            return False
        if found["pid"] != self.pid:
            return False  # left by an earlier life that was killed
        self.url = found["url"]
        return True

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def check(self) -> None:
        """Fails if it has ended."""
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"the peer ended with {code}: {self.log()[-2000:]}"

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait_exit(self, within_s: float = STOP_S_MAX) -> int:
        """Its exit code."""
        process = self.process
        assert process is not None
        try:
            return process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the peer does not end within {within_s:g} s") from None

    def stop(self, within_s: float = STOP_S_MAX) -> int:
        """As an operator stops it: it drains. Its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_exit(within_s)

    def kill(self) -> list[int]:
        """SIGKILL. Returns the engines that it had, which have to die with it."""
        engines = self.engine_pids()
        self.signal(signal.SIGKILL)
        self.wait_exit()
        return engines

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            engines = self.engine_pids()
            self.process.kill()
            self.process.wait(STOP_S_MAX)
            for pid in engines:
                if is_engine(pid):
                    os.kill(pid, signal.SIGKILL)
        self._close_client()

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    # ------------------------------------------------------------ what it leaves to see

    @property
    def log_file(self) -> Path:
        return self.home / f"log.{self.life}"

    def log(self) -> str:
        """Everything that this life has written."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def log_lines(self, event: str) -> list[dict[str, Any]]:
        """This life's log records of one event."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == event]

    def orphans(self) -> list[int]:
        """Engines of earlier lives that still run."""
        logs = [self.home / f"log.{life}" for life in range(1, self.life)]
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
        started = [json.loads(line) for line in lines if line.startswith("{") and "engine_started" in line]
        ours = self.engine_pids()
        return [line["pid"] for line in started if is_engine(line["pid"]) and line["pid"] not in ours]

    def engine_pids(self) -> list[int]:
        """The engines that run now, by the peer's children and by its log."""
        named = {int(line["pid"]) for line in self.log_lines("engine_started")}
        with suppress(psutil.NoSuchProcess):
            named |= {child.pid for child in psutil.Process(self.pid).children(recursive=True)}
        return sorted(pid for pid in named if is_engine(pid))

    def rss_bytes(self) -> int:
        return int(psutil.Process(self.pid).memory_info().rss)

    # ------------------------------------------------------------ its API

    @property
    def key(self) -> str:
        """The admin key, which has no rate limit."""
        return (self.data / "admin.key").read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def client(self) -> httpx.Client:
        if self._client is None:
            self._client = httpx.Client(base_url=self.url, headers=self.headers, timeout=30.0)
        return self._client

    def get(self, path: str) -> Any:
        answer = self.client.get(path)
        assert answer.status_code == 200, f"GET {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def post(self, path: str, body: Mapping[str, Any] | None = None, status: int = 200) -> Any:
        answer = self.client.post(path, json=body) if body is not None else self.client.post(path)
        assert answer.status_code == status, f"POST {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def submit(self, prompt: str, *, wait_s: float = 0.0, **fields: Any) -> Any:
        """A task's view as submitted, or after `wait_s`."""
        body = submission(prompt, **fields)
        return self.post(f"/tasks?wait={wait_s:g}" if wait_s else "/tasks", body, 201)

    def task(self, task_id: str, wait_s: float = 0.0) -> Any:
        return self.get(f"/tasks/{task_id}?wait={wait_s:g}" if wait_s else f"/tasks/{task_id}")

    def await_task(self, task_id: str, *statuses: str, within_s: float = 10.0) -> Any:
        """The task once it has one of these statuses."""
        return poll(
            f"{task_id} becomes {' or '.join(statuses)}",
            lambda: found if (found := self.task(task_id))["status"] in statuses else None,
            within_s,
        )

    def workers(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.get("/workers")["workers"]
        return listed

    def await_workers(self, status: str = "online", count: int = 1, within_s: float = 20.0) -> list[str]:
        """The ids of the workers, once `count` of them have this status."""

        def ids() -> list[str] | None:
            found = [worker["worker_id"] for worker in self.workers() if worker["status"] == status]
            return found if len(found) >= count else None

        found = poll(f"{count} workers are {status}", ids, within_s)
        assert found is not None
        return found


def submission(prompt: str, *, model: str = "echo", max_tokens: int = 8_000, **fields: Any) -> dict[str, Any]:
    return {
        "task_type": "text_generation",
        "model_name": model,
        "parameters": {"prompt": prompt, "max_tokens": max_tokens},
    } | fields


class Peers:
    """Makes peers below one folder and ends them all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[Peer] = []

    def make(self, config: Mapping[str, Any] | None = None, **options: Any) -> Peer:
        """A peer that has not been started."""
        peer = Peer(self._folder / f"peer{len(self._made)}", config, **options)
        self._made.append(peer)
        return peer

    def start(self, config: Mapping[str, Any] | None = None, **options: Any) -> Peer:
        """A peer that serves."""
        peer = self.make(config, **options)
        peer.start()
        return peer

    def clean_up(self) -> None:
        """End everything and print the logs, which pytest shows when the test has failed."""
        for peer in self._made:
            peer.clean_up()
            for life in range(max(1, peer.life - 1), peer.life + 1):
                text = (peer.home / f"log.{life}").read_text(errors="replace")
                print(f"---- log of {peer.home.name}, life {life}\n{text[-LOG_CHARS_SHOWN:]}")


@contextmanager
def running_peers(folder: Path) -> Iterator[Peers]:
    """Peers for the body of the `with`; none is left after it."""
    made = Peers(folder)
    try:
        yield made
    finally:
        made.clean_up()
