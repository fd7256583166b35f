"""A member of the cluster as gossip shows it, what its tags say, and what gossip is encrypted with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

from peer.state.base import Record

_LOAD: Final = re.compile(r"([0-9]{1,6})/([0-9]{1,6}) ([0-9]{1,6})/([0-9]{1,6}) ([0-9]{1,9})", re.ASCII)


class Member(Record, frozen=True):
    """`status` is the local agent's opinion, not a fact: the living are called failed and the dead alive."""

    peer_id: str
    address: str  # of the host, without a port
    status: Literal["alive", "leaving", "left", "failed"]
    tags: Mapping[str, str] = {}
    port: int = 7946  # of gossip


class Load(Record, frozen=True):
    """How busy a host says it is: a hint, some seconds old."""

    workers: int
    up: int  # of these
    slots: int  # of those that are up
    running: int  # tasks in them
    queued: int = 0  # in the whole cluster, as the leader says it

    def text(self) -> str:
        """As a tag: few bytes."""
        return f"{self.up}/{self.workers} {self.running}/{self.slots} {self.queued}"


def load_of(tags: Mapping[str, str]) -> Load | None:
    """What another host has written; None if it said nothing, or nonsense."""
    found = _LOAD.fullmatch(tags.get("load", ""))
    if found is None:
        return None
    up, workers, running, slots, queued = map(int, found.groups())
    return Load(workers=workers, up=up, slots=slots, running=running, queued=queued)


class KeyReport(Record, frozen=True, kw_only=True):
    """What became of a question about keys to all members. `done`: every member has answered, and none refused.

    Keys are base64 of 32 bytes.
    """

    nodes: int  # that are up, as far as the one that asked knows
    answered: int
    failed: int
    messages: Mapping[str, str] = {}  # by member: why it failed
    keys: Mapping[str, int] = {}  # how many members have each, where that was asked
    error: str = ""

    @property
    def done(self) -> bool:
        return not self.error and not self.failed and self.answered == self.nodes > 0


class KeyStep(Record, frozen=True):
    """What all members are to do with a key: install before use, and never remove the one in use."""

    action: Literal["install", "use", "remove"]
    key: str


class KeyRotation(Record, frozen=True):
    """Gossip has a new key: these many members use it, and so many older ones are void."""

    members: int
    removed: int
