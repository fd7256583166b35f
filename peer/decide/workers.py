"""What a worker is worth right now: its status, its free memory, its free slots."""

from __future__ import annotations

from dataclasses import dataclass

from peer.state.model import HOLDS_MEMORY, Model, Replica, ReplicaState
from peer.state.snapshot import Snapshot
from peer.state.units import memory_text
from peer.state.worker import EngineState

_FILE_TO_MEMORY = (
    1.25  # weights as in the file, plus caches and activations: only until a load has measured it
)
_BYTES_PER_S = 100e6  # of a first load, likewise
_LOAD_S_MIN = 1.0


def away(snapshot: Snapshot, worker_id: str, now: float) -> str:
    """Why nothing is known of this worker as it is now; "" if it is there."""
    if worker_id in snapshot.listened:
        if worker_id in snapshot.heard_at:
            return ""
        return "it has not reported to this leader yet"
    loss = snapshot.lost.get(snapshot.workers[worker_id].peer_id)
    if loss is not None:
        return loss.because
    silent_s = now - snapshot.heard_at.get(worker_id, snapshot.started_at)
    return f"it has not reported for {silent_s:.0f} s"


def status(snapshot: Snapshot, worker_id: str, now: float) -> str:
    """online, busy (every slot taken), offline (lost, silent, or its engine is not up) or error."""
    report = snapshot.reports.get(worker_id)
    if report is None or away(snapshot, worker_id, now):
        return "offline"
    if report.state is EngineState.ERROR:
        return "error"
    if report.state is not EngineState.READY:
        return "offline"
    held = len(snapshot.held.get(worker_id, ()))
    if not held:
        return "online"
    slots = sum(r.slots for r in snapshot.replicas[worker_id].values() if r.state is ReplicaState.READY)
    return "busy" if slots and held >= slots else "online"


def is_up(snapshot: Snapshot, worker_id: str, now: float) -> bool:
    """Whether its engine is ready and its peer is there: status online or busy."""
    report = snapshot.reports.get(worker_id)
    return report is not None and report.state is EngineState.READY and not away(snapshot, worker_id, now)


def reachable(snapshot: Snapshot, worker_id: str, now: float) -> bool:
    """Whether an order can be expected to arrive: its peer is there, and the session with it, if any, stands."""
    return snapshot.workers[worker_id].peer_id not in snapshot.unlinked and not away(snapshot, worker_id, now)


def usable(snapshot: Snapshot, now: float) -> list[str]:
    """Workers that may get models: engine up, peer there and not to leave; in order of their ids."""
    return [w for w in sorted(snapshot.workers) if is_up(snapshot, w, now) and not leaves(snapshot, w)]


def leaves(snapshot: Snapshot, worker_id: str) -> bool:
    """Whether its host is to be emptied."""
    return snapshot.workers[worker_id].peer_id in snapshot.leaving


def can_run(snapshot: Snapshot, model: Model, worker_id: str) -> bool:
    """A built-in model is a behaviour of the stand-in engine; every other one needs a real device or the stand-in."""
    return not model.source.startswith("builtin:") or snapshot.workers[worker_id].device.stand_in


def held_of(snapshot: Snapshot, worker_id: str, model_name: str) -> int:
    """Tasks of this model that are assigned to or running on this worker."""
    return sum(task.model_name == model_name for task in snapshot.held.get(worker_id, {}).values())


def free_slots(snapshot: Snapshot, replica: Replica, held: int) -> int:
    """How many more tasks a replica can run while its worker holds `held` tasks of all its models."""
    free = replica.slots - held_of(snapshot, replica.worker_id, replica.model_name)
    slots_max = snapshot.reports[replica.worker_id].slots_max
    return min(free, slots_max - held) if slots_max else free


def takes_tasks(snapshot: Snapshot, replica: Replica) -> bool:
    return replica.state is ReplicaState.READY and (
        (replica.worker_id, replica.model_name) not in snapshot.draining
    )


def serves(snapshot: Snapshot, now: float, worker_id: str, model_name: str) -> bool:
    """Whether this worker is up and its replica of the model is ready."""
    replica = snapshot.replicas.get(worker_id, {}).get(model_name)
    is_ready = replica is not None and replica.state is ReplicaState.READY
    return is_ready and is_up(snapshot, worker_id, now)


def memory_needed(snapshot: Snapshot, model: Model, worker_id: str) -> int:
    """Bytes on the device: measured if this model has been loaded on such a device, else foreseen."""
    profile = snapshot.profiles.get((snapshot.workers[worker_id].device.name, model.name))
    if profile is not None:
        return profile.memory_bytes
    return model.memory_bytes or int(model.size_bytes * _FILE_TO_MEMORY)


def load_seconds(snapshot: Snapshot, model: Model, worker_id: str) -> float:
    """Measured at the last load on such a device; before the first one, from the size at a modest rate."""
    profile = snapshot.profiles.get((snapshot.workers[worker_id].device.name, model.name))
    if profile is not None:
        return profile.load_s
    return max(_LOAD_S_MIN, model.size_bytes / _BYTES_PER_S)


@dataclass(frozen=True, slots=True)
class Memory:
    """A device's memory in bytes: `others` is other processes' part, `ours` that of each replica, loading ones too."""

    total: int
    reserve: int
    others: int
    ours: tuple[tuple[str, int], ...]

    @property
    def free(self) -> int:
        return self.total - self.reserve - self.others - sum(size for _, size in self.ours)

    def arithmetic(self, needed: int) -> str:
        """The sum in words."""
        parts = [f"{memory_text(self.reserve)} reserved"] if self.reserve else []
        if self.others:
            parts.append(f"{memory_text(self.others)} used by other processes")
        parts += [f"{memory_text(size)} by {name}" for name, size in self.ours]
        rest = f" ({', '.join(parts)})" if parts else ""
        return (
            f"needs {memory_text(needed)}, {memory_text(max(0, self.free))} of "
            f"{memory_text(self.total)} free{rest}"
        )


def memory(snapshot: Snapshot, worker_id: str, *, without: frozenset[str] = frozenset()) -> Memory:
    """The worker's memory, as if the models in `without` were already unloaded."""
    report = snapshot.reports[worker_id]
    holding = [r for r in snapshot.replicas[worker_id].values() if r.state in HOLDS_MEMORY]
    promised = sum(r.memory_bytes for r in holding)  # a part of what loads may be measured as used already
    return Memory(
        total=report.telemetry.memory_total_bytes,
        reserve=snapshot.policy.memory_reserve_bytes,
        others=max(0, report.telemetry.memory_used_bytes - promised),
        ours=tuple((r.model_name, r.memory_bytes) for r in holding if r.model_name not in without),
    )
