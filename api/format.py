"""How numbers become the texts of the API. Pure; every text that a client reads is made here."""

from __future__ import annotations

import math
import time
from functools import lru_cache

GIB = 1 << 30


@lru_cache(maxsize=4096)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))


def timestamp(wall: float) -> str:
    """Seconds since 1970 as ISO-8601 in UTC, whole seconds: 2025-05-30T10:00:00Z."""
    return _second(int(wall // 1))


def timestamp_or_none(wall: float | None) -> str | None:
    """As `timestamp`; None and 0 (never) stay None."""
    return timestamp(wall) if wall else None


def memory(size: float) -> str:
    """Bytes as "24GB" or "6.5GB". A GB is 2**30 bytes, as on the box of a graphics card."""
    amount = max(0.0, size) / GIB
    if 0 < amount < 0.05:
        return f"{amount:.3f}".rstrip("0").rstrip(".") + "GB"
    return _short(amount) + "GB"


def duration(seconds: float) -> str:
    """A measured time: "3.2s"."""
    return f"{_positive(seconds):.1f}s"


def duration_or_none(seconds: float | None) -> str | None:
    return None if seconds is None else duration(seconds)


def estimate(seconds: float) -> str:
    """An estimated or coarse time in seconds: "45s", below ten seconds "2.5s"."""
    amount = _positive(seconds)
    return f"{amount:.0f}s" if amount >= 9.95 else _short(amount) + "s"


def estimate_or_none(seconds: float | None) -> str | None:
    return None if seconds is None else estimate(seconds)


def span(seconds: float) -> str:
    """An estimated time that may be long: "45s", "2m", "1h 5m"; minutes are rounded up."""
    whole = math.ceil(_positive(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes = -(-whole // 60)
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h {minutes % 60}m"


def uptime(seconds: float) -> str:
    """ "7d 4h 23m", always with all three."""
    minutes = int(_positive(seconds)) // 60
    return f"{minutes // 1440}d {minutes // 60 % 24}h {minutes % 60}m"


def throughput(per_minute: int) -> str:
    return f"{per_minute} tasks/min"


def percent(value: float | None) -> float | None:
    """A percentage as a number, one decimal."""
    return None if value is None else round(value, 1)


def percent_text(value: float | None) -> str | None:
    """ "75%"."""
    return None if value is None else f"{value:.0f}%"


def _positive(seconds: float) -> float:
    """Clocks that were set back must not show negative times."""
    return seconds if seconds > 0 else 0.0


def _short(amount: float) -> str:
    """One decimal, none where it is zero."""
    text = f"{amount:.1f}"
    return text[:-2] if text.endswith(".0") else text
