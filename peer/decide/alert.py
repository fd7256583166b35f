"""When a device's measurements become an alert and when that is over, with hysteresis against flapping."""

from __future__ import annotations

from typing import Protocol

from peer.state.base import Record
from peer.state.order import AlertRaised
from peer.state.worker import EngineState, Telemetry

CRITICAL_ABOVE_C = 10.0  # so far above its threshold a temperature is critical


class Thresholds(Protocol):
    """An alert is raised at its threshold and cleared below its `clear` value."""

    @property
    def temperature_c(self) -> float: ...
    @property
    def temperature_clear_c(self) -> float: ...
    @property
    def memory_percent(self) -> float: ...
    @property
    def memory_clear_percent(self) -> float: ...


class AlertState(Record, frozen=True):
    """What is raised now: "" or its level."""

    temperature: str = ""
    memory: str = ""
    engine: str = ""


def _level(value: float, threshold: float, clear: float, critical: float, before: str) -> str:
    """The level after `value` is seen. A critical alert falls back to none only, never to a warning."""
    if value >= critical:
        return "critical"
    if value >= threshold:
        return before or "warning"
    if before and value >= clear:
        return before
    return ""


def judge(
    worker_id: str, telemetry: Telemetry, thresholds: Thresholds, state: AlertState
) -> tuple[tuple[AlertRaised, ...], AlertState]:
    """The alerts that this measurement raises, worsens or clears, and the new state."""
    temperature, heat = _temperature(worker_id, telemetry, thresholds, state.temperature)
    memory, fill = _memory(worker_id, telemetry, thresholds, state.memory)
    return heat + fill, AlertState(temperature=temperature, memory=memory, engine=state.engine)


def _temperature(
    worker_id: str, telemetry: Telemetry, thresholds: Thresholds, before: str
) -> tuple[str, tuple[AlertRaised, ...]]:
    value = telemetry.temperature_c
    if value is None:
        return before, ()
    limit, clear = thresholds.temperature_c, thresholds.temperature_clear_c
    level = _level(value, limit, clear, limit + CRITICAL_ABOVE_C, before)
    if level == before:
        return level, ()
    text = (
        f"{worker_id} is at {value:.0f} °C, the threshold is {limit:.0f} °C"
        if level
        else f"{worker_id} has cooled down to {value:.0f} °C"
    )
    return level, (_alert(worker_id, "temperature", level or before, bool(level), value, limit, "°C", text),)


def _memory(
    worker_id: str, telemetry: Telemetry, thresholds: Thresholds, before: str
) -> tuple[str, tuple[AlertRaised, ...]]:
    if telemetry.memory_total_bytes <= 0:
        return before, ()
    value = 100.0 * telemetry.memory_used_bytes / telemetry.memory_total_bytes
    limit = thresholds.memory_percent
    level = _level(value, limit, thresholds.memory_clear_percent, float("inf"), before)
    if level == before:
        return level, ()
    text = (
        f"{value:.1f} % of {worker_id}'s memory is used, the threshold is {limit:.0f} %"
        if level
        else f"{worker_id}'s memory use has gone down to {value:.1f} %"
    )
    return level, (_alert(worker_id, "memory", level or before, bool(level), value, limit, "%", text),)


def judge_engine(
    worker_id: str,
    engine: EngineState,
    message: str,
    *,
    died: bool,
    deaths: int,
    deaths_max: int,
    state: AlertState,
) -> tuple[tuple[AlertRaised, ...], AlertState]:
    """A death raises a warning, state error a critical alert; being ready clears both."""
    before = state.engine
    level = before
    if engine is EngineState.READY:
        level = ""
    elif engine is EngineState.ERROR:
        level = "critical"
    elif died and not before:
        level = "warning"
    if level == before:
        return (), state
    text = f"{worker_id}: {message}" if level else f"{worker_id}'s engine runs again"
    alert = _alert(
        worker_id, "engine", level or before, bool(level), float(deaths), float(deaths_max), "deaths", text
    )
    return (alert,), AlertState(temperature=state.temperature, memory=state.memory, engine=level)


def _alert(
    worker_id: str,
    kind: str,
    level: str,
    raised: bool,
    value: float,
    threshold: float,
    unit: str,
    message: str,
) -> AlertRaised:
    return AlertRaised(
        worker_id=worker_id,
        kind=kind,
        level=level,
        raised=raised,
        value=value,
        threshold=threshold,
        unit=unit,
        message=message,
    )
