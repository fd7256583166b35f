"""One device with its engine at measured speeds. Runs share it: so many at once, so many tokens per second together.

It stands where `simulations.policy.engines.SimWorker` does: `SimPeer` gives it orders and asks it for reports. All that
a SimPeer uses of one is replaced, for nothing is left to chance here, and nothing fails but the power.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peer.state.model import HOLDS_MEMORY, Model, Replica, ReplicaState
from peer.state.order import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    EngineStarted,
    ReplicaLoaded,
    RunAttempt,
)
from peer.state.worker import DeviceInfo, EngineState, HostInfo, Telemetry, WorkerReport
from simulations.policy.engines import Device, SimWorker
from simulations.rehearsal.plan import Host, Speed

if TYPE_CHECKING:
    from simulations.policy.hosts import SimPeer

START_S = 1.0  # of an engine's process, which loads no model yet
UNLOAD_S = 0.2


@dataclass(slots=True)
class _Loaded:
    model: Model
    memory_bytes: int
    since: float
    state: ReplicaState = ReplicaState.LOADING
    load_s: float = 0.0
    last_used: float = 0.0


@dataclass(slots=True)
class _Run:
    order: RunAttempt
    tokens: float  # still to be generated
    began: float
    speed: Speed


class Engine(SimWorker):
    def __init__(
        self, peer: SimPeer, worker_id: str, host: Host, speeds: Mapping[tuple[str, str], Speed]
    ) -> None:
        super().__init__(peer, worker_id, Device(host.device, host.memory_bytes, 1.0, 256, 1.0))
        self._runs: dict[str, _Run] = {}
        self._kept: dict[str, AttemptFinished | AttemptFailed] = {}
        self._models: dict[str, _Loaded] = {}
        self._sent_at: dict[str, float] = {}
        self._busy_s = 0.0
        self._host = host
        self._speeds = speeds
        self._turn = 0  # a planned end counts only if nothing has begun or ended since
        self._shared_at = 0.0

    def worked_s(self) -> float:
        """For how long it had something to run, until now."""
        self._share()
        return self._busy_s

    # ------------------------------------------------------------ life

    def start(self) -> None:
        self.state = EngineState.STARTING
        self._life += 1
        self._heap.after(START_S, self._is_ready, self._life)
        self._peer.touch(self)

    def vanish(self) -> None:
        """The power is gone, and all that ran with it."""
        self._share()
        self._life += 1
        self._turn += 1
        self._models, self._runs, self._kept, self._sent_at = {}, {}, {}, {}

    def restart(self) -> None:
        self.vanish()
        self.start()

    def thaw(self) -> None:
        """Nothing is frozen in a rehearsal."""

    def _is_ready(self, life: int) -> None:
        if life == self._life:
            self.state = EngineState.READY
            self._peer.touch(self)
            self._peer.report(EngineStarted(worker_id=self.worker_id, downtime_s=START_S))
            for held in self._models.values():
                self._heap.after(held.load_s, self._is_loaded, life, held)

    # ------------------------------------------------------------ models

    def load(self, model: Model) -> None:
        if model.name not in self._models:
            speed = self._speeds[self._host.device, model.name]
            nbytes = speed.memory_bytes or model.memory_bytes or model.size_bytes
            held = self._models[model.name] = _Loaded(model, nbytes, self._peer.wall(), load_s=speed.load_s)
            if self.state is EngineState.READY:
                self._heap.after(speed.load_s, self._is_loaded, self._life, held)
        self._peer.touch(self)

    def _is_loaded(self, life: int, held: _Loaded) -> None:
        if life != self._life or self._models.get(held.model.name) is not held:
            return
        held.state, held.since = ReplicaState.READY, self._peer.wall()
        self._peer.touch(self)
        self._peer.report(
            ReplicaLoaded(
                worker_id=self.worker_id,
                model_name=held.model.name,
                device_name=self._host.device,
                memory_bytes=held.memory_bytes,
                load_s=held.load_s,
            )
        )

    def unload(self, model_name: str) -> None:
        held = self._models.get(model_name)
        if held is not None and held.state is not ReplicaState.UNLOADING:
            held.state, held.since = ReplicaState.UNLOADING, self._peer.wall()
            self._heap.after(UNLOAD_S, self._is_gone, self._life, held)
        self._peer.touch(self)

    def _is_gone(self, life: int, held: _Loaded) -> None:
        if life == self._life and self._models.get(held.model.name) is held:
            del self._models[held.model.name]
            self._peer.touch(self)

    def really_there(self, model_name: str) -> object | None:
        return self._models.get(model_name)

    # ------------------------------------------------------------ runs

    @property
    def outcomes(self) -> Any:
        return self._kept

    @outcomes.setter
    def outcomes(self, value: Any) -> None:
        """What SimWorker begins with."""

    def start_attempt(self, order: RunAttempt) -> None:
        key = f"{order.task_id}/{order.attempt}"
        if key in self._runs or key in self._kept:
            return
        held = self._models.get(order.model_name)
        if self.state is not EngineState.READY or held is None or held.state is not ReplicaState.READY:
            self._keep(key, self._refusal(order))
            return
        held.last_used = self._peer.wall()
        self._share()
        speed = self._speeds[self._host.device, order.model_name]
        self._runs[key] = _Run(order, float(order.parameters["max_tokens"]), self._heap.now, speed)
        self._peer.report(
            AttemptStarted(
                worker_id=self.worker_id,
                task_id=order.task_id,
                attempt=order.attempt,
                at=self._peer.wall(),
                prompt_tokens=0,
            )
        )
        self._plan_next_end()

    def stop_attempt(self, key: str) -> None:
        self._kept.pop(key, None)
        if key in self._runs:
            self._share()
            del self._runs[key]
            self._plan_next_end()

    forget_attempt = stop_attempt

    def _share(self) -> None:
        """Give every run the tokens that it has generated since the last change."""
        passed_s = self._heap.now - self._shared_at
        self._shared_at = self._heap.now
        if self._runs:
            self._busy_s += passed_s
            for run in self._runs.values():
                run.tokens -= passed_s * self._rate(run)

    def _rate(self, run: _Run) -> float:
        """Tokens per second of one: an equal part of what so many reach together."""
        return run.speed.together(len(self._runs)) / len(self._runs)

    def _plan_next_end(self) -> None:
        self._turn += 1
        if self._runs:
            soonest = min(max(0.0, run.tokens) / self._rate(run) for run in self._runs.values())
            self._heap.after(soonest, self._ended, self._turn)

    def _ended(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._share()
        for key in [key for key, run in self._runs.items() if run.tokens < 1e-6]:
            run = self._runs.pop(key)
            self._keep(key, self._result(key, run))
        self._plan_next_end()

    def _result(self, key: str, run: _Run) -> AttemptFinished:
        return AttemptFinished(
            worker_id=self.worker_id,
            task_id=run.order.task_id,
            attempt=run.order.attempt,
            at=self._peer.wall(),
            generated_text=f"{self.worker_id}:{key}",
            tokens_generated=run.order.parameters["max_tokens"],
            prompt_tokens=0,
            finish_reason="length",
            processing_s=self._heap.now - run.began,
            first_token_s=0.0,
        )

    def _refusal(self, order: RunAttempt) -> AttemptFailed:
        return AttemptFailed(
            worker_id=self.worker_id,
            task_id=order.task_id,
            attempt=order.attempt,
            at=self._peer.wall(),
            code="model_not_loaded",
            message=f"{order.model_name} is not loaded",
            retryable=True,
        )

    def _keep(self, key: str, outcome: AttemptFinished | AttemptFailed) -> None:
        """It is reported until the leader has recorded it."""
        self._kept[key] = outcome
        self._sent_at[key] = self._heap.now
        self._peer.report(outcome)

    def report_outcomes_again(self, after_s: float) -> None:
        for key, outcome in self._kept.items():
            if self._sent_at[key] <= self._heap.now - after_s:
                self._sent_at[key] = self._heap.now
                self._peer.report(outcome)

    # ------------------------------------------------------------ reports

    def measure(self) -> None:
        """Memory is what is held: nothing else uses these devices."""

    def report(self, host: HostInfo) -> WorkerReport:
        used = sum(held.memory_bytes for held in self._models.values() if held.state in HOLDS_MEMORY)
        return WorkerReport(
            worker_id=self.worker_id,
            peer_id=self._peer.peer_id,
            state=self.state,
            device=DeviceInfo(device=self._host.device, name=self._host.device),
            host=host,
            telemetry=Telemetry(
                memory_total_bytes=self._host.memory_bytes, memory_used_bytes=used, source="rehearsed"
            ),
            replicas=tuple(
                Replica(
                    worker_id=self.worker_id,
                    model_name=name,
                    state=held.state,
                    memory_bytes=held.memory_bytes,
                    load_s=held.load_s,
                    since=held.since,
                    last_used=held.last_used,
                    slots=held.model.slots,
                    context=held.model.context,
                )
                for name, held in self._models.items()
            ),
            running=(*self._runs, *self._kept),
            slots_max=256,
            sent_at=self._peer.wall(),
        )
