"""Alerts with hysteresis, and what is done about a death."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peer.adapters.processes.supervision import Verdict, after_death
from peer.config import Alerts
from peer.decide.alert import AlertState, judge, judge_engine
from peer.state.worker import EngineState, Telemetry

LIMITS = Alerts(temperature_c=95, temperature_clear_c=88, memory_percent=97, memory_clear_percent=92)


def measured(celsius: float | None = None, percent: float | None = None) -> Telemetry:
    total = 0 if percent is None else 1000
    return Telemetry(
        memory_total_bytes=total, memory_used_bytes=int(10 * (percent or 0)), temperature_c=celsius
    )


def course(*readings: Telemetry) -> list[tuple[str, str, bool, float]]:
    state, seen = AlertState(), []
    for reading in readings:
        alerts, state = judge("w", reading, LIMITS, state)
        seen += [(alert.kind, alert.level, alert.raised, alert.value) for alert in alerts]
        for alert in alerts:
            assert alert.message.startswith("w ") or "w's" in alert.message
            assert alert.unit in ("°C", "%")
    return seen


def test_a_temperature_is_raised_once_and_cleared_below_its_clear_value() -> None:
    readings = [measured(c) for c in (60, 95, 96, 94, 90, 88, 87.9, 94, 95)]
    assert course(*readings) == [
        ("temperature", "warning", True, 95),
        ("temperature", "warning", False, 87.9),
        ("temperature", "warning", True, 95),
    ]


def test_it_worsens_to_critical_and_does_not_fall_back_to_a_warning() -> None:
    readings = [measured(c) for c in (96, 105, 100, 90, 80)]
    assert course(*readings) == [
        ("temperature", "warning", True, 96),
        ("temperature", "critical", True, 105),
        ("temperature", "critical", False, 80),
    ]


def test_memory_in_percent_of_the_device() -> None:
    readings = [measured(percent=p) for p in (50, 97, 99, 93, 91.5)]
    assert course(*readings) == [("memory", "warning", True, 97.0), ("memory", "warning", False, 91.5)]


def test_what_is_not_known_changes_nothing() -> None:
    state = AlertState(temperature="warning", memory="warning")
    assert judge("w", measured(), LIMITS, state) == ((), state)


@given(st.lists(st.floats(min_value=0, max_value=150), max_size=50))
def test_raises_and_clears_alternate(degrees: list[float]) -> None:
    raised = False
    for _, level, up, value in course(*(measured(c) for c in degrees)):
        if up and raised:
            assert level == "critical"
        if not up:
            assert raised
            assert value < LIMITS.temperature_clear_c
        raised = up


def engine(
    state: AlertState, into: EngineState, died: bool = False
) -> tuple[list[tuple[str, bool]], AlertState]:
    alerts, after = judge_engine("w", into, "why", died=died, deaths=1, deaths_max=3, state=state)
    assert all(alert.kind == "engine" for alert in alerts)
    return [(alert.level, alert.raised) for alert in alerts], after


def test_an_engines_death_and_recovery() -> None:
    seen, state = engine(AlertState(temperature="warning"), EngineState.RESTARTING, died=True)
    assert seen == [("warning", True)]
    assert state.temperature == "warning"
    assert engine(state, EngineState.RESTARTING, died=True)[0] == []
    seen, state = engine(state, EngineState.ERROR)
    assert seen == [("critical", True)]
    assert engine(state, EngineState.RESTARTING, died=True)[0] == []
    seen, state = engine(state, EngineState.READY)
    assert (seen, state.engine) == ([("critical", False)], "")


def test_a_restart_on_request_is_no_alert() -> None:
    assert engine(AlertState(), EngineState.RESTARTING)[0] == []
    assert engine(AlertState(), EngineState.STARTING)[0] == []


def death(*ages_s: float) -> Verdict:
    return after_death(
        [1000.0 - age for age in ages_s],
        1000.0,
        backoff_s=(0.2, 1.0),
        deaths_max=3,
        window_s=600.0,
        quarantine_s=300.0,
    )


def test_deaths_in_the_window_lengthen_the_pause_and_end_in_quarantine() -> None:
    assert death(0) == Verdict(wait_s=0.2, quarantined=False, deaths_recent=1)
    assert death(50, 0) == Verdict(wait_s=1.0, quarantined=False, deaths_recent=2)
    assert death(600, 50, 0) == Verdict(wait_s=300.0, quarantined=True, deaths_recent=3)
    assert death(601, 50, 0) == Verdict(wait_s=1.0, quarantined=False, deaths_recent=2)
    assert death() == Verdict(wait_s=0.0, quarantined=False, deaths_recent=0)


def test_the_longest_pause_is_kept() -> None:
    verdict = after_death([1.0] * 8, 1.0, backoff_s=(0.2, 1.0), deaths_max=9, window_s=1.0, quarantine_s=1.0)
    assert verdict.wait_s == 1.0
