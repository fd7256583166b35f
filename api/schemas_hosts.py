"""What clients send and get about hosts: tokens that let them in, what they are, and putting them out."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from api.schemas import Answer, Body
from peer.state.enrol import TOKEN_S_DEFAULT, TOKEN_S_MAX, TOKEN_S_MIN, HostStatus


class CreateJoinToken(Body):
    """`ttl_s`: for how long it may be used. `voter`: whether the host that joins with it may lead."""

    ttl_s: Annotated[float, Meta(ge=TOKEN_S_MIN, le=TOKEN_S_MAX)] = TOKEN_S_DEFAULT
    voter: bool = True


class JoinToken(Answer):
    """`token` is what `bitinglip join` needs, shown this once."""

    token: str
    token_id: str
    expires_at: str
    voter: bool


class Host(Answer):
    """Of a revoked host only its name and `revoked_at` are known."""

    peer_id: str
    status: HostStatus
    voter: bool | None
    addresses: tuple[str, ...]
    enrolled_at: str | None
    certificate_expires_at: str | None
    revoked_at: str | None
    draining: bool
    models: int
    tasks: int


class DrainedHost(Answer):
    """`draining`: from now on no model is loaded there, and what is there moves away."""

    peer_id: str
    draining: bool


class HostList(Answer):
    hosts: list[Host]
    total: int


class RevokedHost(Answer):
    peer_id: str
    revoked_at: str
