from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.units import BYTES, SECONDS, format_bytes, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5m", 300), ("2h", 7_200), ("30d", 2_592_000), ("1.5h", 5_400), ("250ms", 0.25), ("7", 7)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("512MiB", 512 * 2**20), ("1.5 KiB", 1_536), ("7", 7), ("1kb", 1_000), ("0B", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "s", "-5s", "5 x", "1e3s", "٣s", "1.s", ".5s", "5s5s", "9" * 19, "5M", "nan"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.5B", "1 giga", "1\n", "0x10"])
def test_what_is_no_size(text: str) -> None:
    if text.strip() == "1":
        assert parse_bytes(text) == 1
        return
    with pytest.raises(ValueError, match=r"."):
        parse_bytes(text)


@given(st.integers(0, 10**15))
def test_sizes_round_trip(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size


@given(st.floats(0, 1e9).map(lambda value: round(value, 3)))
def test_durations_round_trip(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == seconds


@given(st.integers(0, 10**6), st.sampled_from(sorted(BYTES)))
def test_every_size_unit_scales(number: int, unit: str) -> None:
    assert parse_bytes(f"{number}{unit}") == number * BYTES[unit]


@given(st.integers(0, 10**6), st.sampled_from(sorted(SECONDS)))
def test_every_time_unit_scales(number: int, unit: str) -> None:
    assert parse_seconds(f"{number}{unit}") == float(number * SECONDS[unit])


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_seconds, parse_bytes):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0
