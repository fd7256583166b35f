"""How many rows of a step go to prompts, and to which, by what steps were measured to take. Pure.

A step of more rows takes longer: on two CPU cores 32 rows take five times as long as one, on a GPU perhaps no longer.
Streams must not stutter while a prompt joins, and prompts must not wait longer than that needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SLOWDOWN_MAX = 2.5  # a step that also has prompts, beside one that only decodes: a gap of 3 is noticed
OBSERVED_WEIGHT = 0.2
UNOBSERVED_WEIGHT = (
    0.005  # old measurements of one size fade towards what the others say, in hundreds of steps
)
SPIKE_MAX = 2.0  # a step that waited for something else counts for at most so much more than the estimate


@dataclass(frozen=True)
class Bucket:
    """A size of steps: at most `rows` rows and the logits of `logits` of them, in `step_s` at warm-up."""

    rows: int
    logits: int
    step_s: float


class StepTimes:
    """Seconds of a step for each size: measured at warm-up, then at every step."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        """`buckets` by rising rows."""
        self.buckets = tuple(buckets)
        self._first = {bucket.rows: max(bucket.step_s, 1e-9) for bucket in buckets}
        self._now = dict(self._first)

    @property
    def rows_max(self) -> int:
        return self.buckets[-1].rows

    def fitting(self, rows: int) -> Bucket:
        """The smallest size that has room for `rows`."""
        return next(bucket for bucket in self.buckets if bucket.rows >= rows)

    def seconds(self, bucket: Bucket) -> float:
        return self._now[bucket.rows]

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took so long."""
        size = self.fitting(rows).rows
        seen = min(seconds, SPIKE_MAX * self._now[size])
        for other, now in self._now.items():
            if other == size:
                self._now[other] += OBSERVED_WEIGHT * (seen - now)
            else:
                foreseen = seen * self._first[other] / self._first[size]
                self._now[other] += UNOBSERVED_WEIGHT * (foreseen - now)


def prompt_rows(times: StepTimes, decoding: int) -> int:
    """Rows for prompts in a step beside `decoding` rows that decode: all there are if nothing decodes.

    Else those of the largest size that takes at most SLOWDOWN_MAX times as long as decoding alone, and of the smallest
    with any room if none does.
    """
    if decoding == 0:
        return times.rows_max
    roomy = [bucket for bucket in times.buckets if bucket.rows > decoding]
    if not roomy:
        return 0
    allowed = SLOWDOWN_MAX * times.seconds(times.fitting(decoding))
    quick = [bucket for bucket in roomy if times.seconds(bucket) <= allowed]
    return (quick or roomy[:1])[-1].rows - decoding


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
