"""Models: what the catalogue says of them, the wish that one be on a worker, and what a load has cost."""

from __future__ import annotations

from enum import StrEnum

from peer.state.base import Record


class ModelFile(Record, frozen=True):
    """One file of a model's folder."""

    name: str
    sha256: str
    size_bytes: int = 0  # 0: unknown until fetched


class Model(Record, frozen=True):
    """One entry of the catalogue (configs/models.yaml)."""

    name: str
    source: str  # package:NAME==VERSION#path, file:/path, https://..., hf:owner/repo@revision#path
    family: str
    size_bytes: int = 0  # of the file, or all files; 0: unknown until fetched
    sha256: str = ""  # of the file
    files: tuple[ModelFile, ...] = ()  # of a folder
    context: int = 2048
    slots: int = 8
    memory_bytes: int = 0  # on the device; 0: estimated from the size until measured
    task_types: tuple[str, ...] = ("text_generation",)
    description: str = ""
    license: str = ""


class Assignment(Record, frozen=True):
    """The wish that a model be on a worker. Durable: it is fulfilled again after a restart."""

    assignment_id: str
    model_name: str
    worker_id: str
    preload: bool  # True: now; False: on first use
    priority: int
    created_at: float


class Draining(Record, frozen=True):
    """A replica takes no new task and is unloaded when it is idle. Durable until the replica is gone, and until tasks
    may bring it back."""

    worker_id: str
    model_name: str
    since: float
    because: str  # owner, room (another model needs it), move (a rebalance takes it elsewhere)
    until: float = 0.0  # where an owner has unloaded it by force


class LoadProfile(Record, frozen=True):
    """What loading this model on this device has measured; the next estimate comes from it."""

    model_name: str
    device_name: str
    memory_bytes: int
    load_s: float


class ReplicaState(StrEnum):
    FETCHING = "fetching"  # its file is on its way; holds no device memory
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # takes no new tasks, unloaded when its last one ends
    UNLOADING = "unloading"
    FAILED = "failed"


class Replica(Record, frozen=True):
    """A model on a worker, as its peer reports it (and as the leader foresees it between reports)."""

    worker_id: str
    model_name: str
    state: ReplicaState
    memory_bytes: int = 0  # measured when ready, foreseen before
    load_s: float = 0.0
    since: float = 0.0  # of this state
    last_used: float = 0.0
    slots: int = 0
    context: int = 0
    stage: str = ""  # of a fetch or load: fetch, verify, wait, read, upload, compile, search
    done: int = 0
    total: int = 0
    failures: int = 0
    error: str = ""
    error_code: str = ""
    not_before: float = 0.0  # a failed load is not tried again before


HOLDS_MEMORY = frozenset(
    {ReplicaState.LOADING, ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.UNLOADING}
)
