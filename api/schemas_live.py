"""What clients get as it happens: messages of WebSockets and of streams, and tickets for the former."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, UnsetType

from api.schemas import Answer, TokenLogprobs


class Ticket(Answer):
    ticket: str
    expires_in: int
    expires_at: str


class ClusterEvent(Answer):
    """A message of `/ws`."""

    id: int
    event: str
    timestamp: str
    data: dict[str, Any]


class TokenData(Answer):
    """Data of an SSE event `token`. `index` counts that attempt's tokens before this piece."""

    index: int
    text: str
    count: int
    attempt: int
    logprobs: list[TokenLogprobs] | UnsetType = UNSET


class RestartData(Answer):
    """Data of an SSE event `restart`: what came before is void."""

    attempt: int
    reason: str
