"""A worker: one device with its engine process, and what its peer reports of it."""

from __future__ import annotations

from enum import StrEnum

from peer.state.base import Record
from peer.state.model import Replica


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # on request, or after a death, with backoff
    ERROR = "error"  # unusable device, or quarantined; `message` says why and what to do


class DeviceInfo(Record, frozen=True):
    """What does not change while the engine runs."""

    device: str  # as configured: "CPU:LLVM", "KFD:0+AMD:LLVM", "fake"
    name: str  # as people call it
    architecture: str = ""
    driver_version: str = ""
    stand_in: bool = False


class HostInfo(Record, frozen=True):
    cpu: str
    ram_total_bytes: int
    ram_used_bytes: int
    os: str
    hostname: str = ""


class Telemetry(Record, frozen=True):
    """Measured on the device. None: this device cannot tell."""

    memory_total_bytes: int
    memory_used_bytes: int  # by every process
    temperature_c: float | None = None
    utilization_percent: float | None = None
    source: str = ""  # amdsmi, sysfs, psutil, stand-in


class Worker(Record, frozen=True):
    """The durable part: that this worker exists, so that it is listed while it is offline."""

    worker_id: str
    peer_id: str
    device: DeviceInfo
    first_seen: float


class WorkerReport(Record, frozen=True):
    """All that a peer knows of one of its workers; sent every second and on every change."""

    worker_id: str
    peer_id: str
    state: EngineState
    device: DeviceInfo
    host: HostInfo
    telemetry: Telemetry
    replicas: tuple[Replica, ...] = ()
    running: tuple[str, ...] = ()  # "<task_id>/<attempt>" that the engine or its queue holds
    slots_max: int = 0
    engine_pid: int = 0
    deaths: int = 0
    message: str = ""  # why not ready, in one sentence
    sent_at: float = 0.0
