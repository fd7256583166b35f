"""Which rows of a step go to prompts, by what steps take."""

from __future__ import annotations

import numpy as np
import pytest

from engine.batching.pacing import Bucket, StepTimes, prompt_rows, share


def times(*milliseconds: float, attended_s: float = 0.0) -> StepTimes:
    sizes = zip((1, 4, 8, 16, 32), milliseconds, strict=True)
    return StepTimes([Bucket(size, size, ms / 1e3, attended_s) for size, ms in sizes])


CPU = (41, 58, 76, 110, 186)  # SmolLM2 in float16 on two cores, measured
QUICK = (4.1, 7.1, 10.1, 19.5, 28.0)  # and with whole vectors


@pytest.mark.parametrize(
    ("measured", "decoding", "rows"),
    [
        (CPU, 0, 32),
        (CPU, 1, 7),
        (CPU, 4, 12),
        (CPU, 8, 8),
        (QUICK, 1, 3),
        (QUICK, 8, 8),
        ((10, 10, 10, 10, 11), 1, 31),  # a device that does not mind
        ((10, 40, 80, 160, 320), 1, 3),  # none is quick: the smallest, or the prompt would wait for ever
        ((10, 40, 80, 160, 320), 4, 4),
        (CPU, 32, 0),
    ],
)
def test_prompts_get_what_streams_can_bear(measured: tuple[float, ...], decoding: int, rows: int) -> None:
    assert prompt_rows(times(*measured), [100] * decoding, 50) == rows


@pytest.mark.parametrize(
    ("decoding", "position", "rows"),
    [
        ([10], 0, 7),
        ([10], 100, 7),
        ([10], 1400, 4),  # of 8, as more would take too long
        ([10], 6000, 2),  # of 4
        ([10], 100_000, 1),  # or the prompt would wait for ever
        ([1000], 1100, 6),  # a stream that looks back itself takes longer, and bears more
        ([10] * 8, 800, 8),
    ],
)
def test_a_prompt_that_looks_back_at_much_gets_fewer_rows(
    decoding: list[int], position: int, rows: int
) -> None:
    found = times(5.0, 7.1, 9.0, 16, 28.0, attended_s=250e-9)
    assert prompt_rows(found, decoding, position) == rows


def test_a_size_that_is_too_slow_anyway_is_used() -> None:
    """Where none is bearable the smallest is, and then its rows cost little."""
    found = times(2.0, 8.0, 16.0, 32.0, 64.0, attended_s=250e-9)
    assert prompt_rows(found, [10], 500) == 3
    assert prompt_rows(found, [10], 4000) == 2
    assert prompt_rows(found, [10], 40_000) == 1


def test_what_is_between_steps_counts_for_streams() -> None:
    """They see gaps, not steps: with 2 ms more for each, 12 beside 6 is bearable where 10 beside 4 is not."""
    found = times(*QUICK)
    assert prompt_rows(found, [10], 0) == 3
    for _ in range(500):
        found.observe(1, 0, 0.0041, between=0.002)
    assert prompt_rows(found, [10], 0) == 7
    assert found.seconds(found.fitting(1)) == pytest.approx(0.0061, rel=0.01)
    for _ in range(100):  # something else had the device: a step's time at most is believed
        found.observe(1, 0, 0.0041, between=60.0)
    assert found.seconds(found.fitting(1)) <= 2 * 0.0042


def test_where_steps_vary_prompts_get_less() -> None:
    """So that of all gaps, not of the usual ones alone, at most one in a hundred is noticed."""
    found = times(*QUICK)
    random = np.random.default_rng(3)
    for varying, least, most in ((0.02, 2.0, 2.3), (0.1, 1.75, 1.95), (0.02, 2.0, 2.3)):
        for _ in range(2000):
            found.observe(1, 0, 0.0041 * random.lognormal(0, varying), between=0.001)
        assert least <= found.bearable <= most
    for count in range(2000):
        found.observe(1, 0, 0.04 if count % 20 == 0 else 0.0041, between=0.001)
    assert found.bearable == pytest.approx(2.3 / 1.4, rel=0.02)  # and no less, or they would wait for ever


def test_measurements_follow_the_steps() -> None:
    """Slowly enough that one late step changes nothing, and back again when a size is no longer taken."""
    found = times(41, 58, 66, 110, 186)
    found.observe(8, 0, 5.0)
    assert prompt_rows(found, [10], 0) == 7
    for _ in range(50):
        found.observe(7, 0, 0.3)
    assert found.seconds(found.fitting(8)) == pytest.approx(0.3, rel=0.02)
    assert prompt_rows(found, [10], 0) == 3
    for _ in range(5000):
        found.observe(1, 0, 0.041)
    assert found.seconds(found.fitting(8)) == pytest.approx(0.066, rel=0.1)
    assert prompt_rows(found, [10], 0) == 7


def test_a_disturbed_warm_up_is_seen() -> None:
    """A step of 4 rows took 30 ms then, and one of 8 took 10."""
    found = times(4.1, 30.0, 10.1, 19.5, 28.0)
    assert found.seconds(found.fitting(4)) == pytest.approx(0.0101)
    assert found.seconds(found.fitting(1)) == pytest.approx(0.0041)


def test_a_long_context_is_no_slower_device() -> None:
    """A step that took longer because its rows looked back at much changes no estimate."""
    found = times(*QUICK, attended_s=1e-6)
    for _ in range(50):
        found.observe(8, 8000, 0.0181)
    assert found.seconds(found.fitting(8)) == pytest.approx(0.0101)
    assert found.seconds(found.fitting(1), 1000) == pytest.approx(0.0051)


@pytest.mark.parametrize(
    ("remaining", "rows", "given"),
    [
        ([100], 8, [8]),
        ([3], 8, [3]),
        ([1000, 20], 8, [4, 4]),
        ([1000, 2], 8, [6, 2]),
        ([1000, 1000], 8, [8, 0]),
        ([1000, 500, 30], 7, [4, 0, 3]),
        ([2, 500, 30], 16, [2, 0, 14]),
        ([5, 5], 1, [1, 0]),
        ([5, 5], 0, [0, 0]),
        ([], 9, []),
    ],
)
def test_prompts_share(remaining: list[int], rows: int, given: list[int]) -> None:
    assert share(remaining, rows) == given


def test_no_prompt_waits_for_ever_and_all_rows_are_used() -> None:
    random = np.random.default_rng(2)
    for _ in range(300):
        remaining = [int(random.integers(1, 200)) for _ in range(random.integers(1, 9))]
        rows = int(random.integers(1, 64))
        given = share(remaining, rows)
        assert sum(given) == min(rows, sum(remaining))
        assert all(0 <= part <= most for part, most in zip(given, remaining, strict=True))
        assert given[0] >= min(remaining[0], rows // 2)
