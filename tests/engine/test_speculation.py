"""What is proposed from a text itself, and when it pays to compute it."""

from __future__ import annotations

import numpy as np
import pytest

from engine.batching.pacing import Bucket, StepTimes
from engine.batching.speculation import RATE_FIRST, Acceptance, proposal, rows_beyond


@pytest.mark.parametrize(
    ("tokens", "most", "proposed"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 3, 4, 5, 9, 1, 2, 3], 3, [4, 5, 9]),
        ([7, 2, 3, 4, 5, 9, 1, 2, 3], 3, [4, 5, 9]),  # two are enough
        ([7, 8, 3, 4, 5, 9, 1, 2, 3], 3, []),  # one is not
        ([1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3], 1, [7]),  # three are better than two that came later
        ([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], 1, [8]),  # of equals the latest
        ([5, 6, 5, 6], 5, [5, 6, 5, 6, 5]),  # beyond what has been said
        ([4, 4, 4], 3, [4, 4, 4]),
        ([1, 2, 3, 1, 2], 0, []),
        ([1, 2, 3, 1, 2], -1, []),
        ([1, 2], 4, []),
        ([1], 4, []),
    ],
)
def test_proposals(tokens: list[int], most: int, proposed: list[int]) -> None:
    assert proposal(np.array(tokens, dtype=np.int32), most) == proposed


def times(*milliseconds: float) -> StepTimes:
    return StepTimes(
        [Bucket(rows, min(rows, 8), ms / 1e3) for rows, ms in zip((1, 4, 8, 16), milliseconds, strict=True)]
    )


CPU = (41, 58, 76, 110)  # SmolLM2 on two cores, measured
STEEP = (10, 40, 80, 160)  # rows cost what they cost alone


@pytest.mark.parametrize(
    ("measured", "proposed", "rows"),
    [
        (CPU, [(0.9, 7)], [7]),
        (CPU, [(0.5, 7)], [3]),
        (CPU, [(0.2, 7)], [0]),
        (CPU, [(0.9, 1)], [1]),
        (CPU, [(0.9, 0)], [0]),
        (STEEP, [(0.9, 7)], [0]),
        (STEEP, [(0.1, 7), (0.4, 7)], [0, 2]),  # rows to spare
        (CPU, [(0.9, 7), (0.1, 7)], [2, 0]),  # more would hold the second up
        (CPU, [(0.9, 7), (0.9, 7)], [3, 3]),
        (CPU, [(0.9, 7), (0.9, 0), (0.9, 0), (0.9, 0)], [0, 0, 0, 0]),
        (CPU, [(0.9, 7)] * 8, [0] * 8),
        (CPU, [], []),
    ],
)
def test_rows_beyond(measured: tuple[float, ...], proposed: list[tuple[float, int]], rows: list[int]) -> None:
    assert rows_beyond(times(*measured), proposed, [100] * len(proposed)) == rows


def test_what_would_have_been_right_counts_too() -> None:
    """A run that cannot be foretold is left alone, at no cost, until it repeats itself."""
    acceptance = Acceptance()
    tried = []
    for right in [False] * 20 + [True] * 20:
        tried.append(rows_beyond(times(*CPU), [(acceptance.rate, 7)], [100])[0])
        acceptance.observe(right)
    assert tried[0] == 3
    assert tried[5:20] == [0] * 15
    assert tried[-1] == 7
    assert 22 < tried.index(3, 20) < 30
    assert RATE_FIRST < acceptance.rate < 1
