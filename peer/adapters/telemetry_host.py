"""The host's own processor and memory, by psutil."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path
from typing import Final

import psutil

from peer.state.worker import HostInfo, Telemetry

_SENSORS: Final = ("k10temp", "zenpower", "coretemp", "cpu_thermal", "acpitz")  # the CPU's own first


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As people call it."""
    try:
        for line in cpuinfo.read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model") and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def os_name() -> str:
    """ "Debian GNU/Linux 12 (bookworm)" """
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


class Host:
    """Calling it gives HostInfo; what does not change is read once."""

    def __init__(self) -> None:
        self._cpu = cpu_name()
        self._os = os_name()
        self._hostname = platform.node()

    def __call__(self) -> HostInfo:
        memory = psutil.virtual_memory()
        return HostInfo(
            cpu=self._cpu,
            ram_total_bytes=int(memory.total),
            ram_used_bytes=int(memory.total - memory.available),
            os=self._os,
            hostname=self._hostname,
        )


class CpuReader:
    """A CPU as a device: its memory is the host's."""

    source = "psutil"

    def __init__(self) -> None:
        psutil.cpu_percent(interval=None)  # utilisation is measured from one call to the next

    def __call__(self) -> Telemetry:
        memory = psutil.virtual_memory()
        return Telemetry(
            memory_total_bytes=int(memory.total),
            memory_used_bytes=int(memory.total - memory.available),
            temperature_c=_temperature_c(),
            utilization_percent=float(psutil.cpu_percent(interval=None)),
            source=self.source,
        )


def _temperature_c() -> float | None:
    with warnings.catch_warnings():  # psutil warns of sensors that cannot be read
        warnings.simplefilter("ignore")
        sensors = psutil.sensors_temperatures()
    for name in _SENSORS:
        values = [entry.current for entry in sensors.get(name, []) if entry.current]
        if values:
            return float(max(values))
    return None
