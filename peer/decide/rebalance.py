"""Plan better placements and carry the moves out, one at a time and loading before unloading.

A strategy is a cost of a placement. The plan is greedy: the single move that lowers the cost most, again and again,
until none lowers it enough. That margin is the hysteresis: a plan that was carried out is not undone by the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from msgspec.structs import replace as changed

from peer.decide.decision import Decision
from peer.decide.meter import speeds
from peer.decide.place import MOVE, drain, load
from peer.decide.workers import (
    can_run,
    held_of,
    is_up,
    leaves,
    load_seconds,
    memory,
    memory_needed,
    serves,
    takes_tasks,
    usable,
)
from peer.errors import Conflict
from peer.limits import MOVES_MAX, WORKER_SILENT_S
from peer.state.command import Rebalance
from peer.state.model import ReplicaState
from peer.state.plan import Move, Plan
from peer.state.snapshot import Drop, Save, Snapshot

_GAIN_MIN = 0.10  # of the cost; `force` takes any gain
_GAIN_FORCED = 1e-9
_MOVE_S_MAX = 600.0  # a move that takes longer is given up


@dataclass(frozen=True, slots=True)
class Room:
    """A worker as the planner sees it: bytes that models may use, and its measured speed (1.0 where unknown)."""

    capacity_bytes: int
    speed: float


Models = dict[str, tuple[int, float]]  # of one worker: (bytes, load in tasks) by model


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each movable replica is."""

    rooms: Mapping[str, Room]
    models: Mapping[str, Models]

    def moved(self, model: str, source: str, target: str, size_bytes: int) -> Placement:
        models = {**self.models, source: dict(self.models[source]), target: dict(self.models[target])}
        _, tasks = models[source].pop(model)
        models[target][model] = (size_bytes, tasks)
        return Placement(self.rooms, models)


def _used_bytes(models: Models) -> int:
    return sum(size for size, _ in models.values())


def _tasks(models: Models) -> float:
    return sum(tasks for _, tasks in models.values())


# What one worker costs; a placement costs the sum.
COSTS: Mapping[str, Callable[[Room, Models], float]] = MappingProxyType(
    {
        "memory_optimized": lambda room, models: (_used_bytes(models) / max(1, room.capacity_bytes)) ** 2,
        "load_balanced": lambda room, models: _tasks(models) ** 2,
        "latency_optimized": lambda room, models: (_tasks(models) / room.speed) ** 2,
    }
)


def rebalance(snapshot: Snapshot, now: float, command: Rebalance, rebalance_id: str) -> Decision:
    """Make a plan; unless it is a dry run or empty, begin it. Raises Conflict while another one runs."""
    running = active(snapshot)
    if running is not None and not command.dry_run:
        raise Conflict(
            f"rebalance {running.rebalance_id} is still under way",
            code="rebalance_running",
            details={"rebalance_id": running.rebalance_id},
        )
    moves, reasons = plan_moves(snapshot, now, command.strategy, force=command.force)
    begins = bool(moves) and not command.dry_run
    plan = Plan(
        rebalance_id=rebalance_id,
        strategy=command.strategy,
        dry_run=command.dry_run,
        force=command.force,
        status="planned" if command.dry_run else "initiated" if moves else "completed",
        created_at=now,
        moves=moves,
        reasons=reasons,
        finished_at=None if begins else now,
    )
    decision = Decision(reply=plan)
    if not command.dry_run:
        decision.changes.append(Save(plan))
    if begins:
        decision.event(
            "cluster_rebalance_started",
            rebalance_id=rebalance_id,
            strategy=command.strategy,
            operations=len(moves),
        )
    return decision


def active(snapshot: Snapshot) -> Plan | None:
    return next(iter(snapshot.under_way.values()), None)


# ---------------------------------------------------------------- planning


def plan_moves(
    snapshot: Snapshot, now: float, strategy: str, *, force: bool
) -> tuple[tuple[Move, ...], tuple[str, ...]]:
    """The moves, and in words why these or why none."""
    workers = usable(snapshot, now)
    if len(workers) < 2:
        return (), ("a move needs two workers that are up",)
    cost_of = COSTS[strategy]
    placement = _placement(snapshot, now, workers)
    first_cost = cost = sum(cost_of(placement.rooms[w], of) for w, of in placement.models.items())
    moves: list[Move] = []
    while len(moves) < MOVES_MAX and cost > 0:
        best = _best_move(snapshot, placement, cost_of, moves)
        if best is None:
            break
        change, model, source, target, size = best
        if -change < (_GAIN_FORCED if force else _GAIN_MIN) * cost:
            break
        moves.append(_move(snapshot, model, source, target, f"cost {cost:.3g} -> {cost + change:.3g}"))
        placement, cost = placement.moved(model, source, target, size), cost + change
    if not moves:
        margin = "" if force else f" by at least {_GAIN_MIN:.0%}"
        return (), (f"no single move improves {strategy}{margin} (cost {first_cost:.3g})",)
    return tuple(moves), (f"{strategy}: cost {first_cost:.3g} -> {cost:.3g}",)


def _placement(snapshot: Snapshot, now: float, workers: list[str]) -> Placement:
    measured = speeds(snapshot, now)
    known = [speed for w in workers if (speed := measured.get(w))]
    typical = sum(known) / len(known) if known else 1.0
    rooms, models = {}, {}
    for worker_id in workers:
        serving = [r for r in snapshot.replicas[worker_id].values() if takes_tasks(snapshot, r)]
        names = frozenset(r.model_name for r in serving)
        rooms[worker_id] = Room(
            memory(snapshot, worker_id, without=names).free, (measured.get(worker_id) or typical) / typical
        )
        models[worker_id] = {
            r.model_name: (r.memory_bytes, _load(snapshot, worker_id, r.model_name, workers)) for r in serving
        }
    return Placement(rooms, models)


def _load(snapshot: Snapshot, worker_id: str, model_name: str, workers: list[str]) -> float:
    """Tasks held here, and this replica's share of the queue."""
    replicas = sum(model_name in snapshot.replicas[w] for w in workers)
    return held_of(snapshot, worker_id, model_name) + len(snapshot.queues.get(model_name, ())) / replicas


def _best_move(
    snapshot: Snapshot, placement: Placement, cost_of: Callable[[Room, Models], float], made: list[Move]
) -> tuple[float, str, str, str, int] | None:
    """What one more move lowers the cost by most: that change, then the move. A model moves once in a plan."""
    moved = {move.model for move in made}
    costs = {w: cost_of(placement.rooms[w], of) for w, of in placement.models.items()}
    used = {w: _used_bytes(of) for w, of in placement.models.items()}
    best: tuple[float, str, str, str, int] | None = None
    for source, of in placement.models.items():
        for name in of:
            model = snapshot.catalogue.get(name)
            if name in moved or model is None:
                continue
            tasks = of[name][1]
            left = cost_of(placement.rooms[source], {m: each for m, each in of.items() if m != name})
            for target, room in placement.rooms.items():
                there = placement.models[target]
                if name in snapshot.replicas[target] or not can_run(snapshot, model, target):
                    continue  # also where its load has failed
                if (target, name) in snapshot.draining:  # an owner has unloaded it there
                    continue
                size = memory_needed(snapshot, model, target) or of[name][0]
                if used[target] + size > room.capacity_bytes:
                    continue
                after = left + cost_of(room, {**there, name: (size, tasks)})
                candidate = (after - (costs[source] + costs[target]), name, source, target, size)
                if best is None or candidate < best:
                    best = candidate
    return best


def _move(snapshot: Snapshot, name: str, source: str, target: str, reason: str) -> Move:
    model = snapshot.catalogue[name]
    return Move(
        type="model_migration",
        model=name,
        from_worker=source,
        to_worker=target,
        memory_bytes=memory_needed(snapshot, model, target),
        predicted_s=load_seconds(snapshot, model, target),
        tasks_touched=held_of(snapshot, source, name),
        reason=reason,
    )


# ---------------------------------------------------------------- carrying out


def advance(snapshot: Snapshot, now: float) -> Decision:
    """The next step of the plan that is under way."""
    decision = Decision()
    plan = active(snapshot)
    if plan is None:
        return decision
    moves = list(plan.moves)
    for index, move in enumerate(moves):
        if move.state not in ("done", "failed"):
            moves[index] = _step(snapshot, now, move, decision)
            break
    if tuple(moves) == plan.moves:
        return decision
    over = all(move.state in ("done", "failed") for move in moves)
    status = plan.status
    if over:
        status = "failed" if any(move.state == "failed" for move in moves) else "completed"
        decision.event("cluster_rebalance_finished", rebalance_id=plan.rebalance_id, status=status)
    decision.changes.append(
        Save(changed(plan, moves=tuple(moves), status=status, finished_at=now if over else None))
    )
    return decision


def _step(snapshot: Snapshot, now: float, move: Move, decision: Decision) -> Move:
    source, target = move.from_worker or "", move.to_worker or ""
    if not {source, target} <= snapshot.reports.keys() and now - snapshot.started_at < WORKER_SILENT_S:
        return move  # a new leader waits for the first reports
    replica = snapshot.replicas.get(target, {}).get(move.model)
    started_at = move.started_at if move.started_at is not None else now
    if now - started_at > _MOVE_S_MAX:
        return changed(move, state="failed", actual_s=now - started_at, reason="it took too long")
    if move.state == "planned":
        model = snapshot.catalogue.get(move.model)
        goes = (target, move.model) in snapshot.draining
        if model is None or goes or not is_up(snapshot, target, now) or leaves(snapshot, target):
            return changed(move, state="failed", reason=f"{target} can no longer take it")
        if replica is None:
            if memory_needed(snapshot, model, target) > memory(snapshot, target).free:
                return changed(move, state="failed", reason=f"it no longer fits on {target}")
            load(snapshot, now, model, target, decision)
        return changed(move, state="loading", started_at=now)
    if move.state == "loading":
        goes = (target, move.model) in snapshot.draining  # an owner has unloaded it there
        if replica is None or goes or replica.state is ReplicaState.FAILED:
            why = f"{target} lost it" if replica is None or goes else replica.error
            return changed(move, state="failed", actual_s=now - started_at, reason=why)
        if replica.state is not ReplicaState.READY:
            return move
        wish = snapshot.assignments.get((source, move.model))
        if wish is not None:
            decision.changes += [Drop(wish), Save(changed(wish, worker_id=target))]
        decision.changes.append(drain(snapshot, now, source, move.model, MOVE))
        return changed(move, state="draining")
    if move.model not in snapshot.replicas.get(source, {}):
        return changed(move, state="done", actual_s=now - started_at)
    if (target, move.model) in snapshot.draining:  # an owner's wish, which may be for the source as well
        return changed(move, state="failed", actual_s=now - started_at, reason=f"{target} is to unload it")
    if not serves(snapshot, now, target, move.model):
        leaving = snapshot.draining.get((source, move.model))
        if leaving is not None and leaving.because == MOVE:  # what an owner unloads goes all the same
            decision.changes.append(Drop(leaving))
        return changed(move, state="failed", actual_s=now - started_at, reason=f"{target} lost it")
    return move
