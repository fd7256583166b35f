"""What the leader orders peers to do, and what peers report. Every order carries the epoch it was made in."""

from __future__ import annotations

from typing import Any

from peer.state.base import Record
from peer.state.model import Model
from peer.state.task import Array, Logprobs, result_bytes
from peer.state.worker import WorkerReport

# ---------------------------------------------------------------- leader -> peer


class RunAttempt(Record, frozen=True, tag="run_attempt"):
    epoch: int
    worker_id: str
    task_id: str
    attempt: int
    model_name: str
    task_type: str
    parameters: dict[str, Any]
    request_id: str = ""


class StopAttempt(Record, frozen=True, tag="stop_attempt"):
    """Free its slot; no report is wanted."""

    epoch: int
    worker_id: str
    task_id: str
    attempt: int


class ForgetAttempt(Record, frozen=True, tag="forget_attempt"):
    """Its outcome is recorded: the peer need not report it again."""

    epoch: int
    worker_id: str
    task_id: str
    attempt: int


class LoadReplica(Record, frozen=True, tag="load_replica"):
    epoch: int
    worker_id: str
    model: Model


class UnloadReplica(Record, frozen=True, tag="unload_replica"):
    epoch: int
    worker_id: str
    model_name: str


class RestartEngine(Record, frozen=True, tag="restart_engine"):
    epoch: int
    worker_id: str


Order = RunAttempt | StopAttempt | ForgetAttempt | LoadReplica | UnloadReplica | RestartEngine

# ---------------------------------------------------------------- peer -> leader


class AttemptStarted(Record, frozen=True, tag="attempt_started"):
    worker_id: str
    task_id: str
    attempt: int
    at: float
    prompt_tokens: int


class AttemptFinished(Record, frozen=True, tag="attempt_finished"):
    """Reported until the leader says ForgetAttempt."""

    worker_id: str
    task_id: str
    attempt: int
    at: float
    generated_text: str
    tokens_generated: int
    prompt_tokens: int
    finish_reason: str
    processing_s: float
    first_token_s: float
    cached_tokens: int = 0
    stand_in: bool = False
    logprobs: tuple[Logprobs, ...] = ()  # as a TaskResult's
    arrays: tuple[Array, ...] = ()

    @property
    def nbytes(self) -> int:
        return result_bytes(self.generated_text, self.logprobs, self.arrays)


class AttemptFailed(Record, frozen=True, tag="attempt_failed"):
    """`retryable`: the engine failed the task, not the task itself. Reported until ForgetAttempt."""

    worker_id: str
    task_id: str
    attempt: int
    at: float
    code: str
    message: str
    retryable: bool


class WorkerReported(Record, frozen=True, tag="worker_reported"):
    report: WorkerReport


class ReplicaLoaded(Record, frozen=True, tag="replica_loaded"):
    """A load has ended well: what it measured. The state itself is in the WorkerReport."""

    worker_id: str
    model_name: str
    device_name: str
    memory_bytes: int
    load_s: float


class AlertRaised(Record, frozen=True, tag="alert_raised"):
    """A threshold was crossed, upwards (`raised`) or back."""

    worker_id: str
    kind: str  # temperature, memory, ecc, engine
    level: str  # warning, critical
    raised: bool
    value: float
    threshold: float
    unit: str
    message: str


class EngineStarted(Record, frozen=True, tag="engine_started"):
    """How long this worker was away, from the restart's beginning to its self-test."""

    worker_id: str
    downtime_s: float


Report = (
    AttemptStarted
    | AttemptFinished
    | AttemptFailed
    | WorkerReported
    | ReplicaLoaded
    | AlertRaised
    | EngineStarted
)
