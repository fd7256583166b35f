"""A worker as its own peer sees it: one engine, the runs and replicas it holds, and what there is to report.

Everything here happens in one thread; the engine's messages come in batches. Nothing waits except loads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import structlog
import trio

from engine.protocol import (
    OUTPUT_BYTES_MAX,
    Cancel,
    CountTokens,
    Finished,
    Heartbeat,
    Output,
    Ready,
    Run,
    RunFailed,
    Started,
    TokenCount,
    Tokens,
)
from peer import limits
from peer.attempt import Attempt, arrays_of
from peer.decide.alert import AlertState, Thresholds, judge, judge_engine
from peer.engines import Device, EngineHandle, ModelFiles, TelemetrySource
from peer.ports import Clock
from peer.replicas import Replicas
from peer.state.model import Model
from peer.state.order import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    EngineStarted,
    Report,
    RunAttempt,
)
from peer.state.worker import DeviceInfo, EngineState, HostInfo, Telemetry, WorkerReport
from peer.streams import StreamHub

HELD_MAX: Final = 2 * limits.ENGINE_OUTBOX_MAX  # runs and outcomes that nobody has recorded yet
OUTCOME_AGAIN_S: Final = 3.0  # an outcome that is not forgotten by then is reported again

log = structlog.get_logger("executor")


Outcome = AttemptFinished | AttemptFailed


class Host(Protocol):
    """What a worker needs of the executor."""

    clock: Clock
    streams: StreamHub
    thresholds: Thresholds

    def report(self, report: Report) -> None: ...
    def report_state(self, worker: HostedWorker) -> None:
        """Its state has changed: report it before what is reported after."""

    def touch(self, worker: HostedWorker) -> None:
        """Its state has changed: report it soon."""


class HostedWorker:
    """Implements peer.engines.EngineEvents."""

    def __init__(
        self,
        host: Host,
        peer_id: str,
        device: Device,
        engine: EngineHandle,
        files: ModelFiles,
        telemetry: TelemetrySource | None,
        *,
        slots_max: int,
        cancel_s_max: float,
    ) -> None:
        self.worker_id = f"{peer_id}-{device.label}"
        self.peer_id = peer_id
        self.device = device
        self.engine = engine
        self.state = EngineState.ERROR if device.problem else EngineState.STARTING
        self.message = device.problem
        self.accepting = True
        self._host = host
        self._telemetry_source = telemetry
        self.slots_max = slots_max
        self._cancel_s_max = cancel_s_max
        self._info = DeviceInfo(
            device=device.device,
            name=device.name,
            architecture=device.architecture,
            driver_version=device.driver_version,
            stand_in=device.stand_in,
        )
        self._telemetry = Telemetry(memory_total_bytes=device.memory_total_bytes, memory_used_bytes=0)
        self._alerts = AlertState()
        self._pid = 0
        self._deaths = 0
        self._attempts: dict[str, Attempt] = {}
        self._outcomes: dict[str, tuple[Outcome, float]] = {}  # and when it was last reported
        self._stops: deque[tuple[float, str, Attempt]] = deque()
        self._stops_wake = trio.Event()
        self._idle = trio.Event()
        self._counts: dict[str, Callable[[TokenCount], None]] = {}
        self._counts_made = 0
        self.replicas = Replicas(self, host, files)
        self._handlers: dict[Any, Callable[[Any], None]] = {
            Tokens: self._on_tokens,
            Output: self._on_output,
            Finished: self._on_finished,
            Started: self._on_started,
            RunFailed: self._on_run_failed,
            Heartbeat: self._on_heartbeat,
            TokenCount: self._on_token_count,
            **self.replicas.handlers,
        }

    @property
    def device_name(self) -> str:
        return self._info.name

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until its engine is stopped."""
        async with trio.open_nursery() as nursery:
            self.replicas.nursery = nursery
            nursery.start_soon(self._enforce_stops)
            if self._telemetry_source is not None:
                nursery.start_soon(self._measure, self._telemetry_source)
            task_status.started()
            await self.engine.run(self)
            nursery.cancel_scope.cancel()

    # ------------------------------------------------------------ engine events

    def messages(self, batch: list[Any]) -> None:
        handlers = self._handlers
        for message in batch:
            handler = handlers.get(type(message))
            if handler is not None:
                handler(message)

    def ready(self, ready: Ready, pid: int, downtime_s: float) -> None:
        self._pid = pid
        self._info = DeviceInfo(
            device=self.device.device,
            name=ready.device_name or self.device.name,
            architecture=ready.architecture or self.device.architecture,
            driver_version=self.device.driver_version,
            stand_in=ready.stand_in,
        )
        if self._telemetry_source is None:
            self._telemetry = Telemetry(
                memory_total_bytes=ready.memory_total_bytes, memory_used_bytes=0, source=self._source_name()
            )
        self._enter(EngineState.READY, "")
        self._host.report(EngineStarted(worker_id=self.worker_id, downtime_s=downtime_s))
        self.replicas.engine_ready()

    def changed(self, state: EngineState, message: str, deaths: int) -> None:
        died, self._deaths = deaths > self._deaths, deaths
        self._enter(state, message, died=died)

    def gone(self, code: str, reason: str) -> None:
        self._pid = 0
        self._counts.clear()
        # First: a leader that heard of the failures alone would give the same tasks to this worker at once.
        self._host.report_state(self)
        attempts, self._attempts = self._attempts, {}
        for key, attempt in attempts.items():
            self._host.streams.close(attempt.task_id, attempt.attempt)
            if not attempt.stopping:
                text = f"the engine of {self.worker_id} ended: {reason}"
                self._fail(key, attempt.task_id, attempt.attempt, code, text, retryable=True)
        self.replicas.engine_gone(code, reason)
        self._check_idle()

    def _enter(self, state: EngineState, message: str, *, died: bool = False) -> None:
        self.state, self.message = state, message
        raised, self._alerts = judge_engine(
            self.worker_id,
            state,
            message,
            died=died,
            deaths=self._deaths,
            deaths_max=limits.DEATHS_MAX,
            state=self._alerts,
        )
        for alert in raised:
            self._host.report(alert)
        if state is EngineState.ERROR:
            self.replicas.engine_failed(message)
        self._host.touch(self)

    # ------------------------------------------------------------ runs

    def start_attempt(self, order: RunAttempt) -> None:
        """Give it to the engine, once. What cannot be given fails at once, to be tried elsewhere."""
        key = f"{order.task_id}/{order.attempt}"
        if key in self._attempts:
            return
        if key in self._outcomes:
            self._report_outcome(key)
            return
        code, text = self._refusal(order.model_name)
        if not code:
            run = Run(
                run_id=key,
                model=order.model_name,
                task_type=order.task_type,
                parameters=order.parameters,
                request_id=order.request_id,
            )
            if self.engine.send(run):
                self._attempts[key] = Attempt(order)
                self.replicas.used(order.model_name)
                return
            code, text = "worker_unavailable", f"{self.worker_id} does not take more work at the moment"
        self._fail(key, order.task_id, order.attempt, code, text, retryable=True)

    def _refusal(self, model_name: str) -> tuple[str, str]:
        """Why no run can be taken, or ("", "")."""
        if not self.accepting:
            return "worker_unavailable", f"{self.worker_id} is stopping"
        if self.state is not EngineState.READY:
            why = f": {self.message}" if self.message else ""
            return "worker_unavailable", f"{self.worker_id} is {self.state.value}{why}"
        if len(self._attempts) + len(self._outcomes) >= HELD_MAX:
            return "worker_unavailable", f"{self.worker_id} already answers for {HELD_MAX} attempts"
        if not self.replicas.serves(model_name):
            return "model_not_loaded", f"{model_name} is not loaded on {self.worker_id}"
        return "", ""

    def stop_attempt(self, key: str) -> None:
        """Free its slot. An engine that does not within the limit is killed."""
        self._outcomes.pop(key, None)
        attempt = self._attempts.get(key)
        if attempt is None or attempt.stopping:
            return
        attempt.stopping = True
        self.engine.send(Cancel(run_id=key))
        self._stops.append((trio.current_time() + self._cancel_s_max, key, attempt))
        self._stops_wake.set()

    def forget_attempt(self, key: str) -> None:
        """Its outcome is recorded. A run that was given up while it still goes on is stopped."""
        self._outcomes.pop(key, None)
        if key in self._attempts:
            self.stop_attempt(key)

    async def _enforce_stops(self) -> None:
        while True:
            await self._stops_wake.wait()
            self._stops_wake = trio.Event()
            while self._stops:
                deadline, key, attempt = self._stops.popleft()
                if self._attempts.get(key) is not attempt:
                    continue
                await trio.sleep_until(deadline)
                if self._attempts.get(key) is attempt:
                    self.engine.kill(f"a cancelled run still held its slot after {self._cancel_s_max} s")

    def _on_started(self, message: Started) -> None:
        attempt = self._attempts.get(message.run_id)
        if attempt is None:
            return
        attempt.prompt_tokens = message.prompt_tokens
        if not attempt.stopping:
            self._host.report(
                AttemptStarted(
                    worker_id=self.worker_id,
                    task_id=attempt.task_id,
                    attempt=attempt.attempt,
                    at=self._host.clock.wall(),
                    prompt_tokens=message.prompt_tokens,
                )
            )

    def _on_tokens(self, message: Tokens) -> None:
        attempt = self._attempts.get(message.run_id)
        if attempt is None or attempt.stopping:
            return
        attempt.chars += len(message.text)
        if attempt.chars > limits.RESULT_CHARS_MAX:
            self._too_large(message.run_id, attempt, f"{limits.RESULT_CHARS_MAX} characters")
            return
        attempt.pieces.append(message.text)
        logprobs = attempt.take_logprobs(message.logprobs) if message.logprobs else ()
        attempt.tokens += message.count
        streams = self._host.streams
        streams.publish(attempt.task_id, attempt.attempt, message.text, message.count, logprobs)

    def _on_output(self, message: Output) -> None:
        attempt = self._attempts.get(message.run_id)
        if attempt is None or attempt.stopping:
            return
        attempt.arrays = arrays_of(message)
        if sum(len(array.data) for array in attempt.arrays) > OUTPUT_BYTES_MAX:
            self._too_large(message.run_id, attempt, f"{OUTPUT_BYTES_MAX} bytes of numbers")

    def _too_large(self, key: str, attempt: Attempt, most: str) -> None:
        self.stop_attempt(key)
        self._host.streams.close(attempt.task_id, attempt.attempt)
        text = f"it generated more than {most}, which is the most that is kept"
        self._fail(key, attempt.task_id, attempt.attempt, "result_too_large", text, False)

    def _on_finished(self, message: Finished) -> None:
        attempt = self._attempts.pop(message.run_id, None)
        if attempt is None:
            return
        self._host.streams.close(attempt.task_id, attempt.attempt)
        self.replicas.used(attempt.model_name)
        self._check_idle()
        if attempt.stopping:
            return
        if message.reason == "cancelled":
            text = "the engine gave the run up"
            self._fail(message.run_id, attempt.task_id, attempt.attempt, "engine_cancelled", text, True)
            return
        self._outcomes[message.run_id] = (
            AttemptFinished(
                worker_id=self.worker_id,
                task_id=attempt.task_id,
                attempt=attempt.attempt,
                at=self._host.clock.wall(),
                generated_text="".join(attempt.pieces),
                tokens_generated=message.tokens_generated,
                prompt_tokens=message.prompt_tokens,
                finish_reason=message.reason,
                processing_s=message.processing_s,
                first_token_s=message.first_token_s,
                cached_tokens=message.cached_tokens,
                stand_in=self._info.stand_in,
                logprobs=tuple(attempt.logprobs),
                arrays=attempt.arrays,
            ),
            0.0,
        )
        self._report_outcome(message.run_id)

    def _on_run_failed(self, message: RunFailed) -> None:
        attempt = self._attempts.pop(message.run_id, None)
        if attempt is None:
            return
        self._host.streams.close(attempt.task_id, attempt.attempt)
        self._check_idle()
        if not attempt.stopping:
            self._fail(
                message.run_id,
                attempt.task_id,
                attempt.attempt,
                message.code,
                message.message,
                message.retryable,
            )

    def _fail(self, key: str, task_id: str, attempt: int, code: str, message: str, retryable: bool) -> None:
        failed = AttemptFailed(
            worker_id=self.worker_id,
            task_id=task_id,
            attempt=attempt,
            at=self._host.clock.wall(),
            code=code,
            message=message,
            retryable=retryable,
        )
        self._outcomes[key] = (failed, 0.0)
        self._report_outcome(key)

    def _report_outcome(self, key: str) -> None:
        outcome, _ = self._outcomes[key]
        self._outcomes[key] = (outcome, trio.current_time())
        self._host.report(outcome)

    def report_outcomes_again(self, after_s: float = OUTCOME_AGAIN_S) -> None:
        """Those that nobody has recorded for so long."""
        before = trio.current_time() - after_s
        for key in [key for key, (_, sent_at) in self._outcomes.items() if sent_at <= before]:
            self._report_outcome(key)

    async def idle(self) -> None:
        """Until its engine holds no run."""
        while self._attempts:
            self._idle = trio.Event()
            await self._idle.wait()

    def _check_idle(self) -> None:
        if not self._attempts:
            self._idle.set()

    # ------------------------------------------------------------ tokens of a prompt

    async def count_tokens(self, model: Model, path: str, parameters: dict[str, Any]) -> TokenCount | None:
        """None if the engine cannot be asked. Waits: the caller sets the limit."""
        self._counts_made += 1
        request_id = str(self._counts_made)
        answers: list[TokenCount] = []
        answered = trio.Event()

        def take(count: TokenCount) -> None:
            answers.append(count)
            answered.set()

        ask = CountTokens(request_id=request_id, path=path, family=model.family, parameters=parameters)
        if not self.engine.send(ask):
            return None
        self._counts[request_id] = take
        try:
            await answered.wait()
        finally:
            self._counts.pop(request_id, None)
        return answers[0]

    def _on_token_count(self, message: TokenCount) -> None:
        take = self._counts.pop(message.request_id, None)
        if take is not None:
            take(message)

    # ------------------------------------------------------------ measurements

    def _source_name(self) -> str:
        return "stand-in" if self._info.stand_in else "engine"

    def _on_heartbeat(self, message: Heartbeat) -> None:
        """Without a source of its own the device is measured by its engine; a stand-in has no other."""
        if self._telemetry_source is not None:
            return
        busy = 100.0 * min(1.0, len(self._attempts) / max(1, self.slots_max))
        self._measured(
            Telemetry(
                memory_total_bytes=self._telemetry.memory_total_bytes,
                memory_used_bytes=message.memory_used_bytes,
                temperature_c=message.temperature_c,
                utilization_percent=busy if self._info.stand_in else None,
                source=self._source_name(),
            )
        )

    async def _measure(self, source: TelemetrySource) -> None:
        while True:
            self._measured(await source.read())
            await trio.sleep(limits.REPORT_INTERVAL_S)

    def _measured(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        raised, self._alerts = judge(self.worker_id, telemetry, self._host.thresholds, self._alerts)
        for alert in raised:
            self._host.report(alert)
        if raised:
            self._host.touch(self)

    # ------------------------------------------------------------ its report

    def load(self, model: Model) -> None:
        self.replicas.load(model)

    def unload(self, model_name: str) -> None:
        self.replicas.unload(model_name)

    @property
    def running(self) -> int:
        """How many attempts."""
        return len(self._attempts)

    def held(self) -> tuple[str, ...]:
        """Attempts that run, or whose outcome is not recorded: this peer still answers for them."""
        return (*self._attempts, *self._outcomes)

    def snapshot(self, host: HostInfo, sent_at: float) -> WorkerReport:
        return WorkerReport(
            worker_id=self.worker_id,
            peer_id=self.peer_id,
            state=self.state,
            device=self._info,
            host=host,
            telemetry=self._telemetry,
            replicas=self.replicas.snapshot(),
            running=self.held(),
            slots_max=self.slots_max,
            engine_pid=self._pid,
            deaths=self._deaths,
            message=self.message,
            sent_at=sent_at,
        )
