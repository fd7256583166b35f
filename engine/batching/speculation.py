"""Tokens guessed from the text itself and computed in the same step as the one that is known (prompt lookup). Pure.

When the last few tokens stood in prompt or text before, what followed them then is proposed. A step gives the logits
after each proposed token; the sampler draws from them in turn, as it would have one by one, and what it drew decides
how many were right. So the text is that of plain decoding, also when it is sampled, penalised or kept to a schema.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.batching.pacing import Bucket, StepTimes
from engine.batching.prefixes import TokenIds

NGRAMS = (3, 2)  # how many last tokens are looked for, the most telling first
PROPOSED_MAX = 7  # with the known token a step of 8 rows
RATE_FIRST = 0.5
OBSERVED_WEIGHT = 0.15


def proposal(tokens: TokenIds, most: int) -> list[int]:
    """At most `most` tokens that may follow `tokens`, by the latest place where its last ones stood before; or []."""
    count = len(tokens)
    for size in NGRAMS:
        if most < 1 or count <= size:
            continue
        ends = np.flatnonzero(tokens[size - 1 : -1] == tokens[-1]) + size - 1  # where an earlier one may end
        for back in range(1, size):
            ends = ends[tokens[ends - back] == tokens[-1 - back]]
        if len(ends):
            # what repeats every `period` tokens is taken to go on so, also beyond what has been said
            period = count - 1 - int(ends[-1])
            return [int(token) for token in np.resize(tokens[-period:], most)]
    return []


class Acceptance:
    """How likely a proposed token of one run is right, by those that were, computed ahead or not."""

    def __init__(self) -> None:
        self.rate = RATE_FIRST

    def observe(self, right: bool) -> None:
        """The token that was drawn is the one that had been proposed in its place, or is not."""
        self.rate += OBSERVED_WEIGHT * (right - self.rate)


def rows_beyond(
    times: StepTimes, proposed: Sequence[tuple[float, int]], positions: Sequence[int]
) -> list[int]:
    """How many proposed tokens to compute for each run that decodes, given how likely one is right and how many it has.

    `positions` are the runs': what each of their rows looks back at.
    Rows that the step's size has to spare cost nothing. A larger size is taken if every run is then expected to get
    on faster than without: none pays for another.
    """
    runs = len(proposed)
    chances = [
        (rate**nth, index) for index, (rate, count) in enumerate(proposed) for nth in range(1, count + 1)
    ]
    chances.sort(
        key=lambda chance: -chance[0]
    )  # a run's own stay in order: each is less likely than the one before
    if not chances:
        return [0] * runs
    base = times.fitting(runs)
    alone_s = times.seconds(base, sum(positions))
    best, best_speed = [0] * runs, 0.0
    for bucket in times.buckets:
        rows, expected = _given(chances, bucket, runs)
        attended = sum((1 + ahead) * at for ahead, at in zip(rows, positions, strict=True))
        slowdown = times.seconds(bucket, attended) / alone_s
        if bucket.rows < base.rows or (bucket != base and 1.0 + min(expected) < slowdown):
            continue
        speed = (runs + sum(expected)) / slowdown
        if speed > best_speed:
            best, best_speed = rows, speed
    return best


def _given(chances: Sequence[tuple[float, int]], bucket: Bucket, runs: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens that fit: how many each run gets, and how many of those it may expect to be right."""
    rows, expected = [0] * runs, [0.0] * runs
    for chance, index in chances[: max(0, min(bucket.rows, bucket.logits) - runs)]:
        rows[index] += 1
        expected[index] += chance
    return rows, expected
