"""Rate limits per API key: sliding windows of an hour and of a minute.

A window is kept as counts per slice (a sixtieth of it), so that a key costs at most 2 x 61 small entries. A
slice counts until all of it has left the window: a client never gets more than its limit in any hour or
minute, and waits at most one slice longer than an exact record of every request would make it.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

import msgspec

from peer import limits

SLICES = 60


class Verdict(msgspec.Struct, frozen=True):
    """Of the window that is nearest to its limit. Times are seconds from now, whole, rounded up."""

    allowed: bool
    limit: int
    remaining: int
    reset_s: int
    retry_after_s: int = 0


class Window:
    """One sliding window of one key."""

    __slots__ = ("count", "slice_s", "slices")

    def __init__(self, window_s: float) -> None:
        self.slice_s = window_s / SLICES
        self.slices: deque[list[int]] = deque()  # [number of the slice, requests in it]
        self.count = 0

    def expire(self, now: float) -> int:
        """Forget what has left the window; the number of the current slice."""
        current = int(now // self.slice_s)
        slices = self.slices
        while slices and slices[0][0] < current - SLICES:
            self.count -= slices.popleft()[1]
        return current

    def add(self, current: int) -> None:
        if self.slices and self.slices[-1][0] >= current:
            self.slices[-1][1] += 1
        else:
            self.slices.append([current, 1])
        self.count += 1

    def room_in_s(self, now: float, limit: int) -> float:
        """When one more request fits."""
        excess = self.count - limit + 1
        for number, requests in self.slices:
            excess -= requests
            if excess <= 0:
                return (number + SLICES + 1) * self.slice_s - now
        return SLICES * self.slice_s

    def empty_in_s(self, now: float) -> float:
        return (self.slices[-1][0] + SLICES + 1) * self.slice_s - now if self.slices else 0.0


class RateLimiter:
    """Windows of the keys that were used last; at most `keys_max` of them."""

    def __init__(self, keys_max: int = limits.KEYS_MAX) -> None:
        self.keys_max = keys_max
        self._keys: OrderedDict[str, tuple[Window, Window]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, key_id: str, now: float, per_hour: int | None, per_minute: int | None) -> Verdict | None:
        """Count a request if its key's limits allow it. None: this key has no limits. `now` is monotonic."""
        if per_hour is None and per_minute is None:
            return None
        windows = self._keys.get(key_id)
        if windows is None:
            windows = self._keys[key_id] = (Window(3600.0), Window(60.0))
            if len(self._keys) > self.keys_max:
                self._keys.popitem(last=False)
        else:
            self._keys.move_to_end(key_id)
        hour, minute = windows
        in_hour, in_minute = hour.expire(now), minute.expire(now)
        waits = [
            window.room_in_s(now, limit)
            for window, limit in ((hour, per_hour), (minute, per_minute))
            if limit is not None and window.count >= limit
        ]
        if not waits:
            hour.add(in_hour)
            minute.add(in_minute)
        nearest, limit = hour, per_hour
        if per_minute is not None and (per_hour is None or per_minute - minute.count < per_hour - hour.count):
            nearest, limit = minute, per_minute
        return Verdict(
            allowed=not waits,
            limit=limit or 0,
            remaining=max(0, (limit or 0) - nearest.count),
            reset_s=math.ceil(nearest.empty_in_s(now)),
            retry_after_s=max(1, math.ceil(max(waits))) if waits else 0,
        )
