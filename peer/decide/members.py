"""What a peer tells others of itself in its gossip tags, and what it concludes from theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peer.errors import Conflict, NotFound
from peer.limits import TAGS_BYTES_MAX
from peer.state.member import Load, Member

_OPTIONAL = ("load", "version")  # left out, in this order, when the tags are too long


@dataclass(frozen=True, slots=True)
class Hint:
    """Who leads, as far as gossip knows."""

    peer_id: str
    epoch: int


def tags(
    *, role: str, epoch: int, api: str, link: str, voter: bool, wire: int, version: str, load: str = ""
) -> dict[str, str]:
    """At most TAGS_BYTES_MAX bytes of keys and values: what is optional goes first.

    Raises ValueError if the addresses alone are too long.
    """
    wanted = {
        "role": role,
        "epoch": str(epoch),
        "api": api,
        "link": link,
        "voter": "1" if voter else "0",
        "wire": str(wire),
        "version": version,
        "load": load,
    }
    for name in _OPTIONAL:
        if _size(wanted) > TAGS_BYTES_MAX:
            del wanted[name]
    if _size(wanted) > TAGS_BYTES_MAX:
        raise ValueError(
            f"the tags take {_size(wanted)} bytes of {TAGS_BYTES_MAX}: the addresses are too long"
        )
    return wanted


def worth_telling(told: Load | None, now: Load) -> bool:
    """Whether a load differs so much from what was told that it is worth a change of tags, which all hosts hear of:
    workers came or went, a host fell idle, began or is full, or a quarter of its slots or half of the queue changed."""
    if told is None or (told.workers, told.up, told.slots) != (now.workers, now.up, now.slots):
        return True
    if told.running != now.running and {told.running, now.running} & {0, now.slots}:
        return True
    if 4 * abs(told.running - now.running) >= max(now.slots, 4):
        return True
    return 2 * abs(told.queued - now.queued) > max(told.queued, now.queued)


def named(peer_ids: Iterable[str], name: str) -> str:
    """The peer of that name: its own, or its host's where only one is of that host. Raises NotFound, Conflict.

    A peer's name is its host's, a dash and some digits.
    """
    known = sorted(peer_ids)
    if name in known:
        return name
    found = [peer_id for peer_id in known if peer_id.rpartition("-")[0] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise Conflict(
            f"{len(found)} peers are called {name}; give one by its whole name",
            code="ambiguous_host",
            details={"peer_ids": found},
        )
    raise NotFound(f"there is no host `{name}`", code="host_not_found", details={"host": name})


def _size(wanted: Mapping[str, str]) -> int:
    """With what their encoding adds, at most: two length bytes each side."""
    return sum(len(name.encode()) + len(value.encode()) + 4 for name, value in wanted.items())


def leader(members: Iterable[Member]) -> Hint | None:
    """The living member that says it leads under the highest epoch. Tags are others' text: nonsense is passed over."""
    hints = [
        Hint(member.peer_id, int(epoch))
        for member in members
        if member.status == "alive"
        and member.tags.get("role") == "leader"
        and (epoch := member.tags.get("epoch", "")).isascii()
        and epoch.isdigit()
        and len(epoch) < 20
    ]
    return max(hints, key=lambda hint: (hint.epoch, hint.peer_id), default=None)


def changes(before: Mapping[str, Member], after: Mapping[str, Member]) -> tuple[Member, ...]:
    """Members whose status is another than before, in order of name; who is not listed any more has left."""
    gone = [
        Member(peer_id=name, address=member.address, status="left", tags=member.tags)
        for name, member in before.items()
        if name not in after and member.status != "left"
    ]
    new = [
        member for name, member in after.items() if name not in before or before[name].status != member.status
    ]
    return tuple(sorted([*gone, *new], key=lambda member: member.peer_id))
