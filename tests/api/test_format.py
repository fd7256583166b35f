"""Texts of the API: the document's examples, and properties that hold for every number."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import format

GIB = 2**30
seconds = st.floats(min_value=-10, max_value=1e9, allow_nan=False)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (25_753_026_560, "24GB"),
        (24 * GIB, "24GB"),
        (6.5 * GIB, "6.5GB"),
        (0, "0GB"),
        (300 * 2**20, "0.3GB"),
        (20 * 2**20, "0.02GB"),
        (1, "0GB"),
        (40 * GIB, "40GB"),
    ],
)
def test_memory(size: float, text: str) -> None:
    assert format.memory(size) == text


@pytest.mark.parametrize(("amount", "text"), [(3.2, "3.2s"), (3.0, "3.0s"), (0.04, "0.0s"), (-1, "0.0s")])
def test_duration(amount: float, text: str) -> None:
    assert format.duration(amount) == text


@pytest.mark.parametrize(
    ("amount", "text"), [(45.2, "45s"), (15, "15s"), (90, "90s"), (0.44, "0.4s"), (2, "2s"), (9.96, "10s")]
)
def test_estimate(amount: float, text: str) -> None:
    assert format.estimate(amount) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0s"), (45, "45s"), (59.5, "1m"), (95, "2m"), (120, "2m"), (3_599, "1h 0m"), (3_900, "1h 5m")],
)
def test_span(amount: float, text: str) -> None:
    assert format.span(amount) == text


@pytest.mark.parametrize(
    ("amount", "text"), [(620_639.9, "7d 4h 23m"), (0, "0d 0h 0m"), (59, "0d 0h 0m"), (-5, "0d 0h 0m")]
)
def test_uptime(amount: float, text: str) -> None:
    assert format.uptime(amount) == text


def test_the_rest() -> None:
    assert format.timestamp(1_748_599_200.999) == "2025-05-30T10:00:00Z"
    assert format.timestamp_or_none(None) is None
    assert format.timestamp_or_none(0.0) is None
    assert format.throughput(150) == "150 tasks/min"
    assert format.percent(97.877) == 97.9
    assert format.percent(None) is None
    assert format.percent_text(75.0) == "75%"
    assert format.percent_text(None) is None


@given(seconds)
def test_times_have_their_shape(amount: float) -> None:
    assert re.fullmatch(r"\d+\.\ds", format.duration(amount))
    assert re.fullmatch(r"\d+(\.[1-9])?s", format.estimate(amount))
    assert re.fullmatch(r"\d+[sm]|\d+h \d+m", format.span(amount))
    assert re.fullmatch(r"\d+d \d+h \d+m", format.uptime(amount))


@given(st.integers(min_value=0, max_value=10**18))
def test_memory_is_close(size: int) -> None:
    text = format.memory(size)
    assert re.fullmatch(r"\d+(\.\d{1,3})?GB", text)
    assert abs(float(text[:-2]) * GIB - size) <= 0.0501 * GIB


@given(st.floats(min_value=0, max_value=4e9, allow_nan=False))
def test_timestamps_can_be_read_back(wall: float) -> None:
    read = datetime.strptime(format.timestamp(wall), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert read.timestamp() == int(wall)


@given(seconds)
def test_uptime_adds_up(amount: float) -> None:
    days, hours, minutes = (int(part[:-1]) for part in format.uptime(amount).split())
    assert hours < 24
    assert minutes < 60
    assert (days * 24 + hours) * 60 + minutes == int(max(0.0, amount)) // 60
