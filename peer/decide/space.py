"""Room in the store: what a voter does about its own member, and when clients and owners hear of it.

etcd takes no write any more once some member's file has reached its quota, until room is made and the alarm is taken
back: then nobody leads, so each voter sees to its own member, by itself. Before it comes to that, the history is
compacted, new tasks are refused, and files that are mostly free pages are defragmented, one member at a time and those
that lead last, as a member that is defragmented answers nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from peer.decide.decision import Decision
from peer.state.snapshot import Snapshot
from peer.state.voter import Room, RoomLevel, RoomTold, Space

WARNING: Final = 0.70  # of the quota is used: owners are told
CRITICAL: Final = 0.85  # no new tasks: what finishes, and what is forgotten, has to be written yet
CLEAR: Final = 0.05  # a level ends so much below where it began
CROWDED: Final = 0.90  # so large a file is defragmented before it reaches the quota
WORTH: Final = 0.20  # if so much of the quota would come free
WORTH_FULL: Final = 0.02  # where the store stands still
HAS_ROOM: Final = 0.95  # the alarm of a member with a file no larger is taken back
COMPACT_S: Final = 30.0  # between two compactions
OTHERS_S: Final = 30.0  # a member that does not take its own alarm back for so long may not be up
AGAIN_S: Final = 60.0  # between two defragmentations of one member
UNSURE_S: Final = 600.0  # the same where the store stands still and nothing seems to come free
LEADERS_S: Final = 600.0  # those that lead let the others go first

_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Memory:
    """Since when what is so has been so, and when this member was last seen to."""

    level: RoomLevel = ""
    since: Mapping[tuple[str, int], float] = field(default_factory=dict)
    compacted_at: float | None = None
    defragmented_at: float | None = None


@dataclass(frozen=True, slots=True)
class Compact:
    revision: int
    reason: str


@dataclass(frozen=True, slots=True)
class Defragment:
    """`alone`: no other member may do it at the same time."""

    alone: bool
    reason: str


@dataclass(frozen=True, slots=True)
class HandOver:
    """Let another peer lead, as this one's member is to be defragmented; if there is no other, do it all the same."""

    reason: str


@dataclass(frozen=True, slots=True)
class Disarm:
    member_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Renew:
    """Remove this learner, which cannot be defragmented: whoever leads adds it again, and it learns into a new file."""

    member_id: int
    reason: str


Action = Compact | Defragment | HandOver | Disarm | Renew


@dataclass(frozen=True, slots=True)
class Verdict:
    """One action at most; `waits`: why there is no other, "" if nothing is to be done."""

    memory: Memory
    room: Room
    action: Action | None
    waits: str = ""


def look(space: Space, memory: Memory, *, leads: bool, led: bool, now: float) -> Verdict:
    """`leads`: this peer leads the cluster, `led`: some peer does. `memory` is the last verdict's."""
    quota = space.quota_bytes
    free = space.file_bytes - space.used_bytes
    crowded = space.file_bytes >= CROWDED * quota and free >= WORTH * quota
    true = [("alarm", member_id) for member_id in space.alarmed] + [("crowded", 0)] * crowded
    memory = replace(
        memory,
        level=_level(space, memory.level),
        since={each: memory.since.get(each, now) for each in true},
    )
    room = Room(
        level=memory.level,
        used_bytes=space.used_bytes,
        file_bytes=space.file_bytes,
        quota_bytes=quota,
        message=_message(space, memory.level),
    )
    stands = _is_to_make_room(space, memory, now)
    if (stands or (memory.level == "critical" and leads)) and not _within(
        COMPACT_S, memory.compacted_at, now
    ):
        action: Action = Compact(space.revision, f"the store is {memory.level}: its history makes room")
        return Verdict(replace(memory, compacted_at=now), room, action)
    if space.alarmed:
        found, waits = _cure(space, memory, now)
    elif crowded:
        found, waits = _thin(space, memory, leads, led, now)
    else:
        found, waits = None, ""
    if isinstance(found, Defragment | HandOver):
        memory = replace(memory, defragmented_at=now)
    return Verdict(memory, room, found, waits)


def _within(seconds: float, then: float | None, now: float) -> bool:
    return then is not None and now - then < seconds


def _level(space: Space, before: RoomLevel) -> RoomLevel:
    share = space.used_bytes / space.quota_bytes
    if space.alarmed:
        return "full"
    if share >= CRITICAL - CLEAR * (before in ("critical", "full")):
        return "critical"
    if share >= WARNING - CLEAR * (before != ""):
        return "warning"
    return ""


def _message(space: Space, level: RoomLevel) -> str:
    percent = 100.0 * space.used_bytes / space.quota_bytes
    used = f"{percent:.0f} % of the store's {space.quota_bytes // _MIB} MiB are used"
    match level:
        case "full":
            return f"the store is full and takes no writes until there is room again; {used}"
        case "critical":
            return f"{used}: no new tasks are taken until there is room again"
        case "warning":
            return f"{used}; from {100 * CRITICAL:.0f} % on no new tasks are taken"
    return ""


def _is_to_make_room(space: Space, memory: Memory, now: float) -> bool:
    """Whether the store stands still as long as this member has no room."""
    if space.member_id in space.alarmed:
        return True
    return not _is_roomy(space) and _of_others(space, memory, now) is not None


def _is_roomy(space: Space) -> bool:
    return space.file_bytes < HAS_ROOM * space.quota_bytes


def _of_others(space: Space, memory: Memory, now: float) -> Action | None:
    """What ends another's alarm, once that one does not see to it: to be done by a member that has room itself."""
    for member_id in space.alarmed:
        if member_id in space.learners:
            return Renew(member_id, "that learner has reached its quota, and cannot be defragmented")
        if member_id not in space.voters:
            return Disarm(member_id, "that member is none of the store's any more")
        if now - memory.since["alarm", member_id] >= OTHERS_S:
            return Disarm(member_id, f"that member has not done so for {OTHERS_S:g} s: it may not be up")
    return None


def _cure(space: Space, memory: Memory, now: float) -> tuple[Action | None, str]:
    """The store stands still: nothing is spared by waiting for a turn."""
    quota, free = space.quota_bytes, space.file_bytes - space.used_bytes
    if _is_to_make_room(space, memory, now):
        # etcd counts pages as free at its next write only, and a full store has none: so without that, seldom
        again_s = AGAIN_S if free >= WORTH_FULL * quota else UNSURE_S
        if space.file_bytes >= CROWDED * quota and not _within(again_s, memory.defragmented_at, now):
            return Defragment(alone=False, reason="this member has no room below its quota"), ""
        if not _is_roomy(space):
            return None, (
                "what the store holds leaves no room below its quota: raise store.quota_bytes on every voter and"
                " restart them"
            )
    if space.member_id in space.alarmed:
        return Disarm(space.member_id, "this member has room again"), ""
    found = _of_others(space, memory, now)
    return found, "" if found is not None else "another member has reached its quota and is to see to it"


def _thin(space: Space, memory: Memory, leads: bool, led: bool, now: float) -> tuple[Action | None, str]:
    """Before the file reaches the quota."""
    why = "much of this member's file is free pages, and it is near the quota"
    if _within(AGAIN_S, memory.defragmented_at, now):
        return None, f"{why}: tried a moment ago"
    if not led or not space.store_leader:
        return None, f"{why}: once somebody leads"
    if len(space.voters) > 1 and (leads or space.store_leader == space.member_id):
        if now - memory.since["crowded", 0] < LEADERS_S:
            return None, f"{why}: after the others, as this one leads"
        if leads:
            return HandOver(why), ""
    return Defragment(alone=True, reason=why), ""


def tell_room(snapshot: Snapshot) -> Decision:
    """The leader tells when a level begins or ends."""
    room, before = snapshot.room, snapshot.room_told
    if room.level == before:
        return Decision()
    decision = Decision(changes=[RoomTold(room.level)])
    decision.event(
        "store_alert",
        level=room.level or before,
        raised=bool(room.level),
        value=round(100.0 * room.used_bytes / room.quota_bytes, 1),
        threshold=100.0 * (CRITICAL if "critical" in (room.level, before) else WARNING),
        unit="%",
        message=room.message or "the store has room again",
    )
    return decision
