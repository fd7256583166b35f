"""What the API asks of the cluster, and what it is answered. All of it can cross the link between peers.

Commands change something and are answered once that is durable. Queries read. What is counted for the whole cluster is
answered from memory (`peer.state.quota`). Errors are `peer.errors`.
"""

from __future__ import annotations

from typing import Any

from peer.state.base import Record
from peer.state.enrol import CreateJoinToken, Enrol, GetAuthority, ListHosts, Renew, RevokeHost
from peer.state.key import ApiKey
from peer.state.metric import WorkerMetrics
from peer.state.model import Assignment, Model, Replica
from peer.state.quota import Counted
from peer.state.task import Logprobs, Task, TaskResult
from peer.state.voter import Room, VoterView
from peer.state.worker import Worker, WorkerReport

# ---------------------------------------------------------------- commands


class SubmitTask(Record, frozen=True, tag="submit_task"):
    """-> Submitted"""

    task_type: str
    model_name: str
    parameters: dict[str, Any]  # validated
    priority: int
    timeout_s: float
    owner: str
    key_id: str
    request_id: str = ""
    idempotency_key: str = ""
    body_digest: str = ""  # of the request's meaning; compared when the idempotency key comes again


class CancelTask(Record, frozen=True, tag="cancel_task"):
    """-> TaskView. NotFound; Conflict when it is already finished."""

    task_id: str


class AssignModel(Record, frozen=True, tag="assign_model"):
    """-> AssignReply. NotFound for a model or worker; Conflict with the arithmetic when it cannot fit."""

    model_name: str
    worker_ids: tuple[str, ...]  # empty: where it fits best
    preload: bool
    priority: int


class UnloadModel(Record, frozen=True, tag="unload_model"):
    """-> UnloadReply"""

    model_name: str
    worker_ids: tuple[str, ...]  # empty: everywhere
    force: bool


class RestartWorker(Record, frozen=True, tag="restart_worker"):
    """-> RestartReply"""

    worker_id: str


class Rebalance(Record, frozen=True, tag="rebalance"):
    """-> Plan"""

    strategy: str
    force: bool
    dry_run: bool


class DrainHost(Record, frozen=True, tag="drain_host"):
    """-> DrainedHost. By its peer_id, or its host's name where that is unique. NotFound; Conflict if it is alone."""

    name: str
    undo: bool = False
    by: str = ""


class TransferLeadership(Record, frozen=True, tag="transfer_leadership"):
    """-> Led, once another epoch than this one leads: may be asked again. Conflict if nobody else could lead."""

    epoch: int


class CreateKey(Record, frozen=True, tag="create_key"):
    """-> ApiKey. The caller made the secret; only its hash is here."""

    key: ApiKey


class RevokeKey(Record, frozen=True, tag="revoke_key"):
    """-> ApiKey. `key_id` or an owner's name where that is unique."""

    key_id: str


HostCommand = CreateJoinToken | Enrol | Renew | RevokeHost  # peer.state.enrol
Command = (
    SubmitTask
    | CancelTask
    | AssignModel
    | UnloadModel
    | RestartWorker
    | Rebalance
    | DrainHost
    | CreateKey
    | RevokeKey
    | HostCommand
)

# ---------------------------------------------------------------- queries


class GetTask(Record, frozen=True, tag="get_task"):
    """-> TaskView. With `wait_s` the answer comes when the task is finished, or beyond this stage, or then."""

    task_id: str
    wait_s: float = 0.0
    past: int | None = None  # peer.state.task.stage


class ListTasks(Record, frozen=True, tag="list_tasks"):
    """-> TaskPage, newest first"""

    status: str | None = None  # as shown: queued, running, completed, failed, cancelled
    worker_id: str | None = None
    limit: int = 50
    offset: int = 0


class ListWorkers(Record, frozen=True, tag="list_workers"):
    """-> tuple[WorkerView, ...]"""


class GetWorker(Record, frozen=True, tag="get_worker"):
    """-> WorkerView"""

    worker_id: str


class ListAssignments(Record, frozen=True, tag="list_assignments"):
    """-> tuple[AssignmentView, ...], one per worker"""


class ListModels(Record, frozen=True, tag="list_models"):
    """-> tuple[ModelView, ...]"""


class GetStatus(Record, frozen=True, tag="get_status"):
    """-> ClusterStatus"""


class GetMetrics(Record, frozen=True, tag="get_metrics"):
    """-> Metrics"""

    timeframe: str  # 1h, 24h, 7d, 30d


class ListKeys(Record, frozen=True, tag="list_keys"):
    """-> tuple[ApiKey, ...]"""


class GetPlan(Record, frozen=True, tag="get_plan"):
    """-> Plan"""

    rebalance_id: str


Query = (
    GetTask
    | ListTasks
    | ListWorkers
    | GetWorker
    | ListAssignments
    | ListModels
    | GetStatus
    | GetMetrics
    | ListKeys
    | GetPlan
    | GetAuthority
    | ListHosts
)
Request = Command | Query | Counted | TransferLeadership

# ---------------------------------------------------------------- answers


class PendingReason(Record, frozen=True):
    """Why a task is not on this worker. `worker_id` "" speaks of the cluster as a whole."""

    worker_id: str
    reason: str


class TaskView(Record, frozen=True):
    task: Task
    result: TaskResult | None = None
    pending: tuple[PendingReason, ...] = ()
    estimated_wait_s: float | None = None  # None: nothing measured to estimate from
    tokens_so_far: int | None = 0  # of the attempt that runs; None: only the peer that runs it knows
    peer_id: str = ""  # where the attempt of an unfinished task is; "" while it is queued


class Submitted(Record, frozen=True):
    view: TaskView
    replayed: bool = False  # True: an earlier task of this idempotency key


class TaskPage(Record, frozen=True):
    tasks: tuple[Task, ...]
    total: int


class WorkerView(Record, frozen=True):
    """`status` is online, offline, busy or error; `report` is the last one, None if there was none."""

    worker: Worker
    status: str
    report: WorkerReport | None
    replicas: tuple[Replica, ...]
    current_tasks: int
    last_heartbeat: float | None
    metrics: WorkerMetrics
    performance_score: float


class PlacedModel(Record, frozen=True):
    worker_id: str
    status: str  # loading, queued, loaded, assigned
    estimated_s: float
    reason: str = ""


class Led(Record, frozen=True):
    """Who leads now."""

    peer_id: str
    epoch: int


class DrainedHost(Record, frozen=True):
    """Whether it is to be emptied from now on."""

    peer_id: str
    draining: bool


class AssignReply(Record, frozen=True):
    assignment_id: str
    model_name: str
    placed: tuple[PlacedModel, ...]


class UnloadReply(Record, frozen=True):
    model_name: str
    affected_workers: tuple[str, ...]
    requeued_tasks: tuple[str, ...] = ()


class RestartReply(Record, frozen=True):
    worker_id: str
    estimated_s: float  # measured at this worker's earlier starts
    requeued_tasks: tuple[str, ...] = ()


class AssignmentView(Record, frozen=True):
    worker_id: str
    replicas: tuple[Replica, ...]
    wishes: tuple[Assignment, ...]


class ModelView(Record, frozen=True):
    model: Model
    replicas: tuple[Replica, ...]
    queued: int


class ClusterStatus(Record, frozen=True):
    """`status` is operational, degraded (some worker is not well, or the store is short of room) or down (no worker is
    up)."""

    cluster_id: str
    status: str
    total_workers: int
    active_workers: int
    queued_tasks: int
    running_tasks: int
    gpu_utilization: float
    total_memory_bytes: int
    available_memory_bytes: int
    uptime_s: float
    epoch: int
    leader: str
    reasons: tuple[str, ...] = ()
    voters: tuple[VoterView, ...] = ()
    outlook: str = ""  # what the loss of a host would mean right now
    room: Room = Room()  # in the store


# ---------------------------------------------------------------- streams


class StreamToken(Record, frozen=True, tag="token"):
    """Text of one attempt. `index` counts that attempt's tokens before this piece."""

    attempt: int
    index: int
    text: str
    count: int
    logprobs: tuple[Logprobs, ...] = ()  # of the first of these tokens, as a TaskResult's


class StreamRestart(Record, frozen=True, tag="restart"):
    """What came before is void: the attempt ended without a result and the task begins anew."""

    attempt: int
    reason: str


class StreamEnd(Record, frozen=True, tag="end"):
    """The task is finished; no more follows."""

    view: TaskView


StreamItem = StreamToken | StreamRestart | StreamEnd
