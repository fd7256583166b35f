"""What the snapshot keeps beside its facts so that no decision has to walk over every worker.

All of it follows from the facts: `touch` works out anew what concerns one worker, and is called when that changes.
Silence comes with time alone: `Snapshot.listened` is in order of time, and a tick takes from its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peer.state.model import Assignment, Replica, ReplicaState
from peer.state.worker import EngineState

if TYPE_CHECKING:
    from peer.state.snapshot import Snapshot


@dataclass(slots=True)
class Index:
    placed: dict[str, dict[str, Replica]] = field(default_factory=dict)  # by model, by worker
    room: dict[str, dict[str, int]] = field(default_factory=dict)  # free slots by model, by worker; none is 0
    unmet: dict[tuple[str, str], Assignment] = field(default_factory=dict)  # preloads that are not there
    unused: dict[str, None] = field(default_factory=dict)  # workers that are ready and hold no task
    doubtful: dict[str, None] = field(
        default_factory=dict
    )  # whose report does not account for what they hold
    touched: dict[str, None] = field(default_factory=dict)  # since clients were told of their status
    named: dict[str, frozenset[str]] = field(default_factory=dict)  # "<task_id>/<attempt>" of the last report
    _roomy: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def place(self, worker_id: str, before: dict[str, Replica], after: dict[str, Replica]) -> None:
        """A worker's replicas are now these."""
        for model_name in before:
            if model_name not in after:
                of = self.placed[model_name]
                del of[worker_id]
                if not of:
                    del self.placed[model_name]
        for model_name, replica in after.items():
            self.placed.setdefault(model_name, {})[worker_id] = replica

    def forget(self, worker_id: str, replicas: dict[str, Replica]) -> None:
        """It holds no tasks and has no wishes."""
        self.place(worker_id, replicas, {})
        self._clear(worker_id)
        self.named.pop(worker_id, None)
        for names in (self.unused, self.touched, self.doubtful):
            names.pop(worker_id, None)

    def touch(self, snapshot: Snapshot, worker_id: str) -> None:
        self.touched[worker_id] = None
        report = snapshot.reports.get(worker_id)
        is_ready = report is not None and report.state is EngineState.READY
        held = snapshot.held.get(worker_id, {})
        _set(self.unused, worker_id, is_ready and not held)
        named = self.named.get(worker_id, frozenset())
        is_down = (
            report is None
            or report.state not in (EngineState.READY, EngineState.ERROR)
            or worker_id not in snapshot.listened
        )
        doubt = is_down or any(f"{t.task_id}/{t.attempt}" not in named for t in held.values())
        _set(self.doubtful, worker_id, bool(held) and doubt)
        self._wishes(snapshot, worker_id)
        self._rooms(snapshot, worker_id, is_ready)

    def _wishes(self, snapshot: Snapshot, worker_id: str) -> None:
        replicas = snapshot.replicas.get(worker_id, {})
        for model_name, wish in snapshot.wishes.get(worker_id, {}).items():
            replica = replicas.get(model_name)
            if wish.preload and (replica is None or replica.state is ReplicaState.FAILED):
                self.unmet[worker_id, model_name] = wish
            else:
                self.unmet.pop((worker_id, model_name), None)

    def _clear(self, worker_id: str) -> None:
        for model_name in self._roomy.pop(worker_id, ()):
            of = self.room[model_name]
            del of[worker_id]
            if not of:
                del self.room[model_name]

    def _rooms(self, snapshot: Snapshot, worker_id: str, is_ready: bool) -> None:
        self._clear(worker_id)
        if not is_ready or worker_id in snapshot.paused:
            return
        held = snapshot.held.get(worker_id, {})
        slots_max = snapshot.reports[worker_id].slots_max
        roomy = []
        for model_name, replica in snapshot.replicas[worker_id].items():
            if replica.state is not ReplicaState.READY or (worker_id, model_name) in snapshot.draining:
                continue
            free = replica.slots - sum(task.model_name == model_name for task in held.values())
            if slots_max:
                free = min(free, slots_max - len(held))
            if free > 0:
                self.room.setdefault(model_name, {})[worker_id] = free
                roomy.append(model_name)
        if roomy:
            self._roomy[worker_id] = tuple(roomy)


def _set(names: dict[str, None], name: str, present: bool) -> None:
    if present:
        names[name] = None
    else:
        names.pop(name, None)
