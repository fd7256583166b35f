"""The seams of an executor: its engines, its devices' telemetry, and the model files of this host.

Adapters implement these; simulations put their own behind them. Callbacks come in the executor's own thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from engine.protocol import Ready, ToEngine
from peer.state.model import Model
from peer.state.worker import EngineState, Telemetry


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What gets a worker: one device, or several that share each model.

    `problem` says why it cannot be used and what to do; "" if it can. Of several the names are joined, the memory is
    all of theirs, and `pci` and `sysfs` are only those of `members`.
    """

    label: str  # unique on this host and the same after a restart: "gpu0", "gpu0-1", "cpu0", "fake1"
    device: str  # for the engine: "KFD:0+AMD:LLVM", "KFD:0,1+AMD:LLVM", "CPU:LLVM", "fake"
    name: str = ""  # as people call it, as far as known before the engine runs
    architecture: str = ""
    driver_version: str = ""
    stand_in: bool = False
    problem: str = ""
    pci: str = ""  # "0000:03:00.0"
    sysfs: str = ""  # the card's device directory, of amdgpu
    memory_total_bytes: int = 0
    members: tuple[Device, ...] = ()  # () where it is one device


class EngineEvents(Protocol):
    """What an engine tells its worker."""

    def messages(self, batch: list[Any]) -> None:
        """Everything one wake-up brought, in order: `engine.protocol.FromEngine` after `Ready`."""

    def ready(self, ready: Ready, pid: int, downtime_s: float) -> None:
        """It can take orders. `downtime_s` counts from the beginning of the (re)start."""

    def changed(self, state: EngineState, message: str, deaths: int) -> None:
        """Any other state, why, and how often it has died since this peer started."""

    def gone(self, code: str, reason: str) -> None:
        """The process is lost with all that it held: runs and replicas."""


class EngineHandle(Protocol):
    """One device's engine, supervised."""

    async def run(self, events: EngineEvents) -> None:
        """Keep it running until `stop`. Leaves no process behind, also when cancelled."""

    def send(self, message: ToEngine) -> bool:
        """Queue a message. False: not ready, or its outbox is full."""

    def kill(self, reason: str) -> None:
        """It misbehaves: end it now; counts as a death."""

    def restart(self) -> None:
        """On request: end it gently, start it again at once; ends a quarantine."""

    def stop(self) -> None:
        """End it gently; `run` returns."""


class TelemetrySource(Protocol):
    async def read(self) -> Telemetry:
        """Measured now, within a bounded time; what cannot be told is None. Never raises."""


class FetchError(Exception):
    """A model's file cannot be had; the text says why and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


Progress = Callable[[str, int, int], None]  # stage (fetch, verify), bytes done, bytes in all (0: unknown)


class ModelFiles(Protocol):
    def local(self, model: Model) -> str | None:
        """The verified file's path if it is on this host, without any waiting."""

    async def fetch(self, model: Model, progress: Progress) -> str:
        """The verified file's path, downloaded if need be. Raises FetchError."""
