"""AMD GPUs measured through AMD's own library, by its Python package `amdsmi`.

The package is imported only where its library can be loaded: without it the import prints and raises.
All calls may block in the driver, so callers run them in a thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

from peer.state.worker import Telemetry

LIBRARY: Final = "libamd_smi.so"
MIB: Final = 1024 * 1024
_FAILED: Final = object()

log = structlog.get_logger("telemetry")


class AmdSmi:
    """The library, initialised, with its GPUs by PCI address."""

    def __init__(self, amdsmi: Any) -> None:
        self._amdsmi = amdsmi
        amdsmi.amdsmi_init(amdsmi.AmdSmiInitFlags.INIT_AMD_GPUS)
        self._handles: dict[str, Any] = {}
        for handle in amdsmi.amdsmi_get_processor_handles():
            pci = self._try(amdsmi.amdsmi_get_gpu_device_bdf, handle)
            if isinstance(pci, str):
                self._handles[pci.lower()] = handle

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(self._handles)

    def close(self) -> None:
        self._try(self._amdsmi.amdsmi_shut_down)

    def name(self, pci: str) -> str:
        """As AMD calls the card; "" if it does not say."""
        info = self._try(self._amdsmi.amdsmi_get_gpu_asic_info, self._handles[pci])
        name = info.get("market_name", "") if isinstance(info, dict) else ""
        return "" if name in ("N/A", "") or name.startswith("0x") else str(name)

    def driver_version(self, pci: str) -> str:
        info = self._try(self._amdsmi.amdsmi_get_gpu_driver_info, self._handles[pci])
        if not isinstance(info, dict) or info.get("driver_version", "N/A") == "N/A":
            return ""
        name = info.get("driver_name", "N/A")
        return f"{'amdgpu' if name == 'N/A' else name} {info['driver_version']}"

    def reader(self, pci: str) -> Callable[[], Telemetry] | None:
        handle = self._handles.get(pci.lower())
        return None if handle is None else lambda: self._read(handle)

    def _read(self, handle: Any) -> Telemetry:
        """Raises OSError when not even the memory can be told."""
        amdsmi = self._amdsmi
        total, used = self._memory(handle)
        activity = self._try(amdsmi.amdsmi_get_gpu_activity, handle)
        busy = activity.get("gfx_activity") if isinstance(activity, dict) else None
        return Telemetry(
            memory_total_bytes=total,
            memory_used_bytes=used,
            temperature_c=self._temperature_c(handle),
            utilization_percent=float(busy) if isinstance(busy, int) and 0 <= busy <= 100 else None,
            source="amdsmi",
        )

    def _memory(self, handle: Any) -> tuple[int, int]:
        amdsmi = self._amdsmi
        vram = amdsmi.AmdSmiMemoryType.VRAM
        total = self._try(amdsmi.amdsmi_get_gpu_memory_total, handle, vram)
        used = self._try(amdsmi.amdsmi_get_gpu_memory_usage, handle, vram)
        if isinstance(total, int) and isinstance(used, int):
            return total, used
        usage = self._try(amdsmi.amdsmi_get_gpu_vram_usage, handle)
        if isinstance(usage, dict):
            return int(usage["vram_total"]) * MIB, int(usage["vram_used"]) * MIB
        raise OSError("amdsmi does not tell the GPU's memory")

    def _temperature_c(self, handle: Any) -> float | None:
        """Of the edge sensor; data-centre cards only have the others."""
        kinds = self._amdsmi.AmdSmiTemperatureType
        current = self._amdsmi.AmdSmiTemperatureMetric.CURRENT
        for kind in (kinds.EDGE, kinds.HOTSPOT, kinds.VRAM):
            value = self._try(self._amdsmi.amdsmi_get_temp_metric, handle, kind, current)
            if isinstance(value, int):
                return value / 1000.0 if value > 1000 else float(value)  # some releases say millidegrees
        return None

    def _try(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the library answers, or a value that is none: a card need not support every question."""
        try:
            return call(*arguments)
        except (self._amdsmi.AmdSmiException, UnicodeDecodeError, ValueError) as error:
            log.debug("amdsmi_error", call=call.__name__, error=" ".join(str(error).split()))
            return _FAILED


def open_amdsmi() -> AmdSmi | None:
    """The library, or None, said once in the log, where it is not installed or does not work. May block."""
    if not _loads():
        log.info(
            "amdsmi_absent", note=f"{LIBRARY} is not installed; the driver's sysfs files are read instead"
        )
        return None
    try:
        import amdsmi

        return AmdSmi(amdsmi)
    except Exception as error:  # supervisor: the import itself raises KeyError, AttributeError, OSError, ...
        log.warning("amdsmi_unusable", error=" ".join(str(error).split()), kind=type(error).__name__)
        return None


def _loads() -> bool:
    """Whether the package will find its library; the same places in the same order."""
    home = os.environ.get("ROCM_HOME", os.environ.get("ROCM_PATH", ""))
    places = [str(Path(home) / "lib" / LIBRARY)] if home else []
    places += [LIBRARY, str(Path(os.environ.get("ROCM_PATH", "/opt/rocm")) / "lib" / LIBRARY)]
    for place in places:
        try:
            ctypes.CDLL(place)
        except OSError:
            continue
        return True
    return False
