"""A real server on a free port of the loopback, in a thread of its own with its own trio."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import structlog
import trio

from api.app import ApiApp, create_app
from api.serve import serve
from peer.config import Api, Config, Limits
from tests.api.fake_cluster import FakeCluster
from tests.api.fake_parts import FakeClock, token


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Refusals are what these tests provoke; their log lines would bury the failures."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


def eventually(condition: Callable[[], Any], within_s: float = 10.0) -> Any:
    """The first true value of `condition`, asked often."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return value


class RunningServer:
    """Handle of a server in a thread. `do` runs a function inside its trio loop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clock = FakeClock()
        self.cluster = FakeCluster(self.clock)
        self.address: tuple[str, int] = ("", 0)
        self.app: ApiApp
        self._token: trio.lowlevel.TrioToken
        self._shutdown: trio.Event
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()
        assert self._ready.wait(20)
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        try:
            trio.run(self._run)
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._shutdown = trio.Event()
        self.cluster.changed = trio.Event()
        self.app = create_app(self.cluster, self.config, self.clock)

        async def run(task_status: trio.TaskStatus[tuple[str, int]]) -> None:
            await serve(self.app, self.config, shutdown=self._shutdown, task_status=task_status)

        async with trio.open_nursery() as nursery:
            self.address = await nursery.start(run)
            self._ready.set()

    @property
    def url(self) -> str:
        scheme = "https" if self.config.api.tls else "http"
        return f"{scheme}://{self.address[0]}:{self.address[1]}"

    def do(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return trio.from_thread.run_sync(lambda: work(*args, **kwargs), trio_token=self._token)

    def stop(self, within_s: float = 10.0) -> None:
        if self.thread.is_alive():
            trio.from_thread.run_sync(self._shutdown.set, trio_token=self._token)
        self.thread.join(within_s)
        assert not self.thread.is_alive(), "the server does not stop"
        if self._error is not None:
            raise self._error


@pytest.fixture
def start_server() -> Iterator[Callable[..., RunningServer]]:
    servers: list[RunningServer] = []

    def start(limits: Limits | None = None, **api: Any) -> RunningServer:
        config = Config(api=Api(bind="127.0.0.1:0", **api), limits=limits or Limits())
        servers.append(RunningServer(config))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server()


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """Sends the admin key, which has no limits."""
    headers = {"Authorization": f"Bearer {token('admin')}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=10) as made:
        yield made


@pytest.fixture
def task_id(client: httpx.Client) -> str:
    answer = client.post("/tasks", json=submission())
    assert answer.status_code == 201, answer.text
    return str(answer.json()["task_id"])


def submission(**changes: Any) -> dict[str, Any]:
    """The document's request."""
    return {
        "task_type": "text_generation",
        "model_name": "llama-2-7b",
        "parameters": {"prompt": "Explain quantum computing", "max_tokens": 512, "temperature": 0.7},
        "priority": "normal",
        "timeout": 300,
    } | changes
