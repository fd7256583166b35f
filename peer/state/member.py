"""A member of the cluster as gossip shows it, and what its tags say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from peer.state.base import Record


class Member(Record, frozen=True):
    """`status` is the local agent's opinion, not a fact: the living are called failed and the dead alive."""

    peer_id: str
    address: str  # of the host, without a port
    status: Literal["alive", "leaving", "left", "failed"]
    tags: Mapping[str, str] = {}
    port: int = 7946  # of gossip
