"""An executor over real stand-in engine processes, with what it reports kept in order."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from peer.adapters.clock import SystemClock
from peer.adapters.devices.engine_process import EngineLimits, EngineProcess
from peer.config import Alerts
from peer.engines import Device, FetchError, Progress, TelemetrySource
from peer.executor import Executor
from peer.state.model import Model, Replica, ReplicaState
from peer.state.order import (
    AttemptFailed,
    AttemptFinished,
    ForgetAttempt,
    LoadReplica,
    Report,
    RestartEngine,
    RunAttempt,
    StopAttempt,
    UnloadReplica,
    WorkerReported,
)
from peer.state.worker import EngineState, HostInfo, WorkerReport
from peer.streams import StreamHub

ECHO = Model(name="echo", source="builtin:echo", family="echo", context=512, slots=4)
WAIT_S = 10.0
FAKE = Device(label="fake0", device="fake", name="stand-in", stand_in=True)
STALL_S = {"start": 10.0, "idle": 10.0, "load": 10.0, "warmup": 10.0, "prefill": 10.0, "decode": 10.0}
QUICK = EngineLimits(stall_s=STALL_S, backoff_s=(0.01, 0.02), stop_s_max=1.0, quarantine_s=60.0)


GREET = "import os,socket,sys,time;s=socket.socket(fileno=int(os.environ['BITINGLIP_ENGINE_FD']));"
FRAMES = "from engine.protocol import *;say=lambda m:s.sendall(encode(m));"


def odd_engine(script: str) -> tuple[str, ...]:
    """The command of an engine that is not quite one. `s` is its socket, `say` sends a message."""
    return (sys.executable, "-c", GREET + FRAMES + script)


class Sink:
    """Every report, and a way to wait for one."""

    def __init__(self) -> None:
        self.seen: list[Report] = []
        self._news = trio.Event()
        self.blocked: trio.Event | None = None

    async def report(self, report: Report) -> None:
        if self.blocked is not None:
            await self.blocked.wait()
        self.seen.append(report)
        self._news.set()
        self._news = trio.Event()

    async def wait(self, want: Callable[[Any], bool], start: int = 0) -> Any:
        """The first report from `start` on that `want` accepts; fails after WAIT_S."""
        at = start
        with trio.move_on_after(WAIT_S):
            while True:
                while at < len(self.seen):
                    if want(self.seen[at]):
                        return self.seen[at]
                    at += 1
                await self._news.wait()
        raise AssertionError(f"not reported in {WAIT_S} s; the last ones were {self.seen[-5:]}")

    async def kind(self, kind: type, start: int = 0) -> Any:
        return await self.wait(lambda report: isinstance(report, kind), start)


class Files:
    """Model files that are there at once, or after `gate`, or not."""

    def __init__(self) -> None:
        self.gate: trio.Event | None = None
        self.error: FetchError | None = None
        self.fetched: list[str] = []
        self.path: str | None = "builtin:echo"
        self.fetched_to = ""  # "": nowhere that is

    def local(self, model: Model) -> str | None:
        return self.path

    async def fetch(self, model: Model, progress: Progress) -> str:
        progress("fetch", 10, 100)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.fetched.append(model.name)
        return self.fetched_to or "/models/" + model.name


class Rig:
    def __init__(
        self,
        devices: tuple[Device, ...] = (FAKE,),
        *,
        allowed: EngineLimits = QUICK,
        telemetry: Callable[[Device], TelemetrySource | None] = lambda device: None,
        command: tuple[str, ...] | None = None,
        slots_max: int = 4,
        cancel_s_max: float = 0.3,
        fake: dict[str, Any] | None = None,
        cache_dir: str = "",
        **extra: Any,
    ) -> None:
        self.sink = Sink()
        self.files = Files()
        self.clock = SystemClock()
        self.streams = StreamHub(self.clock)
        self.worker_id = f"p1-{devices[0].label}"
        self.engines: list[EngineProcess] = []

        def engine(worker_id: str, device: Device) -> EngineProcess:
            more = {"command": command} if command else {}
            made = EngineProcess(
                worker_id,
                device,
                self.clock,
                slots_max=slots_max,
                cache_dir=cache_dir,
                fake=fake or {},
                allowed=allowed,
                **more,
            )
            self.engines.append(made)
            return made

        self.executor = Executor(
            "p1",
            devices,
            engine=engine,
            telemetry=telemetry,
            host_info=lambda: HostInfo(cpu="c", ram_total_bytes=1, ram_used_bytes=1, os="o"),
            files=self.files,
            sink=self.sink,
            streams=self.streams,
            clock=self.clock,
            thresholds=Alerts(),
            slots_max=slots_max,
            cancel_s_max=cancel_s_max,
            **extra,
        )

    async def state(self, want: EngineState, start: int = 0) -> WorkerReport:
        found = await self.sink.wait(
            lambda r: isinstance(r, WorkerReported) and r.report.state is want, start
        )
        report: WorkerReport = found.report
        return report

    async def replica(self, want: ReplicaState, name: str = "echo", start: int = 0) -> Replica:
        def has(report: Report) -> bool:
            return isinstance(report, WorkerReported) and any(
                replica.state is want and replica.model_name == name for replica in report.report.replicas
            )

        found = await self.sink.wait(has, start)
        return next(replica for replica in found.report.replicas if replica.model_name == name)

    async def load(self, model: Model = ECHO) -> None:
        start = len(self.sink.seen)
        await self.executor.order(LoadReplica(epoch=1, worker_id=self.worker_id, model=model))
        await self.replica(ReplicaState.READY, model.name, start)

    async def run(
        self,
        task_id: str = "t1",
        prompt: str = "one two",
        attempt: int = 1,
        epoch: int = 1,
        **parameters: Any,
    ) -> None:
        await self.executor.order(
            RunAttempt(
                epoch=epoch,
                worker_id=self.worker_id,
                task_id=task_id,
                attempt=attempt,
                model_name="echo",
                task_type="text_generation",
                parameters={"prompt": prompt, **parameters},
            )
        )

    async def outcome(self, task_id: str = "t1", start: int = 0) -> AttemptFinished | AttemptFailed:
        found: AttemptFinished | AttemptFailed = await self.sink.wait(
            lambda r: isinstance(r, AttemptFinished | AttemptFailed) and r.task_id == task_id, start
        )
        return found

    async def stop_run(self, task_id: str = "t1", attempt: int = 1) -> None:
        await self.executor.order(
            StopAttempt(epoch=1, worker_id=self.worker_id, task_id=task_id, attempt=attempt)
        )

    async def forget(self, task_id: str = "t1", attempt: int = 1) -> None:
        await self.executor.order(
            ForgetAttempt(epoch=1, worker_id=self.worker_id, task_id=task_id, attempt=attempt)
        )

    async def unload(self, name: str = "echo") -> None:
        await self.executor.order(UnloadReplica(epoch=1, worker_id=self.worker_id, model_name=name))

    async def restart(self) -> None:
        await self.executor.order(RestartEngine(epoch=1, worker_id=self.worker_id))

    def pid(self) -> int:
        return next(
            r.report.engine_pid
            for r in reversed(self.sink.seen)
            if isinstance(r, WorkerReported) and r.report.engine_pid
        )


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


@asynccontextmanager
async def rig(
    ready: bool = True, load: bool = True, within_s: float = 60.0, **options: Any
) -> AsyncIterator[Rig]:
    """A running executor for at most `within_s`; whatever happens, its engines are gone at the end."""
    made = Rig(**options)
    with trio.fail_after(within_s):
        async with trio.open_nursery() as nursery:
            await nursery.start(made.executor.run)
            if ready:
                await made.state(EngineState.READY)
                if load:
                    await made.load()
            yield made
            nursery.cancel_scope.deadline = trio.current_time() + 5
            made.executor.stop()
    for engine in made.engines:
        assert engine._process is None


async def until(true: Callable[[], bool], limit_s: float = WAIT_S) -> None:
    """Wait until something that nothing announces has come true."""
    with trio.move_on_after(limit_s):
        while not true():  # noqa: ASYNC110
            await trio.sleep(0.005)
        return
    raise AssertionError(f"not true within {limit_s} s")
