"""Which rows of a step go to prompts, by what steps take."""

from __future__ import annotations

import numpy as np
import pytest

from engine.batching.pacing import Bucket, StepTimes, prompt_rows, share


def times(*milliseconds: float, rows: tuple[int, ...] = (1, 4, 8, 16, 32)) -> StepTimes:
    return StepTimes([Bucket(size, size, ms / 1e3) for size, ms in zip(rows, milliseconds, strict=True)])


CPU = (41, 58, 76, 110, 186)  # SmolLM2 on two cores, measured


@pytest.mark.parametrize(
    ("measured", "decoding", "rows"),
    [
        (CPU, 0, 32),
        (CPU, 1, 7),
        (CPU, 4, 12),
        (CPU, 8, 24),
        ((10, 10, 10, 10, 11), 1, 31),  # a device that does not mind
        ((10, 40, 80, 160, 320), 1, 3),  # none is quick: the smallest, or the prompt would wait for ever
        ((10, 40, 80, 160, 320), 4, 4),
        (CPU, 32, 0),
    ],
)
def test_prompts_get_what_streams_can_bear(measured: tuple[float, ...], decoding: int, rows: int) -> None:
    assert prompt_rows(times(*measured), decoding) == rows


def test_measurements_follow_the_steps() -> None:
    """Slowly enough that one late step changes nothing, and back again when a size is no longer taken."""
    found = times(*CPU)
    found.observe(8, 5.0)
    assert prompt_rows(found, 1) == 7
    for _ in range(20):
        found.observe(7, 0.3)
    assert found.seconds(found.fitting(8)) == pytest.approx(0.3, rel=0.02)
    assert prompt_rows(found, 1) == 3
    for _ in range(1000):
        found.observe(1, 0.041)
    assert found.seconds(found.fitting(8)) == pytest.approx(0.076, rel=0.1)
    assert prompt_rows(found, 1) == 7


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
