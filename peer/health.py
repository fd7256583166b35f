"""Whether the peer's loops go on: what a watchdog asks before it gives a sign of life."""

from __future__ import annotations

from typing import Final

LATE_S: Final = 30.0  # more than any wait in a loop that otherwise comes round every second or faster


def stuck(now: float, **came_round_at: float | None) -> str:
    """Which loop has not come round for too long, for people; "" if none. None: that loop does not run now.

    Times are those of `trio.current_time`, which stands still while the host sleeps.
    """
    for name, at in came_round_at.items():
        if at is not None and now - at > LATE_S:
            return f"the {name} has not come round for {now - at:.0f} s"
    return ""
