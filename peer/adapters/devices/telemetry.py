"""What a device's measurements come from, chosen once: amdsmi, else sysfs, psutil for a CPU, else its engine.

Readers may block in a driver: they run in a thread, one at a time, with a limit. A reader that fails or hangs
costs the fields that it cannot tell and one line in the log, never more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import structlog
import trio

from peer.adapters.devices.devices import joined_name
from peer.adapters.devices.telemetry_amdsmi import AmdSmi, open_amdsmi
from peer.adapters.devices.telemetry_host import CpuReader
from peer.adapters.devices.telemetry_sysfs import SysfsReader
from peer.engines import Device, TelemetrySource
from peer.state.worker import Telemetry

READ_S_MAX: Final = 1.0
OPEN_S_MAX: Final = 5.0

log = structlog.get_logger("telemetry")


class ThreadedSource:
    """Implements peer.engines.TelemetrySource over a reader that may block or raise OSError."""

    def __init__(
        self,
        label: str,
        source: str,
        reader: Callable[[], Telemetry],
        limiter: trio.CapacityLimiter,
        *,
        memory_total_bytes: int = 0,
        read_s_max: float = READ_S_MAX,
    ) -> None:
        self._log = log.bind(device=label, source=source)
        self._source = source
        self._reader = reader
        self._limiter = limiter
        self._limit_s = read_s_max
        self._last = Telemetry(memory_total_bytes=memory_total_bytes, memory_used_bytes=0, source=source)
        self._well = True

    async def read(self) -> Telemetry:
        """Measured now. While it cannot be: the last memory figures and None for the rest."""
        trouble = f"no answer within {self._limit_s} s"
        with trio.move_on_after(self._limit_s):
            try:
                self._last = await trio.to_thread.run_sync(
                    self._reader, abandon_on_cancel=True, limiter=self._limiter
                )
                trouble = ""
            except OSError as error:
                trouble = str(error)
        if trouble:
            if self._well:
                self._log.warning("telemetry_fails", error=trouble)
            self._well = False
            return Telemetry(
                memory_total_bytes=self._last.memory_total_bytes,
                memory_used_bytes=self._last.memory_used_bytes,
                source=self._source,
            )
        if not self._well:
            self._log.info("telemetry_works_again")
        self._well = True
        return self._last


class JoinedSource:
    """Implements peer.engines.TelemetrySource for one worker's several devices.

    Memory is the sum, the temperature that of the hottest, the load their mean; None where one cannot tell.
    """

    def __init__(self, sources: Sequence[TelemetrySource]) -> None:
        self._sources = tuple(sources)

    async def read(self) -> Telemetry:
        found: list[Telemetry] = []

        async def one(source: TelemetrySource) -> None:
            found.append(await source.read())

        async with trio.open_nursery() as nursery:
            for source in self._sources:
                nursery.start_soon(one, source)
        loads = [each.utilization_percent for each in found if each.utilization_percent is not None]
        heats = [each.temperature_c for each in found if each.temperature_c is not None]
        return Telemetry(
            memory_total_bytes=sum(each.memory_total_bytes for each in found),
            memory_used_bytes=sum(each.memory_used_bytes for each in found),
            temperature_c=max(heats) if len(heats) == len(found) else None,
            utilization_percent=sum(loads) / len(loads) if len(loads) == len(found) else None,
            source=found[0].source,
        )


class Telemetries:
    """The sources of this host's devices, and the devices with what the library knows of them added."""

    def __init__(self, devices: Sequence[Device], amdsmi: AmdSmi | None = None) -> None:
        self._amdsmi = amdsmi
        self._amdsmi_limiter = trio.CapacityLimiter(1)  # the library is asked one question at a time
        self.devices = tuple(devices)

    def source(self, device: Device) -> TelemetrySource | None:
        """None: only its engine can measure it."""
        if device.stand_in:
            return None
        if any(member.pci for member in device.members):
            return JoinedSource([self._gpu(member) for member in device.members])
        if device.pci:
            return self._gpu(device)
        if device.device.partition(":")[0].upper() == "CPU":
            return ThreadedSource(device.label, CpuReader.source, CpuReader(), trio.CapacityLimiter(1))
        return None

    def _gpu(self, device: Device) -> TelemetrySource:
        reader = self._amdsmi.reader(device.pci) if self._amdsmi is not None else None
        if reader is not None:
            source, limiter = "amdsmi", self._amdsmi_limiter
        else:
            reader, source = SysfsReader(Path(device.sysfs)), SysfsReader.source
            limiter = trio.CapacityLimiter(1)
        return ThreadedSource(
            device.label, source, reader, limiter, memory_total_bytes=device.memory_total_bytes
        )

    async def close(self) -> None:
        if self._amdsmi is not None:
            with trio.move_on_after(READ_S_MAX):
                await trio.to_thread.run_sync(
                    self._amdsmi.close, abandon_on_cancel=True, limiter=self._amdsmi_limiter
                )


async def open_telemetry(devices: Sequence[Device]) -> Telemetries:
    """Load amdsmi if there is an AMD GPU to measure; takes OPEN_S_MAX at most."""
    if not any(one.pci for device in devices for one in device.members or (device,)):
        return Telemetries(devices)
    with trio.move_on_after(OPEN_S_MAX):
        return await trio.to_thread.run_sync(_open, tuple(devices), abandon_on_cancel=True)
    log.warning("amdsmi_hangs", waited_s=OPEN_S_MAX, note="the driver's sysfs files are read instead")
    return Telemetries(devices)


def _open(devices: tuple[Device, ...]) -> Telemetries:
    amdsmi = open_amdsmi()
    if amdsmi is None:
        return Telemetries(devices)
    return Telemetries([_described(device, amdsmi) for device in devices], amdsmi)


def _described(device: Device, amdsmi: AmdSmi) -> Device:
    """With the name and driver version that AMD's library knows."""
    if device.members:
        members = tuple(_described(member, amdsmi) for member in device.members)
        name = joined_name([member.name for member in members])
        driver_version = members[0].driver_version
        return msgspec.structs.replace(device, name=name, driver_version=driver_version, members=members)
    pci = device.pci.lower()
    if pci not in amdsmi.addresses:
        return device
    return msgspec.structs.replace(
        device,
        name=amdsmi.name(pci) or device.name,
        driver_version=amdsmi.driver_version(pci) or device.driver_version,
    )
