"""Hosts that are to be emptied, and the plans that a leader makes by itself: by the checker's own books."""

from __future__ import annotations

from collections.abc import Iterator

from peer.decide.decision import Decision
from peer.decide.replan import EMPTY, PLANS_EVERY_S
from peer.decide.workers import can_run, memory, memory_needed, usable
from peer.state.model import ReplicaState
from peer.state.order import LoadReplica
from peer.state.plan import Plan
from peer.state.snapshot import Save, Snapshot, StoreWrites
from simulations.policy.losses import Checks


class Leavings:
    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._owed: dict[str, None] = {}  # durable
        self._planned_at: float | None = None  # by the leader itself, in this leadership

    def begin(self, snapshot: Snapshot) -> None:
        """A new leader has loaded what the store holds."""
        self._planned_at = None
        same = self._owed.keys() == snapshot.leaving.keys()
        text = f"{[*self._owed]} leave, the leader knows of {[*snapshot.leaving]}"
        self._checks.check("an acknowledged drain is not forgotten", same, text)
        if self._owed:
            self._checks.saw("host's drain lived through a new leader")

    def stored(self, writes: StoreWrites) -> None:
        for key, value in writes.items():
            if not key.startswith("leaving/"):
                continue
            if value is None:
                self._owed.pop(key[8:], None)
                self._checks.saw("host's drain undone")
            else:
                self._owed[key[8:]] = None
                self._checks.saw("host drained")

    def decided(self, name: str, decision: Decision, snapshot: Snapshot, now: float) -> None:
        for peer_id, order in decision.orders:
            if isinstance(order, LoadReplica):
                text = f"{name} loads {order.model.name} on {order.worker_id}"
                self._checks.check("a leaving host gets no load", peer_id not in snapshot.leaving, text)
                stays_away = (order.worker_id, order.model.name) not in snapshot.draining
                self._checks.check("what an owner unloads stays away", stays_away, text)
        if name == "replan":
            for change in decision.changes:
                if isinstance(change, Save) and isinstance(change.record, Plan):
                    self._planned(change.record, now)

    def _planned(self, plan: Plan, now: float) -> None:
        if plan.strategy == EMPTY:
            self._checks.saw("plan to empty a host")
            return
        since = None if self._planned_at is None else now - self._planned_at
        rare = since is None or since >= PLANS_EVERY_S
        self._checks.check("plans of the leader's own are rare", rare, f"{since} s after the last one")
        self._planned_at = now
        self._checks.saw("plan of the leader's own")


def still_there(snapshot: Snapshot, now: float) -> Iterator[str]:
    """What could be elsewhere and is still on a host that leaves."""
    others = usable(snapshot, now)
    for peer_id in snapshot.leaving:
        for worker_id in snapshot.peers.get(peer_id, ()):
            for name, replica in snapshot.replicas.get(worker_id, {}).items():
                if replica.state is ReplicaState.READY and _has_place(snapshot, name, others):
                    yield f"{name} is still on {worker_id}, whose host leaves"


def _has_place(snapshot: Snapshot, name: str, others: list[str]) -> bool:
    model = snapshot.catalogue[name]
    for worker_id in others:
        replica = snapshot.replicas[worker_id].get(name)
        if replica is not None:
            if replica.state is ReplicaState.READY:
                return True
        elif can_run(snapshot, model, worker_id) and (
            memory_needed(snapshot, model, worker_id) <= memory(snapshot, worker_id).free
        ):
            return True
    return False
