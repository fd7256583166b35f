"""What clients send and get about an operator's actions on a running cluster."""

from __future__ import annotations

from typing import Literal

from api.schemas import Answer, Body


class Leadership(Answer):
    """Who leads now, and who did. `moved`: whether that is another peer."""

    leader: str
    epoch: int
    previous: str
    moved: bool


class GossipMember(Answer):
    """What a host says of itself, some seconds ago; `status` is what the asked one thinks of it. Numbers are null where
    it has said none. `queued`: in the whole cluster, if that one leads."""

    peer_id: str
    status: Literal["alive", "leaving", "left", "failed"]
    role: str
    epoch: str
    voter: bool
    api: str
    version: str
    workers: int | None
    workers_up: int | None
    slots: int | None
    running: int | None
    queued: int | None


class Gossip(Answer):
    members: list[GossipMember]
    total: int


class RotateGossipKey(Body):
    """`force`: also while hosts are away, which then do not find back by themselves."""

    force: bool = False


class GossipKeyRotated(Answer):
    """`members` use the new key; `removed` older ones are void."""

    members: int
    removed: int
