"""What to do with an engine process that has died."""

from __future__ import annotations

from collections.abc import Sequence

from peer.state.base import Record


class Verdict(Record, frozen=True):
    """Start it again after `wait_s`; `quarantined` means that it is in state error until then."""

    wait_s: float
    quarantined: bool
    deaths_recent: int


def after_death(
    died_at: Sequence[float],
    now: float,
    *,
    backoff_s: Sequence[float],
    deaths_max: int,
    window_s: float,
    quarantine_s: float,
) -> Verdict:
    """`died_at` are all deaths that still count, the newest included; those outside the window do not."""
    recent = sum(1 for at in died_at if now - at <= window_s)
    if recent >= deaths_max:
        return Verdict(wait_s=quarantine_s, quarantined=True, deaths_recent=recent)
    return Verdict(
        wait_s=backoff_s[min(recent, len(backoff_s)) - 1] if recent else 0.0,
        quarantined=False,
        deaths_recent=recent,
    )
