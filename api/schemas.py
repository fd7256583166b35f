"""What clients send and get, as types: they validate, serialise and describe (`api.openapi`).

The documented fields come first, under their documented names and always present; what follows in a struct is
beyond the document. Times that end in `_seconds`, sizes that end in `_bytes` are for programs.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from api.schemas_results import EmbeddingResult, TensorResult
from peer import limits
from peer.state.key import Scope
from peer.state.plan import Strategy

# ---------------------------------------------------------------- what clients send

Name = Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS_MAX)]
Priority = Literal["low", "normal", "high", "critical"] | Annotated[int, Meta(ge=1, le=10)]
WorkerIds = Annotated[list[Name], Meta(max_length=1_000)]
RequestLimit = Annotated[int, Meta(ge=1, le=1_000_000_000)]


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of request bodies: unknown fields are refused."""


class AssignModel(Body):
    """Without `worker_ids` the model goes where it fits best. `preload`: now, else on first use."""

    model_name: Name
    worker_ids: WorkerIds = []
    preload: bool = True
    priority: Priority = "normal"


class UnloadModel(Body):
    """Without `worker_ids` everywhere. `force` interrupts running tasks, which are queued again."""

    model_name: Name
    worker_ids: WorkerIds = []
    force: bool = False


class Rebalance(Body):
    strategy: Strategy = "memory_optimized"
    force: bool = False
    dry_run: bool = False


class CreateKey(Body):
    """A limit that is left out is the configured one, null is none."""

    owner: Annotated[
        str, Meta(min_length=1, max_length=limits.NAME_CHARS_MAX, pattern=r"^[^\x00-\x1f\x7f]+\Z")
    ]
    scopes: Annotated[list[Scope], Meta(min_length=1, max_length=4)]
    expires_at: Annotated[datetime, Meta(tz=True)] | None = None
    requests_per_hour: RequestLimit | UnsetType | None = UNSET
    requests_per_minute: RequestLimit | UnsetType | None = UNSET


# ---------------------------------------------------------------- what clients get


class Answer(msgspec.Struct, kw_only=True):
    """Base of answers."""


class Read(Answer, kw_only=True):
    """Base of what may be an old answer, where a client takes one."""

    stale_seconds: float | UnsetType = UNSET


class Health(Answer):
    status: Literal["healthy"]
    timestamp: str
    version: str


class Probe(Answer):
    status: Literal["ok", "ready"]


class Voter(Answer):
    """A member of the cluster's store. A learner has a copy and no vote; `linked`: it is believed to be up."""

    peer_id: str
    learner: bool
    linked: bool


class StoreRoom(Answer):
    """How full the cluster's store is. `level`: "", warning, critical (no new tasks) or full (nothing is written)."""

    level: Literal["", "warning", "critical", "full"]
    used_percent: float
    used_bytes: int
    file_bytes: int
    quota_bytes: int


class ClusterStatus(Read):
    cluster_id: str
    status: str  # operational, degraded, down
    total_workers: int
    active_workers: int
    queued_tasks: int
    running_tasks: int
    gpu_utilization: float
    total_memory: str
    available_memory: str
    uptime: str
    total_memory_bytes: int
    available_memory_bytes: int
    uptime_seconds: float
    leader: str
    epoch: int
    reasons: tuple[str, ...]
    voters: tuple[Voter, ...]
    outlook: str  # what the loss of a host would mean right now
    store: StoreRoom | None  # null: on one host, or not known yet


class GpuInfo(Answer):
    """null: the device cannot tell, or the worker has not reported yet."""

    model: str
    memory_total: str | None
    memory_used: str | None
    temperature: int | None  # degrees Celsius
    utilization: float | None
    driver_version: str | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    architecture: str
    device: str
    stand_in: bool
    telemetry_source: str | None


class SystemInfo(Answer):
    cpu: str | None
    ram_total: str | None
    ram_used: str | None
    os: str | None
    hostname: str | None
    ram_total_bytes: int | None
    ram_used_bytes: int | None


class WorkerSummary(Answer):
    worker_id: str
    status: str  # online, offline, busy, error
    gpu_info: GpuInfo
    loaded_models: tuple[str, ...]
    current_tasks: int
    last_heartbeat: str | None
    performance_score: float
    message: str
    peer_id: str


class WorkerList(Read):
    """`total` counts the workers listed; `online` those that serve (online or busy)."""

    workers: list[WorkerSummary]
    total: int
    online: int
    offline: int
    busy: int
    error: int


class LoadedModel(Answer):
    name: str
    memory_usage: str
    load_time: str
    last_used: str | None
    status: str
    memory_usage_bytes: int
    load_time_seconds: float


class TaskHistory(Answer):
    """Of today, UTC. null where nothing has ended."""

    completed_today: int
    average_duration: str | None
    success_rate: float | None
    average_duration_seconds: float | None


class WorkerMetrics(Answer):
    """Of the last hour. `error_rate` is a fraction. null where nothing has ended."""

    tasks_per_hour: int
    average_response_time: str | None
    error_rate: float | None
    average_response_time_seconds: float | None
    tokens_per_second: float | None


class WorkerDetail(Read):
    worker_id: str
    status: str
    gpu_info: GpuInfo
    system_info: SystemInfo
    loaded_models: list[LoadedModel]
    task_history: TaskHistory
    metrics: WorkerMetrics
    current_tasks: int
    last_heartbeat: str | None
    performance_score: float
    message: str
    peer_id: str
    slots_max: int | None
    engine_deaths: int | None


class RestartStarted(Answer):
    message: str
    worker_id: str
    estimated_downtime: str
    estimated_downtime_seconds: float
    requeued_tasks: tuple[str, ...]


class TokenLogprob(Answer, kw_only=True):
    """A token's natural logarithm of its probability. `bytes` is there where `token` cannot show them all."""

    id: int
    token: str
    logprob: float
    bytes: list[int] | UnsetType = UNSET


class TokenLogprobs(TokenLogprob, kw_only=True):
    """Of a generated token. `top_logprobs` are the likeliest ones in its place, best first."""

    top_logprobs: list[TokenLogprob]


class TaskResult(Answer, tag_field="task_type", tag="text_generation"):
    generated_text: str
    tokens_generated: int
    processing_time: str
    processing_time_seconds: float
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str
    first_token_seconds: float
    stand_in: bool
    logprobs: list[TokenLogprobs] | UnsetType = UNSET


class TaskError(Answer):
    code: str
    message: str


class PendingReason(Answer):
    """`worker_id` "" speaks of the cluster as a whole."""

    worker_id: str
    reason: str


class TaskSummary(Answer):
    task_id: str
    status: str  # queued, running, completed, failed, cancelled
    task_type: str
    assigned_worker: str | None
    duration: str | None
    created_at: str
    model_name: str
    priority: int
    started_at: str | None
    completed_at: str | None
    duration_seconds: float | None
    error: TaskError | None


class TaskDetail(Read):
    task_id: str
    status: str
    assigned_worker: str | None
    created_at: str
    started_at: str | None
    completed_at: str | None
    duration: str | None
    result: TaskResult | EmbeddingResult | TensorResult | None
    estimated_wait_time: str | None  # null: nothing measured to estimate from, or no longer waiting
    task_type: str
    model_name: str
    priority: int
    timeout: float
    attempt: int
    tokens_so_far: int | None  # null: it runs on another host than the leader's, whose stream tells
    duration_seconds: float | None
    estimated_wait_seconds: float | None
    error: TaskError | None
    pending_reasons: list[PendingReason]
    requeued_because: str
    request_id: str


class TaskList(Read):
    tasks: list[TaskSummary]
    total: int
    limit: int
    offset: int


class TaskCancelled(Answer):
    message: str
    task_id: str
    status: str


class PlacedModel(Answer):
    worker_id: str
    status: str  # loading, queued, loaded, assigned
    estimated_time: str
    estimated_seconds: float
    reason: str


class ModelAssigned(Answer):
    assignment_id: str
    model_name: str
    assignments: list[PlacedModel]


class UnloadStarted(Answer):
    message: str
    model_name: str
    affected_workers: tuple[str, ...]
    requeued_tasks: tuple[str, ...]


class AssignedModel(Answer):
    name: str
    status: str  # assigned, fetching, loading, loaded, draining, unloading, failed
    memory_usage: str | None
    load_time: str | None
    memory_usage_bytes: int | None
    load_time_seconds: float | None
    progress: float | None  # percent of this stage
    stage: str | None  # of a fetch or load: fetch, verify, wait, read, upload, compile, search
    stage_done: int | None  # bytes; of compile graphs, of search kernels
    stage_total: int | None  # null where it is not known
    error: str


class WorkerAssignments(Answer):
    worker_id: str
    models: list[AssignedModel]


class AssignmentList(Read):
    assignments: list[WorkerAssignments]


class ModelReplica(Answer):
    """`slots`: tasks that it works on at once; until it is loaded, those that are asked for."""

    worker_id: str
    status: str
    slots: int


class CatalogueModel(Answer):
    name: str
    family: str
    source: str
    context: int
    size: str | None
    size_bytes: int
    description: str
    license: str
    task_types: tuple[str, ...]
    replicas: list[ModelReplica]
    queued_tasks: int


class ModelList(Read):
    models: list[CatalogueModel]
    total: int


class Operation(Answer):
    type: str  # model_migration, model_load, model_unload
    from_worker: str | None
    to_worker: str | None
    model: str
    status: str  # planned, loading, draining, done, failed
    memory: str
    memory_bytes: int
    predicted_seconds: float
    actual_seconds: float | None
    tasks_touched: int
    reason: str


class RebalancePlan(Answer):
    rebalance_id: str
    status: str  # planned, initiated, completed, failed
    estimated_duration: str
    affected_workers: list[str]
    operations: list[Operation]
    strategy: str
    dry_run: bool
    force: bool
    estimated_duration_seconds: float
    reasons: tuple[str, ...]
    created_at: str
    finished_at: str | None


class Utilization(Answer):
    average: float | None
    peak: float | None
    minimum: float | None


class MemoryUsage(Answer):
    """`efficiency`: percent of the used memory that loaded models hold."""

    average: str | None
    peak: str | None
    efficiency: float | None


class MetricValues(Answer):
    """null where nothing was measured."""

    total_tasks: int
    successful_tasks: int
    failed_tasks: int
    success_rate: float | None
    average_response_time: str | None
    peak_throughput: str
    gpu_utilization: Utilization
    memory_usage: MemoryUsage
    average_response_time_seconds: float | None
    peak_tasks_per_minute: int


class Metrics(Read):
    timeframe: str
    metrics: MetricValues


class Key(Answer):
    key_id: str
    owner: str
    scopes: tuple[str, ...]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    requests_per_hour: int | None
    requests_per_minute: int | None


class NewKey(Key):
    """`key` is the bearer token, shown this once."""

    key: str


class KeyList(Answer):
    keys: list[Key]
    total: int
