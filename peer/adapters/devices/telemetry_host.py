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


class MemoryGroup:
    """The control group (a container, a systemd unit) that leaves this process the least memory, if any does."""

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> None:
        self.limit_bytes = 0  # 0: none
        self._folder = root
        for folder in self._folders(root, own):
            limit = _number(folder / "memory.max")
            if limit and (not self.limit_bytes or limit < self.limit_bytes):
                self.limit_bytes, self._folder = limit, folder

    def used_bytes(self) -> int:
        """Without file pages that the kernel drops when memory is wanted."""
        try:
            lines = (self._folder / "memory.stat").read_text("ascii").split("\n")
        except (OSError, ValueError):
            lines = []
        cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return max(0, _number(self._folder / "memory.current") - cached)

    @staticmethod
    def _folders(root: Path, own: Path) -> list[Path]:
        try:
            lines = own.read_text("utf-8", "replace").splitlines()
        except OSError:
            return []
        paths = [line[3:].lstrip("/") for line in lines if line.startswith("0::")]
        return [
            folder
            for path in paths
            for folder in (root / path, *(root / path).parents)
            if root in (folder, *folder.parents)
        ]


def _number(path: Path) -> int:
    """0 where there is none."""
    try:
        text = path.read_text("ascii").strip()
    except (OSError, ValueError):
        return 0
    return int(text) if text.isdecimal() else 0


class CpuReader:
    """A CPU as a device: its memory is the host's, or what a control group leaves of it."""

    source = "psutil"

    def __init__(self, group: MemoryGroup | None = None) -> None:
        self._group = group or MemoryGroup()
        psutil.cpu_percent(interval=None)  # utilisation is measured from one call to the next

    def __call__(self) -> Telemetry:
        memory = psutil.virtual_memory()
        total, used = int(memory.total), int(memory.total - memory.available)
        if 0 < self._group.limit_bytes < total:
            total = self._group.limit_bytes
            used = min(total, self._group.used_bytes())
        return Telemetry(
            memory_total_bytes=total,
            memory_used_bytes=used,
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
