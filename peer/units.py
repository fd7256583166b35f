"""Texts with units, as people write them in configurations and on command lines: "90s", "24GB"."""

from __future__ import annotations

import re
from fractions import Fraction

SECONDS: dict[str, int | Fraction] = {
    "ms": Fraction(1, 1000),
    "s": 1,
    "m": 60,
    "h": 3_600,
    "d": 86_400,
    "w": 604_800,
}
BYTES = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", 1)},
}
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s?([A-Za-z]*)", re.ASCII)
_BYTES_BY_LOWER = {unit.lower(): factor for unit, factor in BYTES.items()}


def parse_seconds(text: str) -> float:
    """ "90s", "5m", "2h", "30d", "250ms" or a plain number of seconds. Raises ValueError that helps."""
    number, unit = _split(text, "a duration like 90s, 5m, 2h or 30d")
    factor = SECONDS.get(unit or "s")
    if factor is None:
        raise ValueError(f"unknown unit `{unit}`; durations end in {', '.join(SECONDS)}")
    return float(number * factor)


def parse_bytes(text: str) -> int:
    """ "24GB" (powers of 1000), "512MiB" (powers of 1024) or a plain number. Raises ValueError as above."""
    number, unit = _split(text, "a size like 24GB or 512MiB")
    factor = _BYTES_BY_LOWER.get((unit or "B").lower())
    if factor is None:
        raise ValueError(f"unknown unit `{unit}`; sizes end in {', '.join(BYTES)}")
    size = number * factor
    if size.denominator != 1:
        raise ValueError(f"`{text}` is not a whole number of bytes")
    return int(size)


def format_seconds(seconds: float) -> str:
    """A short text that `parse_seconds` reads back as the same value, to a nanosecond."""
    for unit, factor in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= factor and seconds % factor == 0:
            return f"{int(seconds // factor)}{unit}"
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def format_bytes(size: int) -> str:
    """The shortest text that `parse_bytes` reads back as the same value."""
    for unit, factor in sorted(BYTES.items(), key=lambda item: -item[1]):
        if unit != "B" and size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return f"{size}B"


def _split(text: str, expected: str) -> tuple[Fraction, str]:
    found = _QUANTITY.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"`{text}` is not {expected}")
    return Fraction(found[1]), found[2]
