"""What every decision returns: changes to make durable, what to do after that, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peer.state.event import EventDraft
from peer.state.order import Order
from peer.state.snapshot import Change


@dataclass(slots=True)
class Decision:
    """`orders` go to peers and `reply` to the caller only when `changes` and `events` are durable."""

    changes: list[Change] = field(default_factory=list)
    orders: list[tuple[str, Order]] = field(default_factory=list)  # (peer_id, order)
    events: list[EventDraft] = field(default_factory=list)
    reply: Any = None
    reasons: list[str] = field(default_factory=list)

    def event(self, name: str, **data: Any) -> None:
        self.events.append(EventDraft(event=name, data=data))

    def add(self, other: Decision) -> None:
        """Take in what another decision wants; its reply is dropped."""
        self.changes += other.changes
        self.orders += other.orders
        self.events += other.events
        self.reasons += other.reasons
