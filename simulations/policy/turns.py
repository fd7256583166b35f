"""Models that wait for room which busy ones have: none is kept out past their turns, by the checker's own clock."""

from __future__ import annotations

from peer.decide.workers import can_run, held_of, load_seconds, memory, memory_needed, usable
from peer.limits import KEPT_OUT_S, TURN_LOADS, TURN_S
from peer.state.model import Model, ReplicaState
from peer.state.snapshot import Snapshot
from simulations.policy.losses import Checks

_CLOCKS_S = 5.0  # hosts' and leader's clocks differ by no more


class Turns:
    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._kept_out_since: dict[str, float] = {}  # by model

    def gives_way(self, snapshot: Snapshot, worker_id: str, model_name: str) -> None:
        """This replica is to make room."""
        if model_name in snapshot.queues or held_of(snapshot, worker_id, model_name):
            self._checks.saw("busy model gave way")

    def timely(self, snapshot: Snapshot, now: float, late: float) -> None:
        """After a tick, once every worker can have reported to this leader."""
        kept_out = {} if _moving(snapshot) else dict(_kept_out(snapshot, now))
        self._kept_out_since = {name: self._kept_out_since.get(name, now) for name in kept_out}
        for name, worker_id in kept_out.items():
            waits_s = now - self._kept_out_since[name]
            text = (
                f"{name} waits for room on {worker_id}, where the others had their turn {waits_s:.1f} s ago"
            )
            self._checks.check("every model gets its turn", waits_s <= late, text)


def _moving(snapshot: Snapshot) -> bool:
    """Whether room is being made, or used, somewhere: that may be for the model that waits."""
    going = (ReplicaState.FETCHING, ReplicaState.LOADING, ReplicaState.UNLOADING)
    moves = any(replica.state in going for of in snapshot.replicas.values() for replica in of.values())
    drains = any(name in snapshot.replicas.get(worker_id, {}) for worker_id, name in snapshot.draining)
    return moves or drains or bool(snapshot.under_way) or bool(snapshot.index.unmet)


def _kept_out(snapshot: Snapshot, now: float) -> list[tuple[str, str]]:
    """Models with tasks that have waited, and a worker where only busy models are in their way.

    One that goes before and is served nowhere may keep one worker for itself.
    """
    found, before = [], 0
    for name in sorted(snapshot.queues, key=lambda name: snapshot.queues[name][0]):
        model = snapshot.catalogue.get(name)
        waited_s = now - snapshot.tasks[snapshot.queues[name][0][1]].created_at
        if model is None or waited_s < KEPT_OUT_S - _CLOCKS_S:
            continue
        replicas = snapshot.index.placed.get(name, {})
        if not replicas and waited_s >= KEPT_OUT_S + _CLOCKS_S:
            workers = [w for w in usable(snapshot, now) if _is_in_the_way(snapshot, now, model, w)]
            found += [(name, w) for w in workers[before:][:1]]
        before += all(replica.state is not ReplicaState.READY for replica in replicas.values())
    return found


def _is_in_the_way(snapshot: Snapshot, now: float, model: Model, worker_id: str) -> bool:
    """Whether the model would fit if all that is here went, and all may go: it is busy, and has had its turn."""
    turn_s = max(TURN_S, TURN_LOADS * load_seconds(snapshot, model, worker_id)) + _CLOCKS_S
    here = snapshot.replicas[worker_id]
    room = memory(snapshot, worker_id, without=frozenset(here))
    if not can_run(snapshot, model, worker_id) or memory_needed(snapshot, model, worker_id) > room.free:
        return False
    if snapshot.wishes.get(worker_id) or (worker_id, model.name) in snapshot.draining:
        return False
    first = snapshot.queues[model.name][0]
    return all(
        replica.state is ReplicaState.READY
        and now - replica.since >= turn_s
        and snapshot.queues.get(name, [first])[0] >= first
        for name, replica in here.items()
    )
