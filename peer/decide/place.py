"""Which model goes to which worker: what owners ask for, what queued tasks need, and what makes room for it."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace as changed

from peer.decide.admit import nearest, unknown_model
from peer.decide.decision import Decision
from peer.decide.recover import requeue
from peer.decide.workers import (
    can_run,
    free_slots,
    held_of,
    is_up,
    leaves,
    load_seconds,
    memory,
    memory_needed,
    serves,
    status,
    takes_tasks,
    usable,
)
from peer.errors import Conflict, NotFound
from peer.limits import KEPT_OUT_S, LOADS_FAILED_MAX, TURN_LOADS, TURN_S, UNLOADED_S, WORKER_SILENT_S
from peer.state.command import (
    AssignModel,
    AssignReply,
    PlacedModel,
    RestartReply,
    RestartWorker,
    UnloadModel,
    UnloadReply,
)
from peer.state.model import Assignment, Draining, Model, Replica, ReplicaState
from peer.state.order import LoadReplica, RestartEngine, UnloadReplica
from peer.state.snapshot import Drop, Foresee, Pause, Save, Snapshot

OWNER, ROOM, MOVE = "owner", "room", "move"  # why a replica drains
_RESTART_S = 5.0  # before a worker's first start has been measured


def unknown_worker(snapshot: Snapshot, worker_id: str) -> NotFound:
    near = nearest(worker_id, list(snapshot.workers))
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return NotFound(
        f"there is no worker `{worker_id}`{hint}",
        code="worker_not_found",
        details={"worker_id": worker_id, "nearest": near},
    )


def load(snapshot: Snapshot, now: float, model: Model, worker_id: str, decision: Decision) -> None:
    """Order a load, and foresee its replica until the worker reports it."""
    before = snapshot.replicas.get(worker_id, {}).get(model.name)
    replica = Replica(
        worker_id=worker_id,
        model_name=model.name,
        state=ReplicaState.LOADING,
        memory_bytes=memory_needed(snapshot, model, worker_id),
        since=now,
        last_used=now,
        failures=before.failures if before is not None else 0,
    )
    decision.changes.append(Foresee(worker_id, model.name, replica, now))
    peer_id = snapshot.workers[worker_id].peer_id
    decision.orders.append((peer_id, LoadReplica(epoch=snapshot.epoch, worker_id=worker_id, model=model)))


def unload_now(snapshot: Snapshot, now: float, replica: Replica, decision: Decision) -> None:
    """Order an unload of a replica that nothing uses, and foresee it."""
    going = changed(replica, state=ReplicaState.UNLOADING, since=now)
    decision.changes.append(Foresee(replica.worker_id, replica.model_name, going, now))
    decision.orders.append(
        (
            snapshot.workers[replica.worker_id].peer_id,
            UnloadReplica(epoch=snapshot.epoch, worker_id=replica.worker_id, model_name=replica.model_name),
        )
    )


def drain(
    snapshot: Snapshot, now: float, worker_id: str, model_name: str, because: str, *, until: float = 0.0
) -> Save:
    """A replica is to go, and no task brings it back before `until`. An owner's wish is not replaced by a reason that
    may be taken back."""
    known = snapshot.draining.get((worker_id, model_name))
    if known is not None and because != OWNER:
        return Save(known)
    until = max(until, known.until if known is not None else 0.0)
    return Save(Draining(worker_id=worker_id, model_name=model_name, since=now, because=because, until=until))


# ---------------------------------------------------------------- what owners ask for


def assign(snapshot: Snapshot, now: float, command: AssignModel, assignment_id: str) -> Decision:
    """Record the wish on each worker; with `preload` the loads begin at the next reconciliation."""
    model = snapshot.catalogue.get(command.model_name)
    if model is None:
        raise unknown_model(snapshot, command.model_name)
    worker_ids = command.worker_ids or (_best_worker(snapshot, now, model),)
    for worker_id in worker_ids:
        if worker_id not in snapshot.workers:
            raise unknown_worker(snapshot, worker_id)
    placed = tuple(_placed(snapshot, now, model, worker_id, command.preload) for worker_id in worker_ids)
    decision = Decision()
    for worker_id in worker_ids:
        wish = Assignment(
            assignment_id=assignment_id,
            model_name=model.name,
            worker_id=worker_id,
            preload=command.preload,
            priority=command.priority,
            created_at=now,
        )
        decision.changes.append(Save(wish))
        draining = snapshot.draining.get((worker_id, model.name))
        if draining is not None:
            decision.changes.append(Drop(draining))
        replica = snapshot.replicas.get(worker_id, {}).get(model.name)
        if replica is not None and replica.state is ReplicaState.FAILED:  # asked anew: tried anew, at once
            fresh = changed(replica, failures=0, not_before=0.0)
            decision.changes.append(Foresee(worker_id, model.name, fresh, now))
    decision.reply = AssignReply(assignment_id=assignment_id, model_name=model.name, placed=placed)
    return decision


def _best_worker(snapshot: Snapshot, now: float, model: Model) -> str:
    """Where no worker is named: one that has the model, else the one with the most room."""
    candidates = [w for w in usable(snapshot, now) if can_run(snapshot, model, w)]
    if not candidates:
        raise Conflict(
            f"no worker that is up can run `{model.name}`",
            code="no_worker",
            details={w: status(snapshot, w, now) for w in snapshot.workers},
        )
    return max(candidates, key=lambda w: (model.name in snapshot.replicas[w], memory(snapshot, w).free, w))


def _placed(snapshot: Snapshot, now: float, model: Model, worker_id: str, preload: bool) -> PlacedModel:
    """What becomes of the wish on this worker. Raises Conflict, with the arithmetic, if it can never fit there."""
    report = snapshot.reports.get(worker_id)
    if not can_run(snapshot, model, worker_id):
        raise Conflict(
            f"`{model.name}` is a behaviour of the stand-in engine; {worker_id} has a real one",
            code="wrong_engine",
            details={"worker_id": worker_id},
        )
    if leaves(snapshot, worker_id):
        raise Conflict(
            f"the host of {worker_id} is being emptied; `bitinglip drain --undo` ends that",
            code="host_drains",
            details={"worker_id": worker_id},
        )
    replica = snapshot.replicas.get(worker_id, {}).get(model.name)
    if replica is not None and replica.state is ReplicaState.READY:
        return PlacedModel(worker_id=worker_id, status="loaded", estimated_s=0.0)
    estimate = load_seconds(snapshot, model, worker_id)
    if report is not None and (replica is None or replica.state is ReplicaState.FAILED):
        needed = memory_needed(snapshot, model, worker_id)
        room = memory(snapshot, worker_id, without=frozenset(_evictable(snapshot, worker_id)))
        if needed > room.free:
            full = memory(snapshot, worker_id)
            raise Conflict(
                f"`{model.name}` does not fit on {worker_id}: it {full.arithmetic(needed)}",
                code="does_not_fit",
                details={
                    "worker_id": worker_id,
                    "needed_bytes": needed,
                    "free_bytes": max(0, full.free),
                    "total_bytes": full.total,
                },
            )
    if not preload:
        return PlacedModel(
            worker_id=worker_id, status="assigned", estimated_s=estimate, reason="on first use"
        )
    ahead = sum(
        load_seconds(snapshot, snapshot.catalogue[r.model_name], worker_id)
        for r in snapshot.replicas.get(worker_id, {}).values()
        if r.state in (ReplicaState.LOADING, ReplicaState.FETCHING)
        and r.model_name != model.name
        and r.model_name in snapshot.catalogue
    )
    is_up = status(snapshot, worker_id, now) in ("online", "busy")
    if ahead or not is_up:
        why = "after another load" if ahead else "when the worker is up"
        return PlacedModel(worker_id=worker_id, status="queued", estimated_s=estimate + ahead, reason=why)
    return PlacedModel(worker_id=worker_id, status="loading", estimated_s=estimate)


def unload(snapshot: Snapshot, now: float, command: UnloadModel) -> Decision:
    """Take the wish back and drain. With `force` running tasks are re-queued instead of awaited, and neither these nor
    others bring the model back for a while."""
    name = command.model_name
    if name not in snapshot.catalogue and not any(name in of for of in snapshot.replicas.values()):
        raise unknown_model(snapshot, name)
    for worker_id in command.worker_ids:
        if worker_id not in snapshot.workers:
            raise unknown_worker(snapshot, worker_id)
    wanted = command.worker_ids or tuple(snapshot.workers)
    unheard = _may_have(snapshot, now, command.worker_ids)
    affected = tuple(
        w
        for w in wanted
        if name in snapshot.replicas.get(w, {}) or (w, name) in snapshot.assignments or w in unheard
    )
    if not affected:
        raise Conflict(
            f"`{name}` is not on {', '.join(wanted) or 'any worker'}",
            code="not_loaded",
            details={"model_name": name, "worker_ids": list(wanted)},
        )
    decision = Decision()
    requeued: list[str] = []
    for worker_id in affected:
        wish = snapshot.assignments.get((worker_id, name))
        if wish is not None:
            decision.changes.append(Drop(wish))
        has = name in snapshot.replicas.get(worker_id, {}) or worker_id not in snapshot.reports
        if has and not command.force:
            decision.changes.append(drain(snapshot, now, worker_id, name, OWNER))
        if command.force:
            for task in snapshot.held.get(worker_id, {}).values():
                if task.model_name == name:
                    because = "its model was unloaded"
                    decision.add(requeue(snapshot, now, task, "unloaded", because, strike=False))
                    requeued.append(task.task_id)
    for worker_id in (
        wanted if command.force else ()
    ):  # also where it is not: or its tasks would bring it there
        until = now + UNLOADED_S
        decision.changes.append(drain(snapshot, now, worker_id, name, OWNER, until=until))
    decision.reply = UnloadReply(model_name=name, affected_workers=affected, requeued_tasks=tuple(requeued))
    return decision


def _may_have(snapshot: Snapshot, now: float, named: tuple[str, ...]) -> frozenset[str]:
    """Workers of whose replicas this leader knows nothing: those that are named, at its beginning all of them."""
    young = now - snapshot.started_at <= WORKER_SILENT_S
    return frozenset(w for w in (named or snapshot.workers if young else named) if w not in snapshot.reports)


def restart(snapshot: Snapshot, now: float, command: RestartWorker) -> Decision:
    """Order a restart; what runs there is re-queued at once."""
    worker = snapshot.workers.get(command.worker_id)
    if worker is None:
        raise unknown_worker(snapshot, command.worker_id)
    decision = Decision()
    held = tuple(snapshot.held.get(command.worker_id, {}).values())
    for task in held:
        because = "its worker was restarted"
        decision.add(requeue(snapshot, now, task, "worker_restarted", because, strike=False))
    decision.changes.append(Pause(command.worker_id))
    decision.orders.append((worker.peer_id, RestartEngine(epoch=snapshot.epoch, worker_id=command.worker_id)))
    decision.reply = RestartReply(
        worker_id=command.worker_id,
        estimated_s=snapshot.downtime_s.get(command.worker_id, _RESTART_S),
        requeued_tasks=tuple(task.task_id for task in held),
    )
    return decision


# ---------------------------------------------------------------- reconciliation


def reconcile(snapshot: Snapshot, now: float) -> Decision:
    """Bring replicas towards wishes and demand. Each worker begins one load at a time."""
    decision = Decision()
    _finish_drains(snapshot, now, decision)
    begun: dict[str, None] = {}
    wishes = snapshot.index.unmet.values()
    for wish in sorted(wishes, key=lambda a: (a.priority, a.created_at, a.model_name, a.worker_id)):
        model = snapshot.catalogue.get(wish.model_name)
        waits = leaves(snapshot, wish.worker_id) or not _may_load(snapshot, now, wish.worker_id, begun)
        if model is None or waits:
            continue
        if _begin(snapshot, now, model, wish.worker_id, decision, _evictable(snapshot, wish.worker_id)):
            begun[wish.worker_id] = None
    candidates: list[str] | None = None
    for model_name in sorted(snapshot.queues, key=lambda name: snapshot.queues[name][0]):
        model = snapshot.catalogue.get(model_name)
        if model is None or not _wants_replica(snapshot, now, model_name):
            continue
        if candidates is None:
            candidates = [w for w in usable(snapshot, now) if _may_load(snapshot, now, w, begun)]
        for worker_id, may_go in _attempts(snapshot, now, model, candidates):
            if _begin(snapshot, now, model, worker_id, decision, may_go):
                candidates.remove(worker_id)
                break
        else:
            kept = _kept_for(snapshot, now, model, candidates)
            if kept:
                candidates.remove(kept)
    return decision


def _attempts(
    snapshot: Snapshot, now: float, model: Model, candidates: list[str]
) -> Iterator[tuple[str, list[str]]]:
    """Workers to load a model on that tasks wait for, and what may go there for it: idle models, and if that does not
    help and they have waited long enough, busy ones."""
    able = _by_preference(snapshot, model, candidates)
    for worker_id in able:
        yield worker_id, _evictable(snapshot, worker_id)
    if not _is_kept_out(snapshot, now, model):
        return
    busy = {worker_id: _had_their_turn(snapshot, now, model, worker_id) for worker_id in able}
    for worker_id in sorted(able, key=lambda w: (sum(held_of(snapshot, w, name) for name in busy[w]), w)):
        if busy[worker_id]:
            yield worker_id, _evictable(snapshot, worker_id) + busy[worker_id]


def _is_kept_out(snapshot: Snapshot, now: float, model: Model) -> bool:
    """Whether its tasks have waited long enough to send busy models away."""
    (_, first), *_ = snapshot.queues[model.name]
    return now - snapshot.tasks[first].created_at >= KEPT_OUT_S


def _had_their_turn(snapshot: Snapshot, now: float, model: Model, worker_id: str) -> list[str]:
    """Busy models that drain for this one: they have been here for long enough to be worth their loads."""
    found = [
        r.model_name for r in _busy(snapshot, model, worker_id) if not _turn_left_s(snapshot, now, model, r)
    ]
    return sorted(found, key=lambda name: (held_of(snapshot, worker_id, name), name))


def _busy(snapshot: Snapshot, model: Model, worker_id: str) -> list[Replica]:
    """Ready models that only tasks hold here, and none that goes before this model's."""
    first = snapshot.queues[model.name][0]
    moving_here = _moving_to(snapshot, worker_id)
    return [
        r
        for r in snapshot.replicas[worker_id].values()
        if takes_tasks(snapshot, r)
        and (worker_id, r.model_name) not in snapshot.assignments
        and r.model_name not in moving_here
        and (held_of(snapshot, worker_id, r.model_name) or r.model_name in snapshot.queues)
        and snapshot.queues.get(r.model_name, [first])[0] >= first
    ]


def _turn_left_s(snapshot: Snapshot, now: float, model: Model, replica: Replica) -> float:
    """How long this busy one yet stays before it drains for the model. A clock that is ahead says nothing."""
    turn_s = max(TURN_S, TURN_LOADS * load_seconds(snapshot, model, replica.worker_id))
    here_s = now - replica.since
    return turn_s - here_s if 0 <= here_s < turn_s else 0.0


def _kept_for(snapshot: Snapshot, now: float, model: Model, candidates: list[str]) -> str:
    """Where the turn of a model that is served nowhere comes first, "" if it is not kept out or fits nowhere. What goes
    after it is not loaded there: else small ones, which come one by one, would never all have had theirs."""
    served = any(serves(snapshot, now, w, model.name) for w in snapshot.index.placed.get(model.name, {}))
    if served or not _is_kept_out(snapshot, now, model):
        return ""
    found = []
    for worker_id in candidates:
        here = snapshot.replicas[worker_id]
        unloaded = (worker_id, model.name) in snapshot.draining
        if not can_run(snapshot, model, worker_id) or model.name in here or unloaded:
            continue
        busy = _busy(snapshot, model, worker_id)
        going = {name for name in here if (worker_id, name) in snapshot.draining}
        going.update(_evictable(snapshot, worker_id), (r.model_name for r in busy))
        room = memory(snapshot, worker_id, without=frozenset(going))
        if memory_needed(snapshot, model, worker_id) <= room.free:
            left_s = max((_turn_left_s(snapshot, now, model, r) for r in busy), default=0.0)
            found.append((left_s, worker_id))
    return min(found)[1] if found else ""


def _finish_drains(snapshot: Snapshot, now: float, decision: Decision) -> None:
    """A drain is over when its replica is gone, which only a report can say: a new leader waits for the first one. Or
    later, where an owner has unloaded it by force."""
    for (worker_id, model_name), draining in snapshot.draining.items():
        replica = snapshot.replicas.get(worker_id, {}).get(model_name)
        if replica is None:
            if worker_id in snapshot.reports and now >= draining.until:
                decision.changes.append(Drop(draining))
        elif (
            replica.state is not ReplicaState.UNLOADING
            and not held_of(snapshot, worker_id, model_name)
            and _may_leave(snapshot, now, worker_id, model_name)
        ):
            unload_now(snapshot, now, replica, decision)


def _may_leave(snapshot: Snapshot, now: float, worker_id: str, model_name: str) -> bool:
    """Not while the target of the move that takes it away has lost it: the move is about to be given up."""
    return all(
        serves(snapshot, now, move.to_worker or "", model_name)
        for plan in snapshot.under_way.values()
        for move in plan.moves
        if (move.from_worker, move.model, move.state) == (worker_id, model_name, "draining")
    )


def _may_load(snapshot: Snapshot, now: float, worker_id: str, begun: dict[str, None]) -> bool:
    """Whether it is up and nothing else is being loaded there."""
    return (
        worker_id not in begun
        and is_up(snapshot, worker_id, now)
        and not any(
            r.state in (ReplicaState.FETCHING, ReplicaState.LOADING)
            for r in snapshot.replicas[worker_id].values()
        )
    )


def _wants_replica(snapshot: Snapshot, now: float, model_name: str) -> bool:
    """Whether queued tasks of this model have no replica, or only full ones while a worker idles."""
    on_the_way = (ReplicaState.FETCHING, ReplicaState.LOADING)
    placed = snapshot.index.placed.get(model_name, {})
    replicas = [r for worker_id, r in placed.items() if is_up(snapshot, worker_id, now)]
    if any(r.state in on_the_way for r in replicas):
        return False
    serving = [r for r in replicas if takes_tasks(snapshot, r)]
    if not serving:
        return True
    full = all(free_slots(snapshot, r, len(snapshot.held.get(r.worker_id, ()))) <= 0 for r in serving)
    return full and any(w not in placed and is_up(snapshot, w, now) for w in snapshot.index.unused)


def _by_preference(snapshot: Snapshot, model: Model, idle: list[str]) -> list[str]:
    """Assigned workers first, then the most room."""
    able = [w for w in idle if can_run(snapshot, model, w)]
    return sorted(
        able, key=lambda w: ((w, model.name) not in snapshot.assignments, -memory(snapshot, w).free, w)
    )


def _begin(
    snapshot: Snapshot, now: float, model: Model, worker_id: str, decision: Decision, may_go: list[str]
) -> bool:
    """Load if it fits; else make room for a later round, if that is enough. False: nothing was begun here."""
    replica = snapshot.replicas[worker_id].get(model.name)
    if replica is not None and (
        replica.state is not ReplicaState.FAILED
        or now < replica.not_before
        or replica.failures >= LOADS_FAILED_MAX
    ):
        return False
    if (worker_id, model.name) in snapshot.draining:
        return False
    needed = memory_needed(snapshot, model, worker_id)
    if needed <= memory(snapshot, worker_id).free:
        load(snapshot, now, model, worker_id, decision)
        return True
    going = {name for name in snapshot.replicas[worker_id] if (worker_id, name) in snapshot.draining}
    leaving = []
    for name in may_go:
        if needed <= memory(snapshot, worker_id, without=frozenset(going)).free:
            break
        if name not in going:
            going.add(name)
            leaving.append(name)
    if needed > memory(snapshot, worker_id, without=frozenset(going)).free:
        return False  # nothing is sent away in vain
    for name in leaving:
        decision.changes.append(drain(snapshot, now, worker_id, name, ROOM))
        decision.reasons.append(f"{name} leaves {worker_id} to make room for {model.name}")
    return True


def _evictable(snapshot: Snapshot, worker_id: str) -> list[str]:
    """Ready models that no wish, no task and no move under way holds here, the least recently used first."""
    moving_here = _moving_to(snapshot, worker_id)
    free = [
        r
        for r in snapshot.replicas.get(worker_id, {}).values()
        if r.state is ReplicaState.READY
        and (worker_id, r.model_name) not in snapshot.assignments
        and not held_of(snapshot, worker_id, r.model_name)
        and r.model_name not in snapshot.queues
        and r.model_name not in moving_here
    ]
    return [r.model_name for r in sorted(free, key=lambda r: (r.last_used, r.model_name))]


def _moving_to(snapshot: Snapshot, worker_id: str) -> list[str]:
    return [
        move.model
        for plan in snapshot.under_way.values()
        for move in plan.moves
        if move.to_worker == worker_id and move.state in ("loading", "draining")
    ]
