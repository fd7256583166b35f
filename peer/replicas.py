"""The models of one worker: their files fetched, loaded, unloaded, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import trio

from engine.protocol import Load, Loaded, LoadFailed, LoadProgress, ToEngine, Unload, Unloaded
from peer.engines import EngineHandle, FetchError, ModelFiles
from peer.ports import Clock
from peer.state.model import Model, Replica, ReplicaState
from peer.state.order import ReplicaLoaded, Report
from peer.state.worker import EngineState

if TYPE_CHECKING:
    from peer.hosted import HostedWorker

BUILTIN = "builtin:"

log = structlog.get_logger("executor")


class Held:
    """One replica as it changes."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.state = ReplicaState.FETCHING
        self.memory_bytes = model.memory_bytes or model.size_bytes
        self.load_s = 0.0
        self.since = 0.0
        self.last_used = 0.0
        self.context = model.context
        self.slots = model.slots
        self.stage = ""
        self.done = 0
        self.total = 0
        self.failures = 0
        self.error = ""
        self.error_code = ""
        self.scope = trio.CancelScope()  # of its fetch
        self.again: Model | None = None  # ordered while it is being unloaded


class ReplicasHost(Protocol):
    clock: Clock

    def report(self, report: Report) -> None: ...
    def touch(self, worker: HostedWorker) -> None: ...


class Replicas:
    """Orders are idempotent: loading what is loaded, unloading what is not, only reports the state again."""

    nursery: trio.Nursery

    def __init__(self, worker: HostedWorker, host: ReplicasHost, files: ModelFiles) -> None:
        self._worker = worker
        self._host = host
        self._files = files
        self._held: dict[str, Held] = {}
        self._settled = trio.Event()  # the engine has become ready, or cannot
        self.handlers: dict[Any, Callable[[Any], None]] = {
            LoadProgress: self._on_progress,
            Loaded: self._on_loaded,
            LoadFailed: self._on_load_failed,
            Unloaded: self._on_unloaded,
        }

    # ------------------------------------------------------------ orders

    def load(self, model: Model) -> None:
        held = self._held.get(model.name)
        failures = 0
        if held is not None:
            if held.state is ReplicaState.UNLOADING:
                held.again = model
                return
            if held.state is not ReplicaState.FAILED:
                self._touch()
                return
            failures = held.failures
        held = self._held[model.name] = Held(model)
        held.failures = failures
        held.since = self._host.clock.wall()
        self._touch()
        self.nursery.start_soon(self._bring, held)

    def unload(self, model_name: str) -> None:
        held = self._held.get(model_name)
        if held is not None:
            held.again = None
            if held.state in (ReplicaState.FETCHING, ReplicaState.FAILED):
                held.scope.cancel()
                del self._held[model_name]
            elif held.state is not ReplicaState.UNLOADING:
                self._enter(held, ReplicaState.UNLOADING)
                if not self._send(Unload(model=model_name)):
                    self._worker.engine.kill("it takes no orders: a model cannot be unloaded")
        self._touch()

    # ------------------------------------------------------------ fetching and loading

    async def _bring(self, held: Held) -> None:
        """Fetch the file, then give it to the engine."""
        with held.scope:
            try:
                path = await self._fetch(held)
            except FetchError as error:
                self._fail(held, error.code, error.message)
                return
            while self._worker.state in (EngineState.STARTING, EngineState.RESTARTING):
                held.stage = "wait"
                if self._settled.is_set():
                    self._settled = trio.Event()
                await self._settled.wait()
            if self._held.get(held.model.name) is held:
                self._hand_over(held, path)

    async def _fetch(self, held: Held) -> str:
        model, device = held.model, self._worker.device
        if device.stand_in:  # it needs no file, and a rehearsal should not download gigabytes
            return model.source
        if model.source.startswith(BUILTIN):
            raise FetchError(
                "stand_in_only", f"{model.name} is the stand-in engine's: it only runs on a device `fake`"
            )

        def progress(stage: str, done: int, total: int) -> None:
            self._show(held, stage, done, total)

        return await self._files.fetch(model, progress)

    def _hand_over(self, held: Held, path: str) -> None:
        model = held.model
        self._enter(held, ReplicaState.LOADING)
        order = Load(
            model=model.name,
            path=path,
            family=model.family,
            context=model.context,
            slots=model.slots,
            task_type=model.task_types[0],
        )
        if not self._send(order):
            why = self._worker.message or "its engine takes no orders"
            self._fail(
                held, "worker_unavailable", f"{self._worker.worker_id} cannot load {model.name}: {why}"
            )

    def _on_progress(self, message: LoadProgress) -> None:
        held = self._held.get(message.model)
        if held is not None and held.state is ReplicaState.LOADING:
            self._show(held, message.stage, message.done, message.total)

    def _on_loaded(self, message: Loaded) -> None:
        held = self._held.get(message.model)
        if held is None or held.state is not ReplicaState.LOADING:
            return
        held.memory_bytes, held.load_s = message.memory_bytes, message.load_s
        held.context, held.slots, held.failures = message.context, message.slots, 0
        self._enter(held, ReplicaState.READY)
        if message.slots < message.slots_asked:
            self._tell_fewer_slots(message)
        else:
            self._host.report(
                ReplicaLoaded(
                    worker_id=self._worker.worker_id,
                    model_name=message.model,
                    device_name=self._worker.device_name,
                    memory_bytes=message.memory_bytes,
                    load_s=message.load_s,
                )
            )
        log.info(
            "model_loaded",
            worker_id=self._worker.worker_id,
            model=message.model,
            load_s=round(message.load_s, 3),
        )

    def _tell_fewer_slots(self, message: Loaded) -> None:
        """What it took is not what such a model takes: it is no measure for other devices, and not reported as one."""
        log.warning(
            "fewer_slots",
            worker_id=self._worker.worker_id,
            model=message.model,
            slots=message.slots,
            asked=message.slots_asked,
            reason="the device's memory is too small for all: the model works on fewer tasks at a time",
        )

    def _on_load_failed(self, message: LoadFailed) -> None:
        held = self._held.get(message.model)
        if held is not None and held.state is ReplicaState.LOADING:
            self._fail(held, message.code, message.message)

    def _on_unloaded(self, message: Unloaded) -> None:
        held = self._held.get(message.model)
        if held is None or held.state is not ReplicaState.UNLOADING:
            return
        del self._held[message.model]
        self._touch()
        if held.again is not None:
            self.load(held.again)

    def _fail(self, held: Held, code: str, message: str) -> None:
        held.failures += 1
        held.error_code, held.error = code, message
        held.memory_bytes = 0
        self._enter(held, ReplicaState.FAILED)
        log.warning(
            "model_not_loaded",
            worker_id=self._worker.worker_id,
            model=held.model.name,
            code=code,
            reason=message,
        )

    # ------------------------------------------------------------ the engine's life

    def engine_ready(self) -> None:
        self._settled.set()

    def engine_failed(self, message: str) -> None:
        """It will not be ready by itself: loads that wait for it fail."""
        self._settled.set()

    def engine_gone(self, code: str, reason: str) -> None:
        """What was on the device is no more. A load that the engine died of has failed; fetches go on."""
        for name, held in list(self._held.items()):
            if held.state is ReplicaState.LOADING and code == "engine_died":
                self._fail(held, code, f"the engine died while it loaded {name}: {reason}")
            elif held.state not in (ReplicaState.FETCHING, ReplicaState.FAILED):
                del self._held[name]
                if held.again is not None:
                    self.load(held.again)

    # ------------------------------------------------------------ what is there

    def state(self, model_name: str) -> ReplicaState | None:
        held = self._held.get(model_name)
        return held.state if held is not None else None

    def serves(self, model_name: str) -> bool:
        held = self._held.get(model_name)
        return held is not None and held.state is ReplicaState.READY

    def used(self, model_name: str) -> None:
        held = self._held.get(model_name)
        if held is not None:
            held.last_used = self._host.clock.wall()

    def snapshot(self) -> tuple[Replica, ...]:
        return tuple(
            Replica(
                worker_id=self._worker.worker_id,
                model_name=name,
                state=held.state,
                memory_bytes=held.memory_bytes,
                load_s=held.load_s,
                since=held.since,
                last_used=held.last_used,
                slots=held.slots,
                context=held.context,
                stage=held.stage,
                done=held.done,
                total=held.total,
                failures=held.failures,
                error=held.error,
                error_code=held.error_code,
            )
            for name, held in self._held.items()
        )

    # ------------------------------------------------------------

    def _send(self, message: ToEngine) -> bool:
        engine: EngineHandle = self._worker.engine
        return engine.send(message)

    def _enter(self, held: Held, state: ReplicaState) -> None:
        held.state = state
        held.since = self._host.clock.wall()
        held.stage, held.done, held.total = "", 0, 0
        self._touch()

    def _show(self, held: Held, stage: str, done: int, total: int) -> None:
        """Progress goes with the next report; a new stage is told soon, or a short one would not be seen."""
        if stage != held.stage:
            self._touch()
        held.stage, held.done, held.total = stage, done, total

    def _touch(self) -> None:
        self._host.touch(self._worker)
