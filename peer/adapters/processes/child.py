"""A program of others as a child of the peer: started, its output logged, started again, stopped.

It gets a clean environment, a process group of its own (a terminal's Ctrl-C and hang-up are not for it), and dies with
the peer, however that ends. Between two lives there is a growing pause; it is never given up, since what it does is
needed and the cause may go: a port that is taken, a disk that is full.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import structlog
import trio

from peer import limits
from peer.adapters.processes.child_log import log_lines
from peer.adapters.processes.supervision import after_death

STOP_S_MAX: Final = 5.0  # from the polite signal to SIGKILL
REAP_S_MAX: Final = 5.0  # after SIGKILL; a process stuck in the kernel is left behind and said so
OUTPUT_S_MAX: Final = 0.3  # for the last lines of a process that is gone
STEADY_S: Final = 60.0  # a death after so long is the first again
LINES_PER_S_MAX: Final = 20  # of its output: strangers at its port make it write, and must not fill the disk
_PASSED_ON: Final = frozenset({"PATH", "HOME", "LANG", "TZ", "TMPDIR"})
_LAUNCHER: Final = Path(__file__).with_name("child_start.py")

Log = structlog.typing.FilteringBoundLogger


class Say(Protocol):
    """Writes one line of the child's into the peer's log."""

    def __call__(self, line: str, log: Log, /) -> None: ...


class Child:
    """`say` logs a line. `prepare` is called before each life (OSError: it cannot be started now); `judge` hears the
    status of one that ended and was not asked to, and may raise to end `run`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        *,
        say: Say,
        stop_signal: signal.Signals = signal.SIGTERM,
        stop_s_max: float = STOP_S_MAX,
        backoff_s: Sequence[float] = limits.RESTART_BACKOFF_S,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] = lambda: None,
        judge: Callable[[int], None] = lambda status: None,
    ) -> None:
        self.name = name
        self.pid: int | None = None
        """While it runs."""
        self.lives = 0
        self.problem = ""
        """How its last life ended or why there was none, for people; "" if none has ended."""
        self._command = tuple(command)
        self._folder = folder
        self._say = say
        self._stop_signal = stop_signal
        self._stop_s_max = stop_s_max
        self._backoff_s = tuple(backoff_s)
        self._environment = dict(environment or {})
        self._prepare = prepare
        self._judge = judge
        self._died_at: list[float] = []
        self._log = structlog.get_logger(name)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep it running until cancelled; then stop it. Started when its first process is.

        Raises what `judge` does, and OSError if it cannot be started at all the first time.
        """
        while True:
            try:
                process, output = self._spawn()
            except OSError as error:
                if not self.lives:
                    raise
                self.problem = f"{self.name} cannot be started: {error}"
            else:
                if self.lives == 1:
                    task_status.started()
                await self._live(process, output)
                self.problem = f"{self.name} ended with {_how(process.returncode)}"
                self._judge(process.returncode)
            await self._pause()

    async def _pause(self) -> None:
        now = trio.current_time()
        self._died_at = [*(at for at in self._died_at if now - at <= STEADY_S), now]
        verdict = after_death(
            self._died_at,
            now,
            backoff_s=self._backoff_s,
            deaths_max=sys.maxsize,
            window_s=STEADY_S,
            quarantine_s=0.0,
        )
        self._log.error("child_died", child=self.name, why=self.problem, restart_in_s=verdict.wait_s)
        await trio.sleep(verdict.wait_s)

    def _spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        """In this very thread: the kernel ends the child when the *thread* that made it ends."""
        environment = {
            name: value for name, value in os.environ.items() if name in _PASSED_ON
        } | self._environment
        self._prepare()
        output, output_theirs = os.pipe()
        try:
            process = subprocess.Popen(
                launched(self._command),
                stdin=subprocess.DEVNULL,
                stdout=output_theirs,
                stderr=output_theirs,
                env=environment,
                cwd=self._folder,
                umask=0o077,
                start_new_session=True,
            )
        except OSError:
            os.close(output)
            raise
        finally:
            os.close(output_theirs)
        self.lives += 1
        self.pid = process.pid
        self._log.info("child_started", child=self.name, pid=process.pid)
        return process, output

    async def _live(self, process: subprocess.Popen[bytes], output: int) -> None:
        """To its end. No process is left when this returns."""
        reading = trio.CancelScope(shield=True)  # a child that cannot write its log dies of that as it stops

        async def read() -> None:
            with reading:
                await log_lines(output, self._log.bind(pid=process.pid), self._say, per_s_max=LINES_PER_S_MAX)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            try:
                await exited(process)
            finally:
                with trio.CancelScope(shield=True):
                    await self._stop(process)
                self.pid = None
                reading.deadline = trio.current_time() + OUTPUT_S_MAX

    async def _stop(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.send_signal(self._stop_signal)
            with trio.move_on_after(self._stop_s_max):
                await exited(process)
        if process.poll() is None:
            self._log.warning("child_killed", child=self.name, waited_s=self._stop_s_max)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with trio.move_on_after(REAP_S_MAX):
                await exited(process)
        if process.poll() is None:
            self._log.error("child_cannot_be_killed", child=self.name, pid=process.pid)


def launched(command: Sequence[str]) -> list[str]:
    """The command as one that ends with this process: with the very thread that starts it."""
    return [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), *command]


def _how(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


async def exited(process: subprocess.Popen[bytes]) -> None:
    """Wait for the process without a thread, and collect its status."""
    if process.poll() is not None:
        return
    descriptor = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
    process.poll()
