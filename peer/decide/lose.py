"""When a peer is lost with its workers: by its session, by its silence, and never too many at once.

Evidence comes into the snapshot as it arises (`Linked`, `Rumoured`, `Heard`); this decides once a tick. A peer is back
as soon as one of its workers reports.
"""

from __future__ import annotations

from peer.decide.decision import Decision
from peer.limits import LOSS_CONFIRM_S, LOSS_WINDOW_S, RELINK_S, STARVED_S, WORKER_SILENT_S
from peer.state.snapshot import Linked, Lose, Silent, Snapshot, Ticked


def wake(snapshot: Snapshot, now: float) -> Decision:
    """The first decision of every tick: who has been silent for too long.

    If the last tick was long ago, this leader slept, and others are not to blame. Who was silent before stays so: sleep
    raises nobody from the dead.
    """
    asleep_s = now - (snapshot.ticked_at or snapshot.started_at)  # its first tick may come late as well
    if asleep_s > STARVED_S:
        decision = Decision(reasons=[f"this leader was not awake for {asleep_s:.1f} s"])
        decision.changes.append(Ticked(now, slept=True))
        for peer_id in snapshot.unlinked:
            if peer_id not in snapshot.lost and not snapshot.unlinked[peer_id].dead:  # it may have come up again
                decision.changes.append(Linked(peer_id, False, now))
        return decision
    silent = []
    for worker_id, heard_at in snapshot.listened.items():
        if now - heard_at <= WORKER_SILENT_S:
            break  # whoever comes after was heard later
        silent.append(worker_id)
    decision = Decision(changes=[Ticked(now)])
    if silent:
        decision.changes.append(Silent(tuple(silent)))
    return decision


def lose(snapshot: Snapshot, now: float) -> Decision:
    """Declare lost whom the evidence is against; those without confirmation only within the share."""
    decision = Decision()
    evidence = _evidence(snapshot, now)
    if not evidence:
        return decision
    counted = _unconfirmed(snapshot, now)
    budget = _allowed(snapshot) - len(counted)
    for peer_id, because in evidence.items():
        confirmed = _confirmed(snapshot, now, peer_id)
        if not confirmed and peer_id not in counted:  # peers are counted, not losses
            if budget <= 0:
                decision.reasons.append(f"{peer_id} is not declared lost yet: too many at once ({because})")
                continue
            budget -= 1
        decision.changes.append(Lose(peer_id, now, because, confirmed))
        decision.reasons.append(f"{peer_id} is lost: {because}")
    return decision


def revoked(snapshot: Snapshot, now: float, peer_id: str) -> Decision:
    """Its workers are lost at once; what it still says comes too late."""
    if peer_id in snapshot.lost or not snapshot.peers.get(peer_id):
        return Decision()
    return Decision(changes=[Lose(peer_id, now, "it was revoked", confirmed=True)])


def _evidence(snapshot: Snapshot, now: float) -> dict[str, str]:
    """By peer, why it seems to be lost; those that are lost already are left out."""
    found = {}
    for peer_id, link in snapshot.unlinked.items():
        if link.dead:
            found[peer_id] = "its process has ended"
        elif now - link.at > RELINK_S:
            found[peer_id] = f"its session ended {now - link.at:.1f} s ago"
    for worker_id in snapshot.silent:
        peer_id = snapshot.workers[worker_id].peer_id
        if peer_id not in found and not any(w in snapshot.listened for w in snapshot.peers[peer_id]):
            found[peer_id] = f"it has not reported for {now - _heard_at(snapshot, peer_id):.1f} s"
    return {p: found[p] for p in found if p not in snapshot.lost and snapshot.peers.get(p)}


def _heard_at(snapshot: Snapshot, peer_id: str) -> float:
    return max(snapshot.heard_at.get(w, snapshot.started_at) for w in snapshot.peers[peer_id])


def _confirmed(snapshot: Snapshot, now: float, peer_id: str) -> bool:
    """By its host, by gossip that is newer than its last report, or by a long silence while this leader was awake."""
    link = snapshot.unlinked.get(peer_id)
    if link is not None and link.dead:
        return True
    since = max(snapshot.listened.get(w, snapshot.silent.get(w, 0.0)) for w in snapshot.peers[peer_id])
    return now - since > LOSS_CONFIRM_S or _rumoured(snapshot, peer_id, _heard_at(snapshot, peer_id))


def _rumoured(snapshot: Snapshot, peer_id: str, since: float) -> bool:
    rumour = snapshot.rumours.get(peer_id)
    return rumour is not None and rumour.status in ("failed", "left") and rumour.at > since


def _unconfirmed(snapshot: Snapshot, now: float) -> frozenset[str]:
    """Peers that were lost without confirmation within the window, also those that are back."""
    return frozenset(
        peer_id
        for peer_id, loss in snapshot.losses.items()
        if now - loss.at < LOSS_WINDOW_S and not loss.confirmed and not _rumoured(snapshot, peer_id, loss.at)
    )


def _allowed(snapshot: Snapshot) -> int:
    """How many peers may be lost without confirmation within the window; one at least."""
    known = sum(bool(workers) for workers in snapshot.peers.values())
    return max(1, int(snapshot.policy.lost_share_max * known))
