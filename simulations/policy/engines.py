"""One device with its engine: loads and runs that take time, take memory, fail, hang and die."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peer import limits
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

if TYPE_CHECKING:
    from simulations.policy.hosts import SimPeer

_RESERVED_BYTES = 256 << 20  # the driver's own


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    memory_bytes: int
    speed: float
    slots_max: int
    memory_factor: float  # what a model really takes, of what the catalogue says


@dataclass(slots=True)
class _Held:
    model: Model
    state: ReplicaState = ReplicaState.FETCHING
    memory_bytes: int = 0
    load_s: float = 0.0
    since: float = 0.0
    last_used: float = 0.0
    failures: int = 0
    error: str = ""
    error_code: str = ""
    again: Model | None = None


@dataclass(slots=True)
class _Attempt:
    order: RunAttempt
    running: bool = False
    stopping: bool = False


@dataclass(slots=True)
class _Kept:
    """An outcome that nobody has recorded yet, and when it was last reported."""

    outcome: AttemptFinished | AttemptFailed
    sent_at: float = field(default=0.0)


class SimWorker:
    def __init__(self, peer: SimPeer, worker_id: str, device: Device) -> None:
        self.worker_id = worker_id
        self.device = device
        self.state = EngineState.STARTING
        self.foreign_bytes = 0  # other programs' memory on the device
        self.flapping_until = -1.0
        self.attempts: dict[str, _Attempt] = {}
        self.outcomes: dict[str, _Kept] = {}
        self._peer = peer
        self._heap = peer.world.heap
        self._rng = peer.world.heap.random(f"worker/{worker_id}")
        self._life = 0
        self._held: dict[str, _Held] = {}
        self._on_disk: dict[str, None] = {}
        self._deaths: list[float] = []
        self._message = ""
        self._down_since = 0.0
        self._used_bytes = 0

    # ------------------------------------------------------------ the engine's life

    def start(self) -> None:
        self.state, self._message = EngineState.STARTING, ""
        self._life += 1
        self._down_since = self._heap.now
        self._heap.after(self._rng.uniform(0.5, 4.0), self._ready, self._life)
        self._peer.touch(self)

    def vanish(self) -> None:
        """Its peer has crashed: nothing is reported, nothing is left."""
        self._life += 1
        self._held, self.attempts, self.outcomes = {}, {}, {}

    def _ready(self, life: int) -> None:
        if life != self._life or self._later(self._ready, life):
            return
        self.state, self._message = EngineState.READY, ""
        self._peer.touch(self)
        self._peer.report(
            EngineStarted(worker_id=self.worker_id, downtime_s=self._heap.now - self._down_since)
        )
        for held in list(self._held.values()):
            if held.state is ReplicaState.FETCHING:
                self._fetch(held)
        if self._heap.now < self.flapping_until:
            self._heap.after(self._rng.uniform(1.0, 20.0), self._flap, self._life)

    def _flap(self, life: int) -> None:
        if life == self._life and not self._peer.world.faults.over:
            self.die("it flaps")

    def die(self, reason: str) -> None:
        """It restarts by itself, later each time; too many deaths put it into quarantine."""
        if self.state not in (EngineState.READY, EngineState.STARTING) or not self._peer.up:
            return
        now = self._heap.now
        self._deaths = [at for at in self._deaths if now - at < limits.DEATHS_WINDOW_S] + [now]
        self._message = f"the engine died: {reason}"
        self.state = EngineState.RESTARTING
        wait_s = limits.RESTART_BACKOFF_S[min(len(self._deaths), len(limits.RESTART_BACKOFF_S)) - 1]
        if len(self._deaths) > limits.DEATHS_MAX:
            self.state, wait_s = EngineState.ERROR, limits.QUARANTINE_S
            self._peer.world.sometimes.saw("quarantine")
        self._gone("engine_died", reason)
        self._heap.after(wait_s, self._begin_again, self._life)

    def _begin_again(self, life: int) -> None:
        if life == self._life:
            if self.state is EngineState.ERROR:
                self._deaths = []
            down_since = self._down_since
            self.start()
            self._down_since = down_since

    def restart(self) -> None:
        """On request; ends a quarantine."""
        self._deaths = []
        self.state, self._message = EngineState.RESTARTING, "it restarts on request"
        self._gone("engine_restarted", "a restart was requested")
        self._heap.after(self._rng.uniform(0.2, 3.0), self._begin_again, self._life)

    def hang(self) -> None:
        """It answers nothing until its supervisor has had enough."""
        if self.state is EngineState.READY:
            self._life += 1
            self._heap.after(limits.STALL_S["decode"], self._stalled, self._life)

    def _stalled(self, life: int) -> None:
        if life == self._life:
            self.die("it hung")

    def _gone(self, code: str, reason: str) -> None:
        self._peer.wake()
        self._life += 1
        self._down_since = self._heap.now
        self._peer.report_state(self)
        attempts, self.attempts = self.attempts, {}
        for key, attempt in attempts.items():
            if not attempt.stopping:
                self._fail(key, attempt.order, code, f"the engine ended: {reason}", retryable=True)
        for name, held in list(self._held.items()):
            if held.state is ReplicaState.LOADING and code == "engine_died":
                self._load_failed(held, code, reason)
            elif held.state not in (ReplicaState.FETCHING, ReplicaState.FAILED):
                del self._held[name]
                if held.again is not None:
                    self.load(held.again)

    # ------------------------------------------------------------ models

    def load(self, model: Model) -> None:
        held = self._held.get(model.name)
        if held is not None:
            if held.state is ReplicaState.UNLOADING:
                held.again = model
                return
            if held.state is not ReplicaState.FAILED:
                self._peer.touch(self)
                return
            self._peer.world.sometimes.saw("load retried after a failure")
        failures = held.failures if held is not None else 0
        held = self._held[model.name] = _Held(model, since=self._peer.wall(), failures=failures)
        held.memory_bytes = model.memory_bytes or model.size_bytes
        self._peer.touch(self)
        if self.state is EngineState.READY:
            self._fetch(held)
        elif self.state is EngineState.ERROR:
            self._load_failed(held, "worker_unavailable", self._message)

    def _fetch(self, held: _Held) -> None:
        fetch_s = 0.01 if held.model.name in self._on_disk else held.model.size_bytes / 1e9
        self._heap.after(fetch_s * self._rng.uniform(0.8, 1.5), self._fetched, self._life, held)

    def _fetched(self, life: int, held: _Held) -> None:
        if life != self._life or self._held.get(held.model.name) is not held:
            return
        if self._later(self._fetched, life, held):
            return
        self._on_disk[held.model.name] = None
        self._enter(held, ReplicaState.LOADING)
        load_s = (held.model.size_bytes / 2e9 + 0.5) * self._rng.uniform(0.7, 1.5)
        self._heap.after(load_s, self._loaded, self._life, held, load_s)

    def _loaded(self, life: int, held: _Held, load_s: float) -> None:
        if life != self._life or held.state is not ReplicaState.LOADING:
            return
        if self._later(self._loaded, life, held, load_s):
            return
        world, name = self._peer.world, held.model.name
        if world.faults.strikes("load_failure", self._rng):
            world.sometimes.fault("load_failure")
            self._load_failed(held, "load_failed", "a simulated failure")
            return
        takes = self.takes_bytes(held.model)
        if takes + self._taken(without=name) > self.device.memory_bytes:
            world.sometimes.saw("load did not fit the device")
            self._load_failed(held, "out_of_memory", f"{name} needs {takes} bytes more than there are")
            return
        held.memory_bytes, held.load_s, held.failures = takes, load_s, 0
        self._enter(held, ReplicaState.READY)
        self._peer.report(
            ReplicaLoaded(
                worker_id=self.worker_id,
                model_name=name,
                device_name=self.device.name,
                memory_bytes=takes,
                load_s=load_s,
            )
        )

    def really_there(self, model_name: str) -> object | None:
        """What stands for the loaded replica: another object once it was loaded anew."""
        return self._held.get(model_name)

    def takes_bytes(self, model: Model) -> int:
        return int((model.memory_bytes or model.size_bytes * 1.25) * self.device.memory_factor)

    def _taken(self, without: str = "") -> int:
        ours = sum(
            self.takes_bytes(held.model)
            for name, held in self._held.items()
            if held.state in HOLDS_MEMORY and name != without
        )
        return ours + self.foreign_bytes + _RESERVED_BYTES

    def _load_failed(self, held: _Held, code: str, message: str) -> None:
        held.failures += 1
        held.error_code, held.error, held.memory_bytes = code, message, 0
        self._enter(held, ReplicaState.FAILED)

    def unload(self, model_name: str) -> None:
        held = self._held.get(model_name)
        if held is not None:
            held.again = None
            if held.state in (ReplicaState.FETCHING, ReplicaState.FAILED):
                del self._held[model_name]
            elif held.state is not ReplicaState.UNLOADING:
                self._enter(held, ReplicaState.UNLOADING)
                if self.state is EngineState.READY:
                    self._heap.after(self._rng.uniform(0.05, 1.0), self._unloaded, self._life, held)
                else:
                    self.die("it takes no orders")
        self._peer.touch(self)

    def _unloaded(self, life: int, held: _Held) -> None:
        if life != self._life or held.state is not ReplicaState.UNLOADING:
            return
        if self._later(self._unloaded, life, held):
            return
        del self._held[held.model.name]
        self._peer.touch(self)
        if held.again is not None:
            self.load(held.again)

    def _enter(self, held: _Held, state: ReplicaState) -> None:
        held.state, held.since = state, self._peer.wall()
        self._peer.touch(self)

    # ------------------------------------------------------------ runs

    def start_attempt(self, order: RunAttempt) -> None:
        key = f"{order.task_id}/{order.attempt}"
        if key in self.attempts:
            return
        if key in self.outcomes:
            self._report_outcome(key)
            return
        held = self._held.get(order.model_name)
        if self.state is not EngineState.READY:
            self._fail(key, order, "worker_unavailable", f"it is {self.state.value}", retryable=True)
        elif held is None or held.state is not ReplicaState.READY:
            self._fail(key, order, "model_not_loaded", f"{order.model_name} is not loaded", retryable=True)
        else:
            self.attempts[key] = _Attempt(order)
            held.last_used = self._peer.wall()
            self._fill_slots(order.model_name)

    def _fill_slots(self, model_name: str) -> None:
        mine = [(k, a) for k, a in self.attempts.items() if a.order.model_name == model_name]
        held = self._held.get(model_name)
        free = (held.model.slots if held is not None else 0) - sum(a.running for _, a in mine)
        for key, attempt in mine:
            if free > 0 and not attempt.running and not attempt.stopping:
                attempt.running = True
                free -= 1
                self._heap.after(self._rng.uniform(0.01, 0.2), self._started, self._life, key)

    def _started(self, life: int, key: str) -> None:
        attempt = self.attempts.get(key)
        if life != self._life or attempt is None or self._later(self._started, life, key):
            return
        order = attempt.order
        if not attempt.stopping:
            self._peer.report(
                AttemptStarted(
                    worker_id=self.worker_id,
                    task_id=order.task_id,
                    attempt=order.attempt,
                    at=self._peer.wall(),
                    prompt_tokens=8,
                )
            )
        run_s = order.parameters["run_s"] / self.device.speed * self._rng.uniform(0.9, 1.2)
        self._heap.after(run_s, self._finished, self._life, key, run_s)

    def _finished(self, life: int, key: str, run_s: float) -> None:
        attempt = self.attempts.get(key)
        if life != self._life or attempt is None or self._later(self._finished, life, key, run_s):
            return
        del self.attempts[key]
        order, world = attempt.order, self._peer.world
        held = self._held.get(order.model_name)
        if held is not None:
            held.last_used = self._peer.wall()
        self._fill_slots(order.model_name)
        if attempt.stopping:
            return
        if world.faults.strikes("run_error", self._rng):
            world.sometimes.fault("run_error")
            again = self._rng.random() < 0.7
            code = "engine_error" if again else "bad_input"
            self._fail(key, order, code, "a simulated failure", retryable=again)
            return
        tokens = max(1, int(run_s * 20))
        self.outcomes[key] = _Kept(
            AttemptFinished(
                worker_id=self.worker_id,
                task_id=order.task_id,
                attempt=order.attempt,
                at=self._peer.wall(),
                generated_text=f"{self.worker_id}:{key}",
                tokens_generated=tokens,
                prompt_tokens=8,
                finish_reason="stop",
                processing_s=run_s,
                first_token_s=0.05,
            )
        )
        self._report_outcome(key)

    def stop_attempt(self, key: str) -> None:
        self.outcomes.pop(key, None)
        attempt = self.attempts.get(key)
        if attempt is None or attempt.stopping:
            return
        attempt.stopping = True
        world = self._peer.world
        if world.faults.strikes("stuck_cancel", self._rng):
            world.sometimes.fault("stuck_cancel")
            self._heap.after(limits.CANCEL_S_MAX, self._stuck, self._life, key)
        else:
            self._heap.after(self._rng.uniform(0.01, 0.3), self._stopped, self._life, key)

    def _stopped(self, life: int, key: str) -> None:
        if life == self._life and not self._later(self._stopped, life, key):
            attempt = self.attempts.pop(key, None)
            if attempt is not None:
                self._fill_slots(attempt.order.model_name)

    def _stuck(self, life: int, key: str) -> None:
        if life == self._life and key in self.attempts:
            self.die("a cancelled run still held its slot")

    def forget_attempt(self, key: str) -> None:
        self.outcomes.pop(key, None)
        if key in self.attempts:
            self.stop_attempt(key)

    def _fail(self, key: str, order: RunAttempt, code: str, message: str, *, retryable: bool) -> None:
        self.outcomes[key] = _Kept(
            AttemptFailed(
                worker_id=self.worker_id,
                task_id=order.task_id,
                attempt=order.attempt,
                at=self._peer.wall(),
                code=code,
                message=message,
                retryable=retryable,
            )
        )
        self._report_outcome(key)

    def _report_outcome(self, key: str) -> None:
        kept = self.outcomes[key]
        kept.sent_at = self._heap.now
        self._peer.report(kept.outcome)

    def report_outcomes_again(self, after_s: float) -> None:
        before = self._heap.now - after_s
        for key in [key for key, kept in self.outcomes.items() if kept.sent_at <= before]:
            self._peer.world.sometimes.saw("outcome reported again")
            self._report_outcome(key)

    # ------------------------------------------------------------ freezing, measuring

    def _later(self, call: object, *args: object) -> bool:
        """While its peer is frozen nothing happens: the event is tried again a little later."""
        if not self._peer.frozen:
            return False
        self._heap.after(0.25, call, *args)  # type: ignore[arg-type]
        return True

    def thaw(self) -> None:
        self._peer.wake()
        self._peer.report_state(self)

    def measure(self) -> None:
        self._used_bytes = self._taken() if self.state is EngineState.READY else self.foreign_bytes

    def report(self, host: HostInfo) -> WorkerReport:
        return WorkerReport(
            worker_id=self.worker_id,
            peer_id=self._peer.peer_id,
            state=self.state,
            device=DeviceInfo(device="KFD", name=self.device.name),
            host=host,
            telemetry=Telemetry(
                memory_total_bytes=self.device.memory_bytes,
                memory_used_bytes=min(self._used_bytes, self.device.memory_bytes),
                utilization_percent=min(100.0, 25.0 * len(self.attempts)),
                source="simulated",
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
                    failures=held.failures,
                    error=held.error,
                    error_code=held.error_code,
                )
                for name, held in self._held.items()
            ),
            running=(*self.attempts, *self.outcomes),
            slots_max=self.device.slots_max,
            deaths=len(self._deaths),
            message=self._message,
            sent_at=self._peer.wall(),
        )
