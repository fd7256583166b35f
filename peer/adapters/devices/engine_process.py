"""One device's engine process: started, watched, ended, started again.

The process gets one end of a socketpair, a clean environment and a process group of its own. It is killed
when it sends bytes that are not the protocol or gives no sign of life for longer than its phase allows.
Between deaths there is a growing pause, after too many a quarantine; a device that calls itself unusable is
not tried again until someone asks for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog
import trio

from engine.protocol import (
    SOCKET_ENV,
    VERSION_MAX,
    VERSION_MIN,
    Configure,
    Frames,
    Heartbeat,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    ProtocolError,
    Ready,
    Run,
    Shutdown,
    Started,
    ToEngine,
    TokenCount,
    Unusable,
    encode,
)
from peer import limits
from peer.adapters.processes.child import exited
from peer.adapters.processes.child_log import log_lines
from peer.adapters.processes.supervision import after_death
from peer.engines import Device, EngineEvents
from peer.ports import Clock
from peer.state.worker import EngineState
from peer.version import VERSION

RECV_BYTES: Final = 256 * 1024
WATCH_S: Final = 0.25  # how often the time since the last sign of life is compared
REAP_S_MAX: Final = 5.0  # after SIGKILL; a process stuck in the kernel is left behind and said so
OUTPUT_S_MAX: Final = 0.3  # for the last lines of a process that is gone
_PASSED_ON = frozenset(
    {"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "XDG_RUNTIME_DIR", "VIRTUAL_ENV"}
)
_PASSED_ON_PREFIXES = (
    *("LC_", "ROCM_", "HSA_", "HIP_", "BITINGLIP_ENGINE_", "TINYGRAD_", "COVERAGE_"),
    *("CUDA_", "NVRTC_", "NVJITLINK_", "OPENCL_", "OCL_ICD_"),  # where other backends' libraries are
)
_REPOSITORY = Path(__file__).resolve().parents[3]

log = structlog.get_logger("engine")


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor allows; tests shorten it."""

    stall_s: Mapping[str, float] = msgspec.field(default_factory=lambda: dict(limits.STALL_S))
    stop_s_max: float = limits.ENGINE_STOP_S_MAX
    backoff_s: tuple[float, ...] = limits.RESTART_BACKOFF_S
    deaths_max: int = limits.DEATHS_MAX
    deaths_window_s: float = limits.DEATHS_WINDOW_S
    quarantine_s: float = limits.QUARANTINE_S
    outbox_max: int = limits.ENGINE_OUTBOX_MAX


class _End(msgspec.Struct, frozen=True):
    kind: Literal["died", "unusable", "restart", "stop"]
    reason: str


def engine_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What an engine inherits: paths, locale and the driver's own variables. No secrets of the peer's."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    environment["PYTHONUNBUFFERED"] = "1"
    if (_REPOSITORY / "pyproject.toml").exists():  # a checkout: the engine is found also if not installed
        environment["PYTHONPATH"] = str(_REPOSITORY)
    return environment | dict(extra or {})


class EngineProcess:
    """Implements peer.engines.EngineHandle."""

    def __init__(
        self,
        worker_id: str,
        device: Device,
        clock: Clock,
        *,
        slots_max: int = 8,
        memory_limit_bytes: int = 0,
        cache_dir: str = "",
        beam: int = 0,
        fake: Mapping[str, Any] | None = None,
        allowed: EngineLimits | None = None,
        command: Sequence[str] = (sys.executable, "-P", "-m", "engine"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._worker_id = worker_id
        self._device = device
        self._clock = clock
        self._allowed = allowed or EngineLimits()
        self._command = tuple(command)
        self._environment = environment
        self._cache_dir = cache_dir
        self._configure = Configure(
            worker_id=worker_id,
            device=device.device,
            slots_max=slots_max,
            memory_limit_bytes=memory_limit_bytes,
            cache_dir=cache_dir,
            beam=beam,
            fake=dict(fake or {}) if device.stand_in else {},
        )
        self._log = log.bind(worker_id=worker_id)
        self._stopping = False
        self._asked = trio.Event()  # by restart() or stop(), while no process runs
        self._died_at: list[float] = []
        self._deaths = 0
        self._state = EngineState.STARTING
        self._away_since: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._begin_life()

    def _begin_life(self) -> None:
        self._end: _End | None = None
        self._ended = trio.Event()
        self._greeted = False
        self._ready = False
        self._out = bytearray()
        self._out_frames = 0
        self._out_wake = trio.Event()
        self._phase = "start"
        self._expected = ""  # a phase that an order sent by us will bring
        self._heard_at = trio.current_time() if self._process else 0.0

    # ------------------------------------------------------------ orders

    def send(self, message: ToEngine) -> bool:
        """Queue a message. False: not ready, or the engine does not read and its outbox is full."""
        if not self._ready or self._out_frames >= self._allowed.outbox_max:
            return False
        kind = type(message)
        if kind is Run:
            self._expected = self._expected or "prefill"
        elif kind is Load:
            self._expected = "load"
        self._queue(message)
        return True

    def kill(self, reason: str) -> None:
        """End the process now; counts as a death."""
        self._finish("died", reason)

    def restart(self) -> None:
        """End it gently and start it again at once; also ends a quarantine or a pause."""
        self._died_at.clear()
        self._away_since = self._clock.now()
        self._asked.set()
        self._finish("restart", "restarted on request")

    def stop(self) -> None:
        """End it gently; `run` returns."""
        self._stopping = True
        self._asked.set()
        self._finish("stop", "the peer stops")

    # ------------------------------------------------------------ the supervisor

    async def run(self, events: EngineEvents) -> None:
        """Keep an engine running until `stop`."""
        self._events = events
        while not self._stopping:
            self._asked = trio.Event()
            if self._state is EngineState.ERROR:
                self._tell(EngineState.RESTARTING, "it is tried again")
            if self._device.problem:
                end = _End("unusable", self._device.problem)
            else:
                end = await self._live()
            if end.kind == "died":
                await self._recover(end.reason)
            elif end.kind == "unusable":
                self._log.error("device_unusable", reason=end.reason)
                self._tell(EngineState.ERROR, end.reason)
                await self._asked.wait()

    async def _recover(self, reason: str) -> None:
        """After a death: a pause or a quarantine, which restart() and stop() cut short."""
        now = self._clock.now()
        verdict = after_death(
            self._died_at,
            now,
            backoff_s=self._allowed.backoff_s,
            deaths_max=self._allowed.deaths_max,
            window_s=self._allowed.deaths_window_s,
            quarantine_s=self._allowed.quarantine_s,
        )
        self._died_at = [at for at in self._died_at if now - at <= self._allowed.deaths_window_s]
        if verdict.quarantined:
            text = (
                f"quarantined for {verdict.wait_s:.0f} s after {verdict.deaths_recent} deaths, the last one: "
                f"{reason}. See the peer's log; a restart of this worker ends the quarantine"
            )
            self._died_at.clear()
            self._log.error("engine_quarantined", reason=reason, wait_s=verdict.wait_s)
            self._tell(EngineState.ERROR, text)
        else:
            self._log.error("engine_died", reason=reason, restart_in_s=verdict.wait_s)
        with trio.move_on_after(verdict.wait_s):
            await self._asked.wait()

    def _count_death(self, reason: str) -> None:
        self._deaths += 1
        self._died_at.append(self._clock.now())
        self._tell(EngineState.RESTARTING, f"its engine died: {reason}")

    def _tell(self, state: EngineState, message: str) -> None:
        self._state = state
        self._events.changed(state, message, self._deaths)

    def _finish(self, kind: Literal["died", "unusable", "restart", "stop"], reason: str) -> None:
        """The first cause wins. From here on nothing is sent or heard, and what it held is lost."""
        if self._process is None or self._end is not None:
            return
        self._end = _End(kind, reason)
        self._ready = False
        if self._away_since is None:
            self._away_since = self._clock.now()
        if kind in ("restart", "stop"):
            self._queue(Shutdown())
        code = {"restart": "engine_restarted", "stop": "peer_stopping"}.get(kind, "engine_died")
        self._events.gone(code, reason)
        if kind == "died":
            self._count_death(reason)
        elif kind != "unusable":
            self._tell(EngineState.RESTARTING, reason)
        self._ended.set()

    # ------------------------------------------------------------ one life

    async def _live(self) -> _End:
        """Start a process and serve it to its end. No process is left when this returns."""
        if self._away_since is None:
            self._away_since = self._clock.now()
        try:
            process, sock, output = self._spawn()
        except OSError as error:
            reason = f"its process cannot be started: {error}"
            self._count_death(reason)
            return _End("died", reason)
        self._process = process
        self._begin_life()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        end = _End("stop", "cancelled")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(log_lines, output, self._log.bind(pid=process.pid))
                async with trio.open_nursery() as inner:
                    for service in (self._read, self._write):
                        inner.start_soon(service, stream)
                    inner.start_soon(self._watch)
                    self._queue(Hello(product=f"bitinglip-peer {VERSION}"))
                    self._queue(self._configure)
                    await self._ended.wait()
                    assert self._end is not None
                    end = self._end
                    if end.kind in ("restart", "stop", "unusable"):
                        with trio.move_on_after(self._allowed.stop_s_max):
                            await exited(process)
                    inner.cancel_scope.cancel()
                await self._put_down(process)
                nursery.cancel_scope.deadline = trio.current_time() + OUTPUT_S_MAX
        finally:
            with trio.CancelScope(shield=True):
                await self._put_down(process)
                await stream.aclose()
            self._process = None
        return end

    def _spawn(self) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
        """In this very thread: the engine asks the kernel to kill it when the *thread* that made it ends."""
        if self._cache_dir:
            os.makedirs(self._cache_dir, mode=0o700, exist_ok=True)
        ours, theirs = socket.socketpair()
        output, output_theirs = os.pipe()
        try:
            environment = engine_environment(self._environment) | {SOCKET_ENV: str(theirs.fileno())}
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output_theirs,
                stderr=output_theirs,
                pass_fds=(theirs.fileno(),),
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        except OSError:
            ours.close()
            os.close(output)
            raise
        finally:
            theirs.close()
            os.close(output_theirs)
        ours.setblocking(False)
        self._log.info("engine_started", pid=process.pid, device=self._device.device)
        return process, ours, output

    async def _put_down(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the whole group and collect the process."""
        if process.returncode is not None:
            return
        _kill_group(process.pid)
        with trio.CancelScope(shield=True), trio.move_on_after(REAP_S_MAX):
            await exited(process)
        if process.poll() is None:
            self._log.error("engine_cannot_be_killed", pid=process.pid, waited_s=REAP_S_MAX)

    # ------------------------------------------------------------ frames

    def _queue(self, message: ToEngine) -> None:
        self._out += encode(message)
        self._out_frames += 1
        self._out_wake.set()

    async def _write(self, stream: trio.SocketStream) -> None:
        """All that has gathered since the last send goes out in one."""
        while True:
            await self._out_wake.wait()
            self._out_wake = trio.Event()
            data, count = self._out, self._out_frames
            self._out = bytearray()
            try:
                await stream.send_all(data)
            except trio.BrokenResourceError:
                return  # the reader sees the end and says why
            self._out_frames -= count

    async def _read(self, stream: trio.SocketStream) -> None:
        frames = Frames("peer")
        while True:
            try:
                data = await stream.receive_some(RECV_BYTES)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                await self._explain_exit()
                return
            if self._end is not None:
                continue
            try:
                batch = frames.feed(bytes(data))
            except ProtocolError as error:
                self._finish("died", f"it sent bytes that are not the protocol: {error}")
                continue
            if batch:
                self._take(batch)

    def _take(self, batch: list[Any]) -> None:
        for message in batch:
            kind = type(message)
            if kind is not TokenCount:  # another thread of the engine answers those
                self._heard_at = trio.current_time()
            if kind is Heartbeat:
                self._phase = message.phase
                if message.phase != "idle":
                    self._expected = ""
            elif kind is LoadProgress:
                self._phase = "warmup" if message.stage in ("compile", "search") else "load"
            elif kind is Started:
                self._expected = ""
            elif kind in (Loaded, LoadFailed):
                self._expected, self._phase = "", "idle"
        if self._ready:
            self._events.messages(batch)
            return
        for at, message in enumerate(batch):
            self._get_ready(message)
            if self._end is not None:
                return
            if self._ready:
                if batch[at + 1 :]:
                    self._events.messages(batch[at + 1 :])
                return

    def _get_ready(self, message: object) -> None:
        """What may come before `Ready`, in the protocol's order."""
        match message:
            case Hello():
                if message.version_max < VERSION_MIN or message.version_min > VERSION_MAX:
                    text = (
                        f"the engine speaks protocol {message.version_min} to {message.version_max}, "
                        f"this peer {VERSION_MIN} to {VERSION_MAX}: install the same bitinglip for both"
                    )
                    self._finish("unusable", text)
                self._greeted = True
            case Unusable():
                self._finish("unusable", message.message)
            case Ready() if self._greeted:
                assert self._process is not None
                assert self._away_since is not None
                downtime_s = self._clock.now() - self._away_since
                self._away_since = None
                self._ready = True
                self._state = EngineState.READY
                self._log.info(
                    "engine_ready", device_name=message.device_name, downtime_s=round(downtime_s, 3)
                )
                if message.stand_in:
                    self._log.warning("stand_in_engine", note="no model and no GPU: for tests and rehearsals")
                self._events.ready(message, self._process.pid, downtime_s)
            case Heartbeat():
                pass
            case _:
                self._finish("died", f"it sent {type(message).__name__} before it was ready")

    # ------------------------------------------------------------ signs of life

    def _silence_s_max(self) -> float:
        """Of the phase it is in, or of the longer one that our last order brings."""
        stall_s = self._allowed.stall_s
        phase = self._phase if self._ready else "start"
        return max(stall_s[phase], stall_s[self._expected] if self._expected else 0.0)

    async def _watch(self) -> None:
        pause_s = min(WATCH_S, min(self._allowed.stall_s.values()) / 4)
        due = trio.current_time() + pause_s
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            self._look(now, now - due)
            due = now + pause_s

    def _look(self, now: float, late_s: float) -> None:
        """Whether it has been silent for too long. `late_s`: how long this peer itself was held up (stopped, starved):
        it heard nothing then, whatever the engine said."""
        if late_s > WATCH_S:
            self._heard_at += late_s
        silent_s = now - self._heard_at
        if silent_s > self._silence_s_max():
            phase = self._phase if self._ready else "start"
            self._finish("died", f"it gave no sign of life for {silent_s:.1f} s in phase {phase}")

    async def _explain_exit(self) -> None:
        """The socket is closed: say how the process ended."""
        process = self._process
        assert process is not None
        with trio.move_on_after(1.0):
            await exited(process)
        status = process.poll()
        if status is None:
            self._finish("died", "it closed its connection")
        elif status < 0:
            self._finish("died", f"it was killed by {signal.Signals(-status).name}")
        else:
            self._finish("died", f"it exited with status {status}")


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
