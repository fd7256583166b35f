"""A cluster in memory, as the API sees one (`peer.ports.Cluster`); tests make things happen in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
import trio

from peer.decide.quota import Quota
from peer.errors import BitinglipError, Compacted, Conflict, NotFound, Overloaded
from peer.state import command, enrol
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.member import KeyRotation, Member
from peer.state.metric import Gauge, Metrics
from peer.state.model import Assignment, Model
from peer.state.plan import Move, Plan
from peer.state.quota import Client, KeepTicket, RedeemTicket, Spend, Verdict
from peer.state.task import Status, Task, TaskError, TaskResult
from peer.state.voter import VoterView
from tests.api.fake_parts import GIB, WALL, FakeClock, api_key, host, worker_view


class FakeCluster:
    """Every task stays queued until a test finishes it."""

    def __init__(self, clock: FakeClock | None = None) -> None:
        self.clock = clock or FakeClock()
        self.keys: dict[str, ApiKey] = {
            item.key_id: item
            for item in (
                api_key("admin", "admin"),
                api_key("read", "read"),
                api_key("submit", "submit"),
                api_key("operate", "operate"),
                api_key("limited", "read", "submit", limited=True),
            )
        }
        self.catalogue = {
            name: Model(name=name, source="package:x", family="llama", context=2048, size_bytes=GIB)
            for name in ("llama-2-7b", "smollm2-135m")
        }
        self.views: dict[str, command.TaskView] = {}
        self.idempotent: dict[tuple[str, str], tuple[str, str]] = {}
        self.workers = {
            "worker-001": worker_view("worker-001"),
            "worker-002": worker_view("worker-002", "busy", temperature=None),
            "worker-003": worker_view("worker-003", "offline", reported=False),
        }
        self.plans: dict[str, Plan] = {}
        self.registry = enrol.Registry()
        for number, voter in ((1, True), (2, False)):
            self.registry.save(host(f"gpu-{number}-00000{number}", voter=voter))
        self.changed = trio.Event()
        self.journal: list[Event] = []
        self.kept_from = 1
        self.behind_max = 1_000
        self.not_ready = ""
        self.failure: BaseException | None = None
        self.requests: list[command.Request] = []
        self.cancelled = 0
        self.gossiped: tuple[Member, ...] = ()
        self.rotations: list[bool] = []  # of gossip's key: whether forced
        self.tokens: dict[str, list[command.StreamItem]] = {}
        self.counted: tuple[int, int] | None = None
        self.record = True
        self.quota = Quota()
        self.stale_s: float | None = None  # how old what `read` answers is
        self.instant = False  # tasks are finished as soon as they are submitted

    # ------------------------------------------------------------ what tests do

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def emit(self, event: str, **data: Any) -> None:
        self.journal.append(
            Event(id=len(self.journal) + 1, event=event, timestamp=self.clock.wall(), data=data)
        )
        self.notify()

    def change(self, task_id: str, **changes: Any) -> None:
        view = self.views[task_id]
        self.views[task_id] = msgspec.structs.replace(
            view, task=msgspec.structs.replace(view.task, **changes)
        )
        self.notify()

    def finish(self, task_id: str, text: str = "Quantum computing is") -> None:
        """As in the document: started 15 s after, 3.2 s long."""
        created = self.views[task_id].task.created_at
        self.change(
            task_id,
            status=Status.COMPLETED,
            worker_id="worker-001",
            attempt=1,
            started_at=created + 15,
            completed_at=created + 18.2,
        )
        result = TaskResult(
            task_id=task_id,
            attempt=1,
            worker_id="worker-001",
            generated_text=text,
            tokens_generated=324,
            prompt_tokens=7,
            cached_tokens=5,
            finish_reason="stop",
            processing_s=2.81,
            first_token_s=0.1,
        )
        self.views[task_id] = msgspec.structs.replace(
            self.views[task_id], result=result, pending=(), estimated_wait_s=None
        )
        self.notify()

    def fail(self, task_id: str) -> None:
        self.change(
            task_id,
            status=Status.FAILED,
            completed_at=self.clock.wall(),
            error=TaskError(code="timeout", message="It took longer than 300 s"),
        )

    def push(self, task_id: str, *items: command.StreamItem) -> None:
        self.tokens.setdefault(task_id, []).extend(items)
        self.notify()

    # ------------------------------------------------------------ the port

    def key(self, key_id: str) -> ApiKey | None:
        return self.keys.get(key_id)

    def models(self) -> Mapping[str, Model]:
        return self.catalogue

    def ready(self) -> str:
        return self.not_ready

    async def count_tokens(self, model_name: str, parameters: Mapping[str, Any]) -> tuple[int, int] | None:
        await trio.lowlevel.checkpoint()
        return self.counted

    async def call(self, request: command.Request) -> Any:
        if self.record:
            self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        try:
            await trio.lowlevel.checkpoint()
            return await getattr(self, "_" + type(request).__name__)(request)
        except trio.Cancelled:
            self.cancelled += 1
            raise

    async def read(self, query: command.Query) -> tuple[Any, float | None]:
        return await self.call(query), self.stale_s

    def gossip(self) -> tuple[Member, ...]:
        return self.gossiped

    async def rotate_gossip_key(self, *, force: bool) -> KeyRotation:
        if self.failure is not None:
            raise self.failure
        self.rotations.append(force)
        return KeyRotation(members=2, removed=1)

    async def _TransferLeadership(self, request: command.TransferLeadership) -> command.Led:
        return command.Led(peer_id="peer-2", epoch=request.epoch + 1)

    async def spend(self, ask: Spend) -> Verdict | None:
        return self.quota.windows.check(ask.key_id, self.clock.now(), ask.per_hour, ask.per_minute)

    async def _KeepTicket(self, request: KeepTicket) -> Any:
        return self.quota.answer(request, self.clock.now())

    async def _RedeemTicket(self, request: RedeemTicket) -> Any:
        return self.quota.answer(request, self.clock.now())

    async def _CreateJoinToken(self, request: enrol.CreateJoinToken) -> enrol.NewJoinToken:
        made = enrol.JoinToken(
            token_id=request.token_id,
            secret_sha256=request.secret_sha256,
            created_at=self.clock.wall(),
            expires_at=self.clock.wall() + request.ttl_s,
            created_by=request.created_by,
            voter=request.voter,
        )
        return enrol.NewJoinToken(token=made, ca_sha256="c" * 64)

    async def _ListHosts(self, request: enrol.ListHosts) -> tuple[enrol.HostView, ...]:
        known = [
            enrol.HostView(peer_id=each.peer_id, status="online", host=each)
            for each in self.registry.hosts.values()
        ]
        revoked = [
            enrol.HostView(peer_id=each.peer_id, status="revoked", revocation=each)
            for each in self.registry.revocations.values()
        ]
        return (*known, *revoked)

    async def _DrainHost(self, request: command.DrainHost) -> command.DrainedHost:
        if request.name not in self.registry.hosts:
            raise NotFound(f"there is no host `{request.name}`", code="host_not_found")
        if len(self.registry.hosts) == 1 and not request.undo:
            raise Conflict("there is no other host", code="no_other_host")
        return command.DrainedHost(peer_id=request.name, draining=not request.undo)

    async def _RevokeHost(self, request: enrol.RevokeHost) -> enrol.Revocation:
        if request.name not in self.registry.hosts:
            raise NotFound(f"there is no host `{request.name}`", code="host_not_found")
        if request.name == "gpu-1-000001":
            raise Conflict(f"{request.name} leads now", code="host_leads")
        self.registry.drop(self.registry.hosts[request.name])
        revocation = enrol.Revocation(
            peer_id=request.name,
            serials=("5eed",),
            revoked_at=self.clock.wall(),
            revoked_by=request.revoked_by,
            until=self.clock.wall() + 1_000,
        )
        self.registry.save(revocation)
        return revocation

    def _view(self, task_id: str) -> command.TaskView:
        try:
            return self.views[task_id]
        except KeyError:
            raise NotFound(f"There is no task {task_id!r}", details={"task_id": task_id}) from None

    def _worker(self, worker_id: str) -> command.WorkerView:
        try:
            return self.workers[worker_id]
        except KeyError:
            raise NotFound(f"There is no worker {worker_id!r}") from None

    async def _SubmitTask(self, request: command.SubmitTask) -> command.Submitted:
        if request.idempotency_key:
            slot = (request.owner, request.idempotency_key)
            known = self.idempotent.get(slot)
            if known is not None:
                if known[1] != request.body_digest:
                    raise Conflict("The Idempotency-Key was used with another body")
                return command.Submitted(view=self.views[known[0]], replayed=True)
        task_id = f"task-{len(self.views) + 1}"
        wall = self.clock.wall()
        task = Task(
            task_id=task_id,
            task_type=request.task_type,
            model_name=request.model_name,
            priority=request.priority,
            timeout_s=request.timeout_s,
            created_at=wall,
            deadline=wall + request.timeout_s,
            owner=request.owner,
            request_id=request.request_id,
        )
        view = command.TaskView(
            task=task,
            pending=(command.PendingReason(worker_id="worker-001", reason="all 8 slots are taken"),),
            estimated_wait_s=15.0,
        )
        if self.record:
            self.views[task_id] = view
        if request.idempotency_key:
            self.idempotent[slot] = (task_id, request.body_digest)
        if self.instant:
            self.finish(task_id)
            end = command.StreamEnd(view=self.views[task_id])
            self.push(task_id, end)
        return command.Submitted(view=self.views.get(task_id, view))

    async def _CancelTask(self, request: command.CancelTask) -> command.TaskView:
        view = self._view(request.task_id)
        if view.task.status in (Status.COMPLETED, Status.FAILED, Status.CANCELLED):
            raise Conflict(f"The task is already {view.task.status.value}")
        self.change(request.task_id, status=Status.CANCELLED, completed_at=self.clock.wall())
        return self.views[request.task_id]

    async def _GetTask(self, request: command.GetTask) -> command.TaskView:
        view = self._view(request.task_id)
        with trio.move_on_after(request.wait_s):
            while request.wait_s and view.task.completed_at is None:
                await self.changed.wait()
                view = self._view(request.task_id)
        return view

    async def _ListTasks(self, request: command.ListTasks) -> command.TaskPage:
        found = [
            view.task
            for view in reversed(self.views.values())
            if request.status in (None, view.task.status.value)
            and request.worker_id in (None, view.task.worker_id)
        ]
        page = found[request.offset : request.offset + request.limit]
        return command.TaskPage(tasks=tuple(page), total=len(found))

    async def _ListWorkers(self, request: command.ListWorkers) -> tuple[command.WorkerView, ...]:
        return tuple(self.workers.values())

    async def _GetWorker(self, request: command.GetWorker) -> command.WorkerView:
        return self._worker(request.worker_id)

    async def _RestartWorker(self, request: command.RestartWorker) -> command.RestartReply:
        self._worker(request.worker_id)
        return command.RestartReply(worker_id=request.worker_id, estimated_s=30.0)

    async def _AssignModel(self, request: command.AssignModel) -> command.AssignReply:
        if request.model_name == "llama-2-7b" and not request.worker_ids:
            raise Conflict("llama-2-7b needs 14GB, the largest gap is 8GB", code="does_not_fit")
        placed = [
            command.PlacedModel(
                worker_id=self._worker(worker_id).worker.worker_id,
                status="queued" if index else "loading",
                estimated_s=45.0 * (index + 1),
            )
            for index, worker_id in enumerate(request.worker_ids)
        ]
        return command.AssignReply(
            assignment_id="assign-789", model_name=request.model_name, placed=tuple(placed)
        )

    async def _UnloadModel(self, request: command.UnloadModel) -> command.UnloadReply:
        if request.model_name not in self.catalogue:
            raise NotFound(f"No worker has a model {request.model_name!r}")
        for worker_id in request.worker_ids:
            self._worker(worker_id)
        return command.UnloadReply(
            model_name=request.model_name, affected_workers=request.worker_ids or ("worker-001",)
        )

    async def _ListAssignments(self, request: command.ListAssignments) -> tuple[command.AssignmentView, ...]:
        wish = Assignment(
            assignment_id="assign-1",
            model_name="later",
            worker_id="worker-001",
            preload=False,
            priority=5,
            created_at=WALL,
        )
        return (
            command.AssignmentView(
                worker_id="worker-001", replicas=self.workers["worker-001"].replicas, wishes=(wish,)
            ),
        )

    async def _ListModels(self, request: command.ListModels) -> tuple[command.ModelView, ...]:
        on = self.workers["worker-001"].replicas
        return tuple(
            command.ModelView(
                model=model, replicas=tuple(r for r in on if r.model_name == model.name), queued=0
            )
            for model in self.catalogue.values()
        )

    async def _GetStatus(self, request: command.GetStatus) -> command.ClusterStatus:
        return command.ClusterStatus(
            cluster_id="biting-lip-cluster",
            status="operational",
            total_workers=5,
            active_workers=4,
            queued_tasks=12,
            running_tasks=8,
            gpu_utilization=65.49,
            total_memory_bytes=40 * GIB,
            available_memory_bytes=14 * GIB,
            uptime_s=7 * 86_400 + 4 * 3_600 + 23 * 60 + 59,
            epoch=3,
            leader="peer-1",
            voters=(VoterView(peer_id="peer-1", learner=False, linked=True),),
            outlook="1 voter",
        )

    async def _GetMetrics(self, request: command.GetMetrics) -> Metrics:
        return Metrics(
            timeframe=request.timeframe,
            total_tasks=2450,
            successful_tasks=2398,
            failed_tasks=52,
            success_rate_percent=97.877,
            average_response_s=2.13,
            peak_tasks_per_minute=150,
            utilization=Gauge(samples=2, sum=137.0, minimum=12.1, maximum=95.2),
            memory=Gauge(samples=2, sum=150.0, minimum=60.0, maximum=92.0),
            useful_memory=Gauge(samples=2, sum=170.6, minimum=80.0, maximum=90.6),
        )

    async def _Rebalance(self, request: command.Rebalance) -> Plan:
        move = Move(
            type="model_migration",
            model="stable-diffusion-xl",
            from_worker="worker-001",
            to_worker="worker-003",
            predicted_s=95.0,
        )
        plan = Plan(
            rebalance_id="rebal-456",
            strategy=request.strategy,
            dry_run=request.dry_run,
            force=request.force,
            status="planned" if request.dry_run else "initiated",
            created_at=WALL,
            moves=(move,),
        )
        self.plans[plan.rebalance_id] = plan
        return plan

    async def _GetPlan(self, request: command.GetPlan) -> Plan:
        try:
            return self.plans[request.rebalance_id]
        except KeyError:
            raise NotFound("There is no such rebalance") from None

    async def _CreateKey(self, request: command.CreateKey) -> ApiKey:
        self.keys[request.key.key_id] = request.key
        return request.key

    async def _RevokeKey(self, request: command.RevokeKey) -> ApiKey:
        try:
            found = self.keys[request.key_id]
        except KeyError:
            raise NotFound("There is no such key") from None
        revoked = msgspec.structs.replace(found, revoked_at=self.clock.wall())
        self.keys[request.key_id] = revoked
        return revoked

    async def _ListKeys(self, request: command.ListKeys) -> tuple[ApiKey, ...]:
        return tuple(self.keys.values())

    def stream(self, task_id: str) -> AbstractAsyncContextManager[AsyncIterator[command.StreamItem]]:
        @asynccontextmanager
        async def open_stream() -> AsyncIterator[AsyncIterator[command.StreamItem]]:
            self._view(task_id)
            yield self._items(task_id)

        return open_stream()

    async def _items(self, task_id: str) -> AsyncIterator[command.StreamItem]:
        sent = 0
        while True:
            items = self.tokens.get(task_id, [])
            while sent < len(items):
                item = items[sent]
                sent += 1
                yield item
                if isinstance(item, command.StreamEnd):
                    return
            if self.failure is not None:
                raise self.failure
            await self.changed.wait()

    def events(
        self, since: int | None, client: Client | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        @asynccontextmanager
        async def open_events() -> AsyncIterator[AsyncIterator[Event]]:
            if since is not None and since + 1 < self.kept_from:
                raise Compacted("Those events are no longer kept")
            with self.quota.socket(client):
                yield self._events(len(self.journal) if since is None else since)

        return open_events()

    async def _events(self, position: int) -> AsyncIterator[Event]:
        while True:
            if len(self.journal) - position > self.behind_max:
                raise Overloaded("Too far behind")
            while position < len(self.journal):
                position += 1
                yield self.journal[position - 1]
                if len(self.journal) - position > self.behind_max:
                    raise Overloaded("Too far behind")
            if isinstance(self.failure, BitinglipError):
                raise self.failure
            await self.changed.wait()
