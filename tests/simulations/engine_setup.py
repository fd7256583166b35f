"""The simulated engine under the real executor, and what its tests share."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from peer.adapters.devices.engine_process import EngineLimits
from peer.config import Alerts
from peer.engines import Device
from peer.executor import Executor
from peer.state.model import Model
from peer.state.worker import EngineState, HostInfo
from peer.streams import StreamHub
from simulations.world.cards import GIB, Profile, SimCard, SimTelemetry, devices, profile
from simulations.world.engines import SimEngine
from simulations.world.files import SimFiles
from tests.executor.rig import Rig, Sink

WAIT_S = 2_000.0
ECHO = Model(
    name="echo",
    source="https://x/echo",
    family="llama",
    memory_bytes=4 * GIB,
    size_bytes=GIB,
    context=512,
    slots=4,
)
BIG = msgspec.structs.replace(ECHO, name="big", memory_bytes=13 * GIB)
PROFILE = profile((ECHO, BIG), slots_max=4)


class Life:
    alive = True


class VirtualClock:
    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return 1_000_000.0 + trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class PatientSink(Sink):
    """Waits for virtual minutes; a lasting silence is still a failure."""

    async def wait(self, want: Callable[[Any], bool], start: int = 0) -> Any:
        at = start
        with trio.move_on_after(WAIT_S):
            while True:
                while at < len(self.seen):
                    if want(self.seen[at]):
                        return self.seen[at]
                    at += 1
                await self._news.wait()
        raise AssertionError(f"not reported in {WAIT_S} s; the last ones were {self.seen[-5:]}")


class SimRig(Rig):
    """The same executor over simulated engines."""

    def __init__(
        self,
        device: Device,
        *,
        shape: Profile = PROFILE,
        allowed: EngineLimits | None = None,
        telemetry: bool = False,
        seed: int = 1,
    ) -> None:
        self.sink = PatientSink()
        self.sim_files = SimFiles()
        self.clock = VirtualClock()  # type: ignore[assignment]
        self.streams = StreamHub(self.clock)
        self.worker_id = f"p1-{device.label}"
        self.card = SimCard(device)
        self.life = Life()
        self.engine = SimEngine(
            self.life, self.worker_id, self.card, self.clock, random.Random(seed), shape, allowed=allowed
        )
        self.engines = [self.engine]
        self.executor = Executor(
            "p1",
            (device,),
            engine=lambda worker_id, device: self.engine,
            telemetry=lambda device: SimTelemetry(self.card) if telemetry else None,
            host_info=lambda: HostInfo(cpu="c", ram_total_bytes=1, ram_used_bytes=1, os="o"),
            files=self.sim_files,
            sink=self.sink,
            streams=self.streams,
            clock=self.clock,
            thresholds=Alerts(),
            slots_max=shape.slots_max,
        )

    async def load(self, model: Model = ECHO) -> None:
        await super().load(model)

    def since(self) -> int:
        return len(self.sink.seen)


@asynccontextmanager
async def sim(ready: bool = True, load: bool = True, **options: Any) -> AsyncIterator[SimRig]:
    made = SimRig(devices(1)[0], **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.executor.run)
        if ready:
            await made.state(EngineState.READY)
            if load:
                await made.load()
        yield made
        made.executor.stop()
    assert made.card.held() == {}
    assert made.card.used_bytes() == 0
