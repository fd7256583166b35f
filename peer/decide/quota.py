"""Counts that the whole cluster shares: requests per API key in sliding windows of an hour and of a minute, WebSockets
per client, and one-time tickets.

The leader holds them, in memory: they are worth no commit. After a failover unused tickets are void (the client asks
for another), sockets are counted anew by the readers of events that come back, and windows begin with what the new
leader itself has let through while it followed.

A window is kept as counts per slice (a sixtieth of it), so that a key costs at most 2 x 61 small entries. A
slice counts until all of it has left the window: a client never gets more than its limit in any hour or
minute, and waits at most one slice longer than an exact record of every request would make it.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager

from peer import limits
from peer.errors import RateLimited, Unauthorized
from peer.state.quota import Client, Counted, KeepTicket, Spend, Verdict

SLICES = 60


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


class Tickets:
    """One-time, short-lived stand-ins for a key, for clients that cannot set headers."""

    def __init__(self, tickets_max: int = limits.KEYS_MAX) -> None:
        self._max = tickets_max
        self._tickets: OrderedDict[str, tuple[str, float]] = OrderedDict()  # oldest first

    def keep(self, ticket: str, key_id: str, now: float) -> None:
        """Raises RateLimited when too many are open."""
        while self._tickets and next(iter(self._tickets.values()))[1] <= now:
            self._tickets.popitem(last=False)
        if ticket not in self._tickets and len(self._tickets) >= self._max:
            raise RateLimited("Too many unused tickets", retry_after_s=limits.TICKET_S)
        self._tickets.setdefault(ticket, (key_id, now + limits.TICKET_S))

    def redeem(self, ticket: str, now: float) -> str:
        """The key id that it stands for; it is used up. Raises Unauthorized."""
        key_id, expires = self._tickets.pop(ticket, ("", 0.0))
        if not key_id or now >= expires:
            raise Unauthorized("The ticket is unknown, used or expired", code="invalid_ticket")
        return key_id


class Quota:
    """What the leader counts for all peers. `windows` are this peer's, which has counted what came to it before."""

    def __init__(self, windows: RateLimiter | None = None) -> None:
        self.windows = windows if windows is not None else RateLimiter()
        self.tickets = Tickets()
        self.sockets: Counter[str] = Counter()  # open WebSockets by key, those of all peers

    def answer(self, request: Counted, now: float) -> Verdict | str | None:
        """As the request's docstring says. `now` is monotonic."""
        if isinstance(request, Spend):
            return self.windows.check(request.key_id, now, request.per_hour, request.per_minute)
        if isinstance(request, KeepTicket):
            self.tickets.keep(request.ticket, request.key_id, now)
            return None
        return self.tickets.redeem(request.ticket, now)

    @contextmanager
    def socket(self, client: Client | None) -> Iterator[None]:
        """While open one more of the client's WebSockets is counted; None: of no client. Raises RateLimited."""
        if client is None:
            yield
            return
        if client.sockets_max is not None and self.sockets[client.key_id] >= client.sockets_max:
            raise RateLimited(
                f"This client has {client.sockets_max} WebSocket connections open, which is the limit",
                code="too_many_websockets",
                details={"limit": client.sockets_max},
                retry_after_s=5.0,
            )
        self.sockets[client.key_id] += 1
        try:
            yield
        finally:
            self.sockets[client.key_id] -= 1
            if not self.sockets[client.key_id]:
                del self.sockets[client.key_id]
