"""The real engine: a thread that owns the device, one that reads the peer's frames, one that counts tokens.

Only the device's thread (the main one) touches tinygrad, sends heartbeats and ends runs. The reader exits the process
at end of stream at once, whatever the device does. An exception on the device's thread is fatal: what ran here is
reported as retryable, and the process exits with status 70 for the peer to respawn.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NoReturn

from engine import device
from engine.errors import DeviceUnusable, LoadError
from engine.process import EXIT_FAULT, EXIT_OK, EXIT_PROTOCOL, RECV_BYTES, exit_now, log, refuse
from engine.protocol import (
    Cancel,
    Configure,
    CountTokens,
    Fault,
    Frames,
    Heartbeat,
    Hello,
    Load,
    LoadFailed,
    LoadProgress,
    Message,
    Phase,
    ProtocolError,
    Ready,
    Run,
    RunFailed,
    Shutdown,
    TokenCount,
    Unload,
    Unloaded,
    encode,
)
from engine.self_test import open_devices, self_test

if TYPE_CHECKING:
    from engine.counting import Counter
    from engine.loading import LoadedModel

HEARTBEAT_S = 1.0
PROGRESS_S = 0.1  # at most so often does a load report and let others step
COUNTS_WAITING_MAX = 1024


class Outbox:
    """Frames to the peer, from any thread. Losing the peer ends the process."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, *messages: Message) -> None:
        data = b"".join(encode(message) for message in messages)
        try:
            with self._lock:
                self._sock.sendall(data)
        except OSError:
            exit_now(EXIT_OK)


class Reader(threading.Thread):
    """Parses frames; never waits for the device."""

    def __init__(self, sock: socket.socket, frames: Frames, inbox: queue.SimpleQueue[object]) -> None:
        super().__init__(name="reader", daemon=True)
        self._sock, self._frames, self._inbox = sock, frames, inbox
        self.counts: queue.Queue[CountTokens] = queue.Queue(COUNTS_WAITING_MAX)
        self.outbox: Outbox | None = None

    def run(self) -> None:
        while True:
            try:
                data = self._sock.recv(RECV_BYTES)
                messages = self._frames.feed(data)
            except ConnectionError:
                exit_now(EXIT_OK)
            except ProtocolError as error:
                log("protocol_error", error=str(error))
                exit_now(EXIT_PROTOCOL)
            if not data:
                exit_now(EXIT_OK)
            for message in messages:
                self.deliver(message)

    def deliver(self, message: object) -> None:
        """Hand a message to whom it concerns."""
        if isinstance(message, CountTokens):
            try:
                self.counts.put_nowait(message)
            except queue.Full:
                self._refuse_count(message)
        elif isinstance(message, Shutdown):
            exit_now(EXIT_OK)
        elif isinstance(message, Configure | Hello):
            log("protocol_error", error=f"a second {type(message).__name__}")
            exit_now(EXIT_PROTOCOL)
        else:
            self._inbox.put(message)

    def _refuse_count(self, message: CountTokens) -> None:
        if self.outbox is not None:
            text = f"{COUNTS_WAITING_MAX} counts already wait"
            self.outbox.send(TokenCount(request_id=message.request_id, tokens=-1, context=0, error=text))


def count_tokens(counter: Counter, counts: queue.Queue[CountTokens], outbox: Outbox) -> NoReturn:
    """The counting thread: needs a model's file, not the model."""
    while True:
        outbox.send(counter.count(counts.get()))


def end_with_a_thread(failure: threading.ExceptHookArgs) -> NoReturn:
    """What an unforeseen exception does in the other threads: without them the engine would be deaf, or not count."""
    try:
        name = failure.thread.name if failure.thread is not None else "unknown"
        log("thread_failed", thread=name, error=f"{failure.exc_type.__name__}: {failure.exc_value}")
    finally:  # also without the memory to say so
        exit_now(EXIT_FAULT)


class Engine:
    """What the device's thread does."""

    def __init__(self, configure: Configure, name: device.DeviceName, limit: int, outbox: Outbox) -> None:
        self._configure = configure
        self._name = name
        self._memory_limit = limit
        self._outbox = outbox
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._models: dict[str, LoadedModel] = {}
        self._loading: str | None = None
        self._stepping = False
        self._deferred: deque[object] = deque()
        self._phase: Phase = "idle"
        self._steps = 0
        self._beat_due_s = 0.0
        self._progress_due_s = 0.0

    # ------------------------------------------------------------ the loop

    def supervise(self) -> NoReturn:
        """Serve for ever. The one place that catches everything: the device may be in any state then."""
        try:
            while True:
                self._turn()
        except Exception as error:
            try:
                log("device_failed", error=f"{type(error).__name__}: {error}")
                self._report_failure(f"the device failed: {type(error).__name__}")
            finally:  # also without the memory to say so: the peer then fails what ran here
                exit_now(EXIT_FAULT)

    def _turn(self) -> None:
        self._read_messages(wait=not self._busy())
        while self._deferred:
            self._handle(self._deferred.popleft())
        if not self._step():
            self._phase = "idle"
            self._beat(only_if_due=True)

    def _busy(self) -> bool:
        return any(model.batcher.busy for model in self._models.values())

    def _read_messages(self, wait: bool) -> None:
        """All that has come; when `wait`, sleep until something comes or a heartbeat is due."""
        try:
            if wait:
                self._handle(self.inbox.get(timeout=max(0.0, self._beat_due_s - time.monotonic())))
            while True:
                self._handle(self.inbox.get_nowait())
        except queue.Empty:
            return

    def _step(self) -> bool:
        """One step of every model that has work."""
        stepped = False
        for model in list(self._models.values()):
            if not model.batcher.busy:
                continue
            active = sum(other.batcher.active for other in self._models.values())
            self._stepping = stepped = True
            messages = model.batcher.step(self._configure.slots_max - active)
            self._stepping = False
            self._steps += 1
            self._phase = "prefill" if model.batcher.prefilling else "decode"
            self._outbox.send(*messages, self._heartbeat())
        return stepped

    def _heartbeat(self) -> Heartbeat:
        from engine.loading import memory_used

        self._beat_due_s = time.monotonic() + HEARTBEAT_S
        return Heartbeat(phase=self._phase, step=self._steps, memory_used_bytes=memory_used())

    def _beat(self, only_if_due: bool = False) -> None:
        if not only_if_due or time.monotonic() >= self._beat_due_s:
            self._outbox.send(self._heartbeat())

    def _report_failure(self, text: str) -> None:
        messages = [
            m for model in self._models.values() for m in model.batcher.fail_all("device_failed", text)
        ]
        self._outbox.send(*messages)

    # ------------------------------------------------------------ messages

    def _handle(self, message: object) -> None:
        match message:
            case Load() | Unload() if self._loading is not None:
                self._deferred.append(message)
            case Load():
                self._load(message)
            case Unload():
                self._unload(message.model)
            case Run():
                self._run(message)
            case Cancel():
                for model in self._models.values():
                    self._outbox.send(*model.batcher.cancel(message.run_id))
            case Fault():
                pass
            case _:
                log("protocol_error", error=f"unexpected {type(message).__name__}")
                exit_now(EXIT_PROTOCOL)

    def _run(self, run: Run) -> None:
        model = self._models.get(run.model)
        log("run", run_id=run.run_id, request_id=run.request_id, model=run.model)
        if model is not None:
            self._outbox.send(*model.batcher.add(run))
            return
        text = f"{run.model} is not loaded on this device"
        self._outbox.send(RunFailed(run_id=run.run_id, code="unknown_model", message=text, retryable=True))

    def _load(self, load: Load) -> None:
        from engine.loading import load_model

        if load.model in self._models:
            text = f"{load.model} is already loaded"
            self._outbox.send(LoadFailed(model=load.model, code="already_loaded", message=text))
            return
        self._loading = load.model
        self._progress_due_s = 0.0
        log("load", model=load.model, path=load.path, context=load.context, slots=load.slots)
        try:
            slots = min(load.slots, self._configure.slots_max)
            model = load_model(
                load, slots, self._name, self._memory_limit, self._progress, self._configure.beam
            )
            self._models[load.model] = model
            self._outbox.send(model.loaded)
            log(
                "loaded",
                model=load.model,
                load_s=round(model.loaded.load_s, 3),
                slots=model.loaded.slots,
                slots_asked=model.loaded.slots_asked,
                kernels_compiled=model.loaded.kernels_compiled,
                kernels_searched=model.loaded.kernels_searched,
            )
        except LoadError as error:
            if self._stepping:  # the memory ended in another model's step, which is half done
                raise
            log("load_failed", model=load.model, code=error.code, error=str(error))
            self._outbox.send(LoadFailed(model=load.model, code=error.code, message=str(error)))
        finally:
            self._loading = None

    def _progress(self, progress: LoadProgress) -> None:
        """Between the pieces of a load: report, and let the other models' runs go on."""
        now = time.monotonic()
        between = progress.done < progress.total or progress.stage == "search"
        if progress.stage != "compile" and between and now < self._progress_due_s:
            return
        self._progress_due_s = now + PROGRESS_S
        self._read_messages(wait=False)
        self._step()
        self._phase = "warmup" if progress.stage in ("compile", "search") else "load"
        self._outbox.send(progress, self._heartbeat())

    def _unload(self, name: str) -> None:
        from engine.loading import unload_model

        model = self._models.pop(name, None)
        freed = 0
        if model is not None:
            self._outbox.send(*model.batcher.fail_all("unloaded", f"{name} was unloaded"))
            freed = unload_model(model)
        log("unloaded", model=name, freed_bytes=freed)
        self._outbox.send(Unloaded(model=name, freed_bytes=freed))


def serve(sock: socket.socket, configure: Configure, frames: Frames, waiting: list[object]) -> NoReturn:
    """Open the device, say `Ready` or `Unusable`, and serve."""
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    reader = Reader(sock, frames, inbox)
    outbox = reader.outbox = Outbox(sock)
    for message in waiting:
        reader.deliver(message)
    threading.excepthook = end_with_a_thread
    reader.start()
    outbox.send(Heartbeat(phase="start", step=0))
    try:
        name = device.parse(configure.device)
        facts = device.examine(name)
        device.choose(name, configure.cache_dir)
        facts = open_devices(name) or facts
        self_test_s = self_test(name)
    except DeviceUnusable as error:
        refuse(sock, error.code, str(error))
    # not in its thread: two that import the models' files at once find them half there
    from engine.counting import Counter

    counting = (Counter(), reader.counts, outbox)
    threading.Thread(target=count_tokens, args=counting, name="counter", daemon=True).start()
    limit = configure.memory_limit_bytes * len(name.devices) or facts.memory_bytes
    engine = Engine(configure, name, limit, outbox)
    engine.inbox = inbox
    outbox.send(
        Ready(
            device=configure.device,
            device_name=facts.name,
            architecture=facts.architecture,
            memory_total_bytes=limit,
            self_test_s=self_test_s,
            versions=_versions(),
        )
    )
    log("ready", device=str(name), device_name=facts.name, self_test_s=round(self_test_s, 3))
    engine.supervise()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        package: version(package) for package in ("tinygrad", "llvmlite", "numpy", "tokenizers", "llguidance")
    }
