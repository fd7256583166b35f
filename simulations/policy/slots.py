"""Who gets work: ready replicas with a free slot, at once, on devices whose memory suffices."""

from __future__ import annotations

from collections.abc import Iterable

from peer.state.model import HOLDS_MEMORY, ReplicaState
from peer.state.order import RunAttempt
from peer.state.snapshot import Snapshot
from peer.state.worker import EngineState
from simulations.policy.losses import Checks, Losses


class Slots:
    def __init__(self, checks: Checks, losses: Losses) -> None:
        self._checks = checks
        self._losses = losses
        self._touched: dict[str, None] = {}  # workers, since it was last looked for idle slots
        self._queued_before: dict[str, None] = {}

    def touch(self, *worker_ids: str) -> None:
        """Something about these workers has changed."""
        self._touched.update(dict.fromkeys(worker_ids))

    def assigned(self, snapshot: Snapshot, order: RunAttempt) -> None:
        worker_id, name = order.worker_id, order.model_name
        replica = snapshot.replicas[worker_id].get(name)
        ready = replica is not None and replica.state is ReplicaState.READY
        self._checks.check("only ready replicas get tasks", ready, f"{order.task_id}: {name} on {worker_id}")
        draining = (worker_id, name) in snapshot.draining
        self._checks.check(
            "draining replicas get no task", not draining, f"{order.task_id}: {name} on {worker_id}"
        )
        up = (
            self._losses.there(snapshot, worker_id) and snapshot.reports[worker_id].state is EngineState.READY
        )
        self._checks.check("only workers that are up get tasks", up, f"{order.task_id} on {worker_id}")
        held = snapshot.held[worker_id]
        mine = sum(task.model_name == name for task in held.values())
        slots, slots_max = (replica.slots if replica else 0), snapshot.reports[worker_id].slots_max
        text = f"{worker_id} holds {mine} of {name} with {slots} slots, {len(held)} of {slots_max} in all"
        self._checks.check("slots are never exceeded", mine <= slots and len(held) <= slots_max, text)

    def none_idle(self, snapshot: Snapshot) -> None:
        """After every batch: no task waits while a replica of its model has a free slot.

        Only what has changed is looked at: the batch's workers, and all of a model that nothing waited for before.
        """
        touched, self._touched = self._touched, {}
        for name in snapshot.queues:
            if name not in self._queued_before:
                touched.update(dict.fromkeys(w for w, of in snapshot.replicas.items() if name in of))
        self._queued_before = dict.fromkeys(snapshot.queues)
        if snapshot.queues:
            self._none_idle_of(snapshot, touched)

    def _none_idle_of(self, snapshot: Snapshot, workers: Iterable[str]) -> None:
        self._checks.check("no task waits beside a free slot", True)
        for worker_id in workers:
            report = snapshot.reports.get(worker_id)
            if report is None or report.state is not EngineState.READY or worker_id in snapshot.paused:
                continue
            held = snapshot.held.get(worker_id, {})
            if len(held) >= report.slots_max or not self._losses.there(snapshot, worker_id):
                continue
            for name, replica in snapshot.replicas[worker_id].items():
                if (
                    name in snapshot.queues
                    and replica.state is ReplicaState.READY
                    and (worker_id, name) not in snapshot.draining
                ):
                    mine = sum(task.model_name == name for task in held.values())
                    text = f"{name} on {worker_id}: {mine} of {replica.slots} slots"
                    self._checks.check("no task waits beside a free slot", mine >= replica.slots, text)

    def fits(self, snapshot: Snapshot, worker_id: str, model_name: str, needed: int) -> None:
        """By what the leader knows: every replica that holds or will soon hold memory, and the new one."""
        report = snapshot.reports[worker_id]
        ours = sum(
            r.memory_bytes
            for r in snapshot.replicas[worker_id].values()
            if r.state in HOLDS_MEMORY and r.model_name != model_name
        )
        total = report.telemetry.memory_total_bytes
        self._checks.check(
            "replicas fit their device",
            ours + needed <= total,
            f"{model_name} needs {needed} on {worker_id} beside {ours} of {total}",
        )
