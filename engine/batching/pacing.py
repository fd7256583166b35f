"""How many rows of a step go to prompts, and to which, by what steps were measured to take. Pure.

A step of more rows takes longer: on two CPU cores 32 rows take seven times as long as one, on a GPU perhaps no longer.
So does one whose rows look back at more. Streams must not stutter while a prompt joins, and prompts must not wait
longer than that needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

# The longest of a hundred gaps of a stream while prompts are computed, beside the usual one without: 3 is noticed, and
# this leaves room for what the estimates miss.
GAP_MAX = 2.3
SPREAD_AT_FIRST = 1.1
SPREAD_STEP = 0.05  # how far one gap moves the estimate of how much they vary
SPREAD_MAX = 1.4  # of a machine that varies more prompts would wait for what no plan mends
LOOKING_BACK = 0.25  # of the smallest step's time may be added to it by what a prompt's rows look back at
OBSERVED_WEIGHT = 0.2
UNOBSERVED_WEIGHT = 0.001  # old measurements of one size fade towards what others say, in thousands of steps
SPIKE_MAX = 1.25  # a step that waited for something else counts for at most so much more than the estimate


@dataclass(frozen=True)
class Bucket:
    """A size of steps: at most `rows` rows and the logits of `logits` of them, by what warm-up measured.

    In `step_s`, and `attended_s` more for each position that one of its rows looks at.
    """

    rows: int
    logits: int
    step_s: float
    attended_s: float = 0.0


class StepTimes:
    """Seconds of a step for each size: measured at warm-up, then at every step."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        """`buckets` by rising rows. None takes longer than a larger one: where it seems so, warm-up was disturbed."""
        quickest = list(itertools.accumulate((bucket.step_s for bucket in reversed(buckets)), min))
        self.buckets = tuple(
            replace(bucket, step_s=step_s) for bucket, step_s in zip(buckets, reversed(quickest), strict=True)
        )
        self._slower = {bucket.rows: 1.0 for bucket in buckets}  # than at warm-up
        self._between = 0.0
        self._spread = SPREAD_AT_FIRST  # the longest gap in a hundred, beside what it was expected to be

    @property
    def bearable(self) -> float:
        """How many times as long as one that only decodes a step may take, so that GAP_MAX holds."""
        return GAP_MAX / self._spread

    @property
    def rows_max(self) -> int:
        return self.buckets[-1].rows

    def fitting(self, rows: int) -> Bucket:
        """The smallest size that has room for `rows`."""
        return next(bucket for bucket in self.buckets if bucket.rows >= rows)

    def seconds(self, bucket: Bucket, attended: float = 0.0) -> float:
        """From a step of this size to the next; `attended`: positions that its rows look at, together."""
        return self._between + self._slower[bucket.rows] * _at_warm_up(bucket, attended)

    def rows_within(self, bucket: Bucket, seconds: float, attended: float, position: float) -> float:
        """How many rows at `position` a step has time for, beside others that look at `attended` positions."""
        left = seconds - self.seconds(bucket, attended)
        each = self._slower[bucket.rows] * bucket.attended_s * position
        if left <= 0:
            return 0.0
        return left / each if each > 0 else float("inf")

    def observe(self, rows: int, attended: float, seconds: float, between: float | None = None) -> None:
        """A step of `rows` rows took so long, and began so long after the one before if there was something to do
        then: drawing tokens, sending them, other models' steps."""
        size = self.fitting(rows)
        if between is not None:
            self._observe_spread((between + seconds) / self.seconds(size, attended))
            smallest = self.buckets[0]
            seen = min(between, self._slower[smallest.rows] * _at_warm_up(smallest, 0.0))
            self._between += OBSERVED_WEIGHT * (seen - self._between)
        slower = min(seconds / _at_warm_up(size, attended), SPIKE_MAX * self._slower[size.rows])
        for other, now in self._slower.items():
            weight = OBSERVED_WEIGHT if other == size.rows else UNOBSERVED_WEIGHT
            self._slower[other] += weight * (slower - now)

    def _observe_spread(self, ratio: float) -> None:
        """Rests where one in a hundred is above it (Robbins and Monro, 1951)."""
        self._spread += SPREAD_STEP * (0.99 if ratio > self._spread else -0.01)
        self._spread = min(max(self._spread, 1.0), SPREAD_MAX)


def _at_warm_up(bucket: Bucket, attended: float) -> float:
    return max(bucket.step_s + bucket.attended_s * attended, 1e-9)


def prompt_rows(times: StepTimes, decoding: Sequence[int], position: int) -> int:
    """Rows for prompts in a step beside rows that decode: all there are if nothing decodes.

    Else as many as leave the step at most `bearable` times as long as decoding alone; of the smallest size with any
    room, as it has to be taken, those that do not make it much longer, and one at least. `decoding`: the decoding rows'
    positions; `position`: the furthest prompt's.
    """
    if not decoding:
        return times.rows_max
    roomy = [bucket for bucket in times.buckets if bucket.rows > len(decoding)]
    if not roomy:
        return 0
    attended = sum(decoding)
    bearable = times.bearable * times.seconds(times.fitting(len(decoding)), attended)
    smallest = (1 + LOOKING_BACK) * times.seconds(roomy[0], attended)
    most = 1
    for bucket in roomy:
        allowed = max(bearable, smallest) if bucket is roomy[0] else bearable
        room = bucket.rows - len(decoding)
        most = max(most, int(min(room, times.rows_within(bucket, allowed, attended, position))))
    return most


def share(remaining: Sequence[int], rows: int) -> list[int]:
    """How many of `rows` each prompt gets; `remaining` are their tokens still to compute, the first to come first.

    Half go to the first, so that none waits for ever; the rest to the shortest, so that a question does not wait for
    somebody's book. Equal ones thus end one after the other, not all at the end.
    """
    given = [0] * len(remaining)
    order = sorted(range(len(remaining)), key=lambda index: remaining[index])
    left = rows
    for index, most in ((0, -(-rows // 2)), *((index, rows) for index in order)):
        if index < len(remaining):
            part = min(most, remaining[index] - given[index], left)
            given[index] += part
            left -= part
    return given
