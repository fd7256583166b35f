"""Processes that the benchmark starts: always ended by pid, also on failure; their time and memory.

Resource handling: everything started hangs below this process (it is a child subreaper, so that daemons of a
reference come back to it) and `end_all` ends what is left. Temporary folders go with their context.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil

from tests.bench.load import Outcome, Spec

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = str(REPOSITORY / ".venv" / "bin" / "python")
STOP_S = 5.0
LOG_CHARS = 1500
PR_SET_CHILD_SUBREAPER = 36

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE = CORES[0]
CLIENT_CORE = CORES[1 % len(CORES)]


class Missing(Exception):
    """A reference (or the product) cannot be had or does not work here; the text says why."""


def adopt_orphans() -> None:
    """Processes whose parent ends become children of this one instead of init's."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end(processes: Sequence[psutil.Process]) -> None:
    """Terminate, wait, kill: by pid."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=STOP_S)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=STOP_S)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def end_all() -> None:
    """Whatever is still below this process."""
    end(psutil.Process().children(recursive=True))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def temporary() -> Iterator[Path]:
    """A folder on the same file system as the repository (fsync is a real one), removed afterwards."""
    base = REPOSITORY / ".bench" / "tmp"
    base.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Server:
    """A started process with all its children. Its output is in a file; `log` gives the end of it."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        cwd: Path = REPOSITORY,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        self.began_s = time.perf_counter()
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                list(command),
                cwd=cwd,
                env=os.environ | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.process = psutil.Process(self.popen.pid)

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_CHARS:] if self._log.exists() else ""

    def tree(self) -> list[psutil.Process]:
        """The process and everything below it."""
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def check(self) -> None:
        if self.popen.poll() is not None:
            raise Missing(f"ended with status {self.popen.returncode}: {self.log()}")

    def wait_port(self, port: int, timeout_s: float) -> None:
        """Until something listens. Raises Missing."""
        deadline = time.perf_counter() + timeout_s
        while time.perf_counter() < deadline:
            self.check()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise Missing(f"nothing listened on port {port} within {timeout_s:.0f} s: {self.log()}")

    def pin(self, core: int | None) -> None:
        """The process itself, not its children, with all its threads; None frees it."""
        cores = CORES if core is None else [core]
        for thread in self.process.threads():
            os.sched_setaffinity(thread.id, cores)

    def stop(self) -> None:
        end(self.tree())
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


@contextmanager
def started(
    command: Sequence[str],
    log: Path,
    cwd: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    server = Server(command, log, cwd, environment)
    try:
        yield server
    finally:
        server.stop()


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """User and system time of these processes, ended and waited-for children included."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


class Meter:
    """`with Meter() as meter`: afterwards `meter.foreign` is the share of the cores that others took."""

    foreign = 0.0

    def __enter__(self) -> Meter:
        self._began = time.perf_counter(), _busy_s(), _own_s()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = self._began
        taken = (_busy_s() - busy) - (_own_s() - own)
        self.foreign = round(max(0.0, taken) / (len(CORES) * (time.perf_counter() - wall)), 3)


def _busy_s() -> float:
    """Of all cores and processes since boot, what the hypervisor took away included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    me = psutil.Process()
    return cpu_s([me, *me.children(recursive=True)])


def memory_mib(process: psutil.Process) -> dict[str, float]:
    """RSS and PSS (shared pages divided by how many share them)."""
    full = process.memory_full_info()
    return {"rss": round(full.rss / 2**20, 1), "pss": round(full.pss / 2**20, 1)}


def run_load(spec: Spec, namespace_of: int | None = None) -> Outcome:
    """In a process of its own, in the network namespace of a process if one is named.

    Raises Missing when the server went away or did nothing.
    """
    limit_s = spec.warmup_s + spec.seconds + spec.grace_s + 30.0
    enter = ["nsenter", f"--net=/proc/{namespace_of}/ns/net", "--"] if namespace_of else []
    with Meter() as meter:
        done = subprocess.run(
            [*enter, sys.executable, "-m", "tests.bench.load"],
            cwd=REPOSITORY,
            input=json.dumps(asdict(spec)),
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
    if done.returncode:
        raise Missing(f"the load client failed: {done.stderr[-LOG_CHARS:]}")
    outcome = Outcome(**json.loads(done.stdout), foreign=meter.foreign)
    if not outcome.exchanges:
        raise Missing(f"no exchange ended well in {spec.seconds} s: {outcome.failed} failed, {outcome.bad}")
    return outcome


def run_script(
    command: Sequence[str], cwd: Path, limit_s: float, environment: Mapping[str, str] | None = None
) -> Outcome:
    """A reference's own client; it prints an `Outcome`'s fields as JSON. Raises Missing."""
    variables = os.environ | dict(environment or {})
    try:
        with Meter() as meter:
            done = subprocess.run(
                list(command), cwd=cwd, env=variables, capture_output=True, text=True, timeout=limit_s
            )
    except subprocess.TimeoutExpired:
        raise Missing(f"{command[1]} did not end within {limit_s:.0f} s") from None
    if done.returncode:
        raise Missing(f"{command[1]} failed: {done.stderr[-LOG_CHARS:]}")
    return Outcome(**json.loads(done.stdout.strip().splitlines()[-1]), foreign=meter.foreign)
