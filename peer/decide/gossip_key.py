"""How gossip gets a new key while it runs: install it everywhere, use it everywhere, remove the others.

What is to be done next follows from the keys that the members have, so that a rotation which was interrupted anywhere
can be run again: any two members can read each other at every step, since a key is used only when all have it, and
removed only when none uses it. Members that are away hear of nothing, and would not find back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from peer.errors import Conflict, Unavailable
from peer.state.enrol import HostView
from peer.state.member import KeyReport, KeyStep, Member

KEYS_MAX: Final = 8  # rotations that did not come to their end leave some

_STATES: Final = {
    "": "nothing was changed",
    "install": "the old key is in use everywhere; some members may know the new one already",
    "use": "every member reads both keys; some may use the new one already",
    "remove": "every member uses the new key; some may still read an older one",
}


def check(hosts: Iterable[HostView], members: Iterable[Member], *, force: bool) -> None:
    """Whether all that are to get the key are there, and nobody else. Raises Conflict."""
    alive = {member.peer_id for member in members if member.status == "alive"}
    known = {view.peer_id: view for view in hosts}
    revoked = sorted(name for name in alive if name in known and known[name].revocation is not None)
    if revoked:
        raise Conflict(
            f"revoked and still in gossip, where they would hear the new key: {', '.join(revoked)}; stop their peers or"
            " cut them off, wait until they are seen as failed, and try again",
            code="revoked_host_in_gossip",
            details={"peer_ids": revoked},
        )
    away = sorted(name for name, view in known.items() if view.host is not None and name not in alive)
    strangers = sorted(alive - set(known))
    if (away or strangers) and not force:
        parts = [
            f"not in gossip now: {', '.join(away)}, which would not find back without the new key"
            if away
            else "",
            f"in gossip, but no host of the cluster: {', '.join(strangers)}" if strangers else "",
        ]
        raise Conflict(
            "; ".join(part for part in parts if part),
            code="gossip_not_whole",
            details={"away": away, "strangers": strangers},
        )


def next_step(report: KeyReport, new: str, before: Collection[str], *, used: bool) -> KeyStep | None:
    """What is next, None if all is done. `before`: the keys when this rotation began; `used`: that step is done.

    Raises Conflict when another rotation is under way.
    """
    if not set(report.keys) <= {new, *before}:
        raise Conflict(
            "another key has come up meanwhile: another rotation is under way; run this again when it has ended",
            code="another_rotation",
        )
    if report.keys.get(new, 0) < report.nodes:
        return KeyStep("install", new)
    if not used:
        return KeyStep("use", new)
    old = sorted(key for key in report.keys if key != new)
    return KeyStep("remove", old[0]) if old else None


def require_room(report: KeyReport) -> None:
    """Before a key is made. Raises Conflict."""
    if len(report.keys) >= KEYS_MAX:
        raise Conflict(
            f"there are {len(report.keys)} keys, as rotations were interrupted: run the last one again on the same"
            " peer, which remembers its key until it stops",
            code="too_many_gossip_keys",
        )


def require_done(report: KeyReport, action: str, members: Iterable[Member]) -> None:
    """Whether every member has done it. Raises Unavailable, which says who has not, and the state of things."""
    if report.done:
        return
    refused = {name: report.messages[name] for name in sorted(report.messages)}
    away = sorted(member.peer_id for member in members if member.status == "failed")
    why = [f"{name}: {text}" for name, text in refused.items()]
    if report.answered < report.nodes:
        why.append(f"{report.answered} of {report.nodes} members have answered")
    if away:
        why.append(f"failed by gossip: {', '.join(away)}")
    if report.error:
        why.append(report.error)
    raise Unavailable(
        f"the key of gossip is not rotated: {'; '.join(why)}. {_STATES[action].capitalize()}. Run it again",
        code="rotation_incomplete",
        details={"step": action or "list", "refused": refused, "failed": away},
        retry_after_s=5.0,
    )
