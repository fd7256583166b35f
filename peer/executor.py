"""The executor: runs this host's workers as the leader orders, and reports what becomes of it.

Orders come in by `order`, reports go out to a sink in the order in which they arose. An outcome is kept and
reported again until the leader says that it is recorded. Orders of an older epoch than one seen are refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog
import trio

from peer import limits
from peer.decide.alert import Thresholds
from peer.engines import Device, EngineHandle, ModelFiles, TelemetrySource
from peer.errors import Fenced
from peer.hosted import HostedWorker
from peer.ports import Clock, ReportSink
from peer.state.member import Load
from peer.state.model import Model
from peer.state.order import (
    AttemptFailed,
    ForgetAttempt,
    LoadReplica,
    Order,
    Report,
    RestartEngine,
    RunAttempt,
    StopAttempt,
    UnloadReplica,
    WorkerReported,
)
from peer.state.worker import EngineState, HostInfo
from peer.streams import StreamHub

COALESCE_S: Final = 0.05  # changes of a worker within this time are one report
LAST_REPORTS_S_MAX: Final = 1.0  # at the end, for the leader to take what is left
COUNT_TOKENS_S_MAX: Final = 5.0

log = structlog.get_logger("executor")


class Executor:
    """`engine` and `telemetry` make what serves one device; without telemetry the heartbeats must do.

    `epoch` and `remember_epoch` let the newest epoch survive a restart; it is called before obeying, and
    raises Unavailable if it cannot.
    """

    def __init__(
        self,
        peer_id: str,
        devices: Sequence[Device],
        *,
        engine: Callable[[str, Device], EngineHandle],
        telemetry: Callable[[Device], TelemetrySource | None],
        host_info: Callable[[], HostInfo],
        files: ModelFiles,
        sink: ReportSink,
        streams: StreamHub,
        clock: Clock,
        thresholds: Thresholds,
        slots_max: int = 8,
        epoch: int = 0,
        remember_epoch: Callable[[int], None] | None = None,
        report_interval_s: float = limits.REPORT_INTERVAL_S,
        cancel_s_max: float = limits.CANCEL_S_MAX,
    ) -> None:
        self.peer_id = peer_id
        self.clock = clock
        self.streams = streams
        self.thresholds = thresholds
        self._sink = sink
        self._files = files
        self._host_info = host_info
        self._epoch = epoch
        self._remember_epoch = remember_epoch
        self._interval_s = report_interval_s
        self._workers: dict[str, HostedWorker] = {}
        for device in devices:
            worker_id = f"{peer_id}-{device.label}"
            self._workers[worker_id] = HostedWorker(
                self,
                peer_id,
                device,
                engine(worker_id, device),
                files,
                telemetry(device),
                slots_max=slots_max,
                cancel_s_max=cancel_s_max,
            )
        self._reports: deque[Report | HostedWorker] = deque()
        self._reports_wake = trio.Event()
        self._reports_sent = trio.Event()
        self._reporting: set[str] = set()  # workers whose state is already in line
        self._touched: set[str] = set()
        self._touched_wake = trio.Event()
        self._stop = trio.Event()
        self.came_round_at: float | None = None
        """When it last reported of its own accord, for a watchdog."""

    @property
    def epoch(self) -> int:
        """The newest epoch seen."""
        return self._epoch

    @property
    def worker_ids(self) -> tuple[str, ...]:
        return tuple(self._workers)

    @property
    def reports_waiting(self) -> int:
        """Not yet taken by a leader."""
        return len(self._reports)

    def held(self) -> tuple[str, ...]:
        """Keys `<task_id>/<attempt>` of all that this peer answers for: running, or with an unrecorded outcome."""
        return tuple(key for worker in self._workers.values() for key in worker.held())

    def load(self) -> Load:
        """Of this host, for those who want to know roughly."""
        workers = self._workers.values()
        up = [worker for worker in workers if worker.state is EngineState.READY]
        return Load(
            workers=len(workers),
            up=len(up),
            slots=sum(worker.slots_max for worker in up),
            running=sum(worker.running for worker in workers),
        )

    # ------------------------------------------------------------ service

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`. Leaves no engine behind, also when cancelled."""
        async with trio.open_nursery() as reporting:
            reporting.start_soon(self._send_reports)
            reporting.start_soon(self._report_periodically)
            reporting.start_soon(self._report_changes)
            async with trio.open_nursery() as workers:
                for worker in self._workers.values():
                    await workers.start(worker.run)
                    self.touch(worker)
                task_status.started()
                await self._stop.wait()
                for worker in self._workers.values():
                    worker.accepting = False
                    worker.engine.stop()
            with trio.move_on_after(LAST_REPORTS_S_MAX):
                while self._reports:
                    self._reports_sent = trio.Event()
                    await self._reports_sent.wait()
            reporting.cancel_scope.cancel()

    def stop(self) -> None:
        """End the engines; what they hold fails, to be tried again. `run` returns."""
        self._stop.set()

    async def drain(self, limit_s: float = limits.DRAIN_S_MAX) -> bool:
        """Take no more runs and wait for those that are there. False if some are left at the limit."""
        for worker in self._workers.values():
            worker.accepting = False
        with trio.move_on_after(limit_s):
            for worker in self._workers.values():
                await worker.idle()
            return True
        return False

    # ------------------------------------------------------------ orders

    def accept(self, epoch: int) -> None:
        """Obey this leader, and no older one any more, also after a restart. Raises Fenced if a newer one has been
        accepted, Unavailable if this host's disk does not keep it: then nothing may be obeyed."""
        if epoch < self._epoch:
            raise Fenced(f"{self.peer_id} has seen epoch {self._epoch}: an order of epoch {epoch} is refused")
        if epoch > self._epoch:
            if self._remember_epoch is not None:
                self._remember_epoch(epoch)
            self._epoch = epoch

    async def order(self, order: Order) -> None:
        """Carry out or begin what the leader wants. Raises what `accept` does."""
        self.accept(order.epoch)
        worker = self._workers.get(order.worker_id)
        if worker is None:
            self._no_such_worker(order)
            return
        match order:
            case RunAttempt():
                worker.start_attempt(order)
            case StopAttempt():
                worker.stop_attempt(f"{order.task_id}/{order.attempt}")
            case ForgetAttempt():
                worker.forget_attempt(f"{order.task_id}/{order.attempt}")
            case LoadReplica():
                worker.load(order.model)
            case UnloadReplica():
                worker.unload(order.model_name)
            case RestartEngine():
                worker.engine.restart()

    def _no_such_worker(self, order: Order) -> None:
        log.warning("order_for_unknown_worker", worker_id=order.worker_id, order=type(order).__name__)
        if isinstance(order, RunAttempt):
            self.report(
                AttemptFailed(
                    worker_id=order.worker_id,
                    task_id=order.task_id,
                    attempt=order.attempt,
                    at=self.clock.wall(),
                    code="worker_unavailable",
                    message=f"{self.peer_id} has no worker {order.worker_id}",
                    retryable=True,
                )
            )

    async def count_tokens(self, model: Model, parameters: Mapping[str, Any]) -> tuple[int, int] | None:
        """(tokens of the prompt with its template, context), or None if no engine here can tell in time."""
        path = self._files.local(model)
        if path is None:
            return None
        ready = [worker for worker in self._workers.values() if worker.state is EngineState.READY]
        ready.sort(key=lambda worker: not worker.replicas.serves(model.name))
        with trio.move_on_after(COUNT_TOKENS_S_MAX):
            for worker in ready:
                count = await worker.count_tokens(model, path, dict(parameters))
                if count is not None and count.tokens >= 0:
                    return count.tokens, min(model.context, count.context or model.context)
        return None

    # ------------------------------------------------------------ reports

    def report(self, report: Report) -> None:
        """Put it in line for the leader."""
        self._reports.append(report)
        self._reports_wake.set()

    def touch(self, worker: HostedWorker) -> None:
        """Its state has changed: report it soon."""
        self._touched.add(worker.worker_id)
        self._touched_wake.set()

    def report_all(self) -> None:
        """A new leader listens: it hears of every worker and every outcome that is not recorded."""
        for worker in self._workers.values():
            worker.report_outcomes_again(0.0)
            self.report_state(worker)

    def report_state(self, worker: HostedWorker) -> None:
        """Put its state in line, once: it is made when its turn comes, so that a slow leader gets the newest."""
        if worker.worker_id not in self._reporting:
            self._reporting.add(worker.worker_id)
            self._reports.append(worker)
            self._reports_wake.set()

    async def _send_reports(self) -> None:
        while True:
            await self._reports_wake.wait()
            self._reports_wake = trio.Event()
            while self._reports:
                item = self._reports[0]
                if isinstance(item, HostedWorker):
                    self._reporting.discard(item.worker_id)
                    report: Report = WorkerReported(
                        report=item.snapshot(self._host_info(), self.clock.wall())
                    )
                else:
                    report = item
                await self._sink.report(report)
                self._reports.popleft()
            self._reports_sent.set()

    async def _report_changes(self) -> None:
        while True:
            await self._touched_wake.wait()
            self._touched_wake = trio.Event()
            touched, self._touched = self._touched, set()
            for worker_id in sorted(touched):
                self.report_state(self._workers[worker_id])
            await trio.sleep(COALESCE_S)

    async def _report_periodically(self) -> None:
        while True:
            await trio.sleep(self._interval_s)
            self.came_round_at = trio.current_time()
            behind = bool(self._reports)  # a leader that is behind need not hear outcomes again
            for worker in self._workers.values():
                if not behind:
                    worker.report_outcomes_again()
                self.report_state(worker)
