"""What clients send and get about an operator's actions on a running cluster."""

from __future__ import annotations

from api.schemas import Answer, Body


class Leadership(Answer):
    """Who leads now, and who did. `moved`: whether that is another peer."""

    leader: str
    epoch: int
    previous: str
    moved: bool


class RotateGossipKey(Body):
    """`force`: also while hosts are away, which then do not find back by themselves."""

    force: bool = False


class GossipKeyRotated(Answer):
    """`members` use the new key; `removed` older ones are void."""

    members: int
    removed: int
