"""What the API asks of the counts that the whole cluster shares: requests per key, WebSockets per client, tickets.

The leader keeps these counts in its memory and answers at once: nothing of them is durable.
"""

from __future__ import annotations

from peer.state.base import Record


class Spend(Record, frozen=True, tag="spend"):
    """-> Verdict | None: count a request of this key if its limits allow it; None where it has no limits."""

    key_id: str
    per_hour: int | None
    per_minute: int | None


class KeepTicket(Record, frozen=True, tag="keep_ticket"):
    """-> None. The caller made the ticket, which stands for the key once, for limits.TICKET_S. RateLimited."""

    ticket: str
    key_id: str


class RedeemTicket(Record, frozen=True, tag="redeem_ticket"):
    """-> str, the key id; the ticket is used up. Unauthorized."""

    ticket: str


Counted = Spend | KeepTicket | RedeemTicket


class Verdict(Record, frozen=True):
    """Of the window that is nearest to its limit. Times are seconds from now, whole, rounded up."""

    allowed: bool
    limit: int
    remaining: int
    reset_s: int
    retry_after_s: int = 0


class Client(Record, frozen=True):
    """Whose WebSocket a reader of events serves: it counts as one for as long as the reader reads."""

    key_id: str
    sockets_max: int | None  # None: it was admitted before, by an earlier leader
