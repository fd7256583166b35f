"""An AMD GPU measured through the files of the amdgpu kernel driver; needs no library and no root."""

from __future__ import annotations

from pathlib import Path

from peer.state.worker import Telemetry


class SysfsReader:
    """`card` is the GPU's directory, as /sys/class/drm/renderD128/device. Raises OSError when it is gone."""

    source = "sysfs"

    def __init__(self, card: Path) -> None:
        self._card = card

    def __call__(self) -> Telemetry:
        total = _number(self._card / "mem_info_vram_total")
        used = _number(self._card / "mem_info_vram_used")
        if total is None or used is None:
            raise OSError(f"{self._card} does not tell its memory")
        busy = _number(self._card / "gpu_busy_percent")
        return Telemetry(
            memory_total_bytes=total,
            memory_used_bytes=used,
            temperature_c=self._temperature_c(),
            utilization_percent=None if busy is None else float(min(100, max(0, busy))),
            source=self.source,
        )

    def _temperature_c(self) -> float | None:
        """Of the edge sensor, else of the hottest that there is."""
        found: dict[str, float] = {}
        for sensor in sorted(self._card.glob("hwmon/hwmon*/temp*_input")):
            value = _number(sensor)
            if value is not None:
                label = sensor.with_name(sensor.name.replace("_input", "_label"))
                found[_text(label) or sensor.name] = value / 1000.0
        if not found:
            return None
        return found.get("edge", max(found.values()))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None
