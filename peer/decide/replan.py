"""Plans that the leader makes by itself: to empty a host that is to leave, and after hosts came or went."""

from __future__ import annotations

from dataclasses import replace

from peer.decide.decision import Decision
from peer.decide.members import named
from peer.decide.rebalance import active, rebalance
from peer.decide.workers import (
    can_run,
    held_of,
    load_seconds,
    memory,
    memory_needed,
    serves,
    takes_tasks,
    usable,
)
from peer.errors import Conflict
from peer.limits import MOVES_MAX
from peer.state.command import DrainedHost, DrainHost, Rebalance
from peer.state.model import Replica
from peer.state.plan import Leaving, Move, Plan
from peer.state.snapshot import Drop, Peopled, Save, Snapshot

EMPTY = "drain"  # the strategy of a plan that empties hosts
QUIET_S = 30.0  # hosts that come and go within it are one change
PLANS_EVERY_S = 300.0
RETRY_S = 10.0  # after a plan that did not empty a host


def drain_host(snapshot: Snapshot, now: float, command: DrainHost) -> Decision:
    """From now on no model is loaded there, and what is there moves away; or, with `undo`, no more so.

    Reply: DrainedHost. Raises NotFound; Conflict where no other host could take anything.
    """
    peer_id = named([p for p, workers in snapshot.peers.items() if workers], command.name)
    decision = Decision(reply=DrainedHost(peer_id=peer_id, draining=not command.undo))
    known = snapshot.leaving.get(peer_id)
    if command.undo:
        if known is not None:
            decision.changes.append(Drop(known))
    elif known is None:
        if not any(snapshot.workers[w].peer_id != peer_id for w in usable(snapshot, now)):
            raise Conflict(
                f"there is no other host that could take what {peer_id} holds",
                code="no_other_host",
                details={"peer_id": peer_id},
            )
        decision.changes.append(Save(Leaving(peer_id=peer_id, since=now, by=command.by)))
        decision.reasons.append(f"{peer_id} is to be emptied")
    return decision


def replan(snapshot: Snapshot, now: float, plan_id: str) -> Decision:
    """One plan under that id, if there is reason for one and none is under way."""
    decision = _count(snapshot, now)
    if active(snapshot) is not None:
        return decision
    if snapshot.leaving:
        decision.add(_empty(snapshot, now, plan_id))
        if decision.changes:
            return decision
    if not decision.changes and _has_changed(snapshot, now):
        peopled = snapshot.peopled
        assert peopled is not None
        command = Rebalance(strategy=snapshot.policy.auto_rebalance, force=False, dry_run=False)
        decision.add(rebalance(snapshot, now, command, plan_id))
        decision.changes.append(replace(peopled, planned_for=peopled.seen, planned_at=now))
    return decision


# ---------------------------------------------------------------- hosts that leave


def _empty(snapshot: Snapshot, now: float, plan_id: str) -> Decision:
    """Move what takes tasks on hosts that leave to where it fits, or to where it is already."""
    decision = Decision()
    if any(
        plan.strategy == EMPTY and now - (plan.finished_at or now) < RETRY_S
        for plan in snapshot.plans.values()
    ):
        return decision
    moves: list[Move] = []
    reasons: list[str] = []
    promised: dict[str, int] = {}  # bytes by worker
    for peer_id in snapshot.leaving:
        for worker_id in snapshot.peers.get(peer_id, ()):
            for replica in snapshot.replicas.get(worker_id, {}).values():
                if not takes_tasks(snapshot, replica) or len(moves) == MOVES_MAX:
                    continue
                move = _away(snapshot, now, replica, promised)
                if move is None:
                    reasons.append(f"{replica.model_name} stays on {worker_id}: it fits on no other host")
                else:
                    moves.append(move)
    if moves:
        plan = Plan(
            rebalance_id=plan_id,
            strategy=EMPTY,
            dry_run=False,
            force=False,
            status="initiated",
            created_at=now,
            moves=tuple(moves),
            reasons=(f"{', '.join(snapshot.leaving)} leaves", *reasons),
        )
        decision.changes.append(Save(plan))
        decision.event(
            "cluster_rebalance_started", rebalance_id=plan_id, strategy=EMPTY, operations=len(moves)
        )
    return decision


def _away(snapshot: Snapshot, now: float, replica: Replica, promised: dict[str, int]) -> Move | None:
    """To a worker that has the model already, else to the one with the most room for it."""
    name, source = replica.model_name, replica.worker_id
    model = snapshot.catalogue.get(name)
    others = [w for w in usable(snapshot, now) if w != source]
    there = next((w for w in others if _stays(snapshot, now, w, name)), None)
    held = held_of(snapshot, source, name)
    if there is not None:
        reason = f"{there} has it too"
        return Move(
            type="model_unload",
            model=name,
            from_worker=source,
            to_worker=there,
            tasks_touched=held,
            reason=reason,
        )
    if model is None:
        return None
    room = {
        w: memory(snapshot, w).free - promised.get(w, 0)
        for w in others
        if name not in snapshot.replicas[w] and (w, name) not in snapshot.draining
    }
    fits = [w for w in room if can_run(snapshot, model, w) and memory_needed(snapshot, model, w) <= room[w]]
    if not fits:
        return None
    target = max(fits, key=lambda w: (room[w], w))
    needed = memory_needed(snapshot, model, target)
    promised[target] = promised.get(target, 0) + needed
    return Move(
        type="model_migration",
        model=name,
        from_worker=source,
        to_worker=target,
        memory_bytes=needed,
        predicted_s=load_seconds(snapshot, model, target),
        tasks_touched=held,
        reason="its host leaves",
    )


def _stays(snapshot: Snapshot, now: float, worker_id: str, model_name: str) -> bool:
    return serves(snapshot, now, worker_id, model_name) and (worker_id, model_name) not in snapshot.draining


# ---------------------------------------------------------------- hosts that came or went


def _count(snapshot: Snapshot, now: float) -> Decision:
    """Note who is there, when that changes. A new leader takes the store's word for who was."""
    seen = frozenset(snapshot.workers[w].peer_id for w in usable(snapshot, now))
    known = snapshot.peopled
    if known is None:
        known = Peopled(seen, now, frozenset(p for p, workers in snapshot.peers.items() if workers), 0.0)
        return Decision(changes=[known])
    if seen != known.seen:
        return Decision(changes=[Peopled(seen, now, known.planned_for, known.planned_at)])
    return Decision()


def _has_changed(snapshot: Snapshot, now: float) -> bool:
    """Whether others are there than at the last plan, for a while now."""
    known = snapshot.peopled
    return (
        known is not None
        and bool(snapshot.policy.auto_rebalance)
        and known.seen != known.planned_for
        and now - known.since >= QUIET_S
        and now - known.planned_at >= PLANS_EVERY_S
    )
