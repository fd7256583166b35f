"""Peers that a command starts for itself, and that end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peer.cli.common import printable
from peer.cli.exits import CliError, Exit

READY_S_MAX = 60.0
STOP_S_MAX = 45.0
LOG_LINES = 25


def clean_environment() -> dict[str, str]:
    """This one without what is meant for another peer."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BITINGLIP_")}


@contextmanager
def own_peer(directory: Path, log: Path, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A peer process, `bitinglip up` with these arguments, which ends with the block."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "peer.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "peer", "up", "--data-dir", str(directory), *arguments]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=clean_environment(),
            start_new_session=True,
        )
    try:
        yield process
        if process.poll() is not None:
            return  # before its time: who uses it knows
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_S_MAX)
        if code:
            raise with_log(CliError(f"the peer ended with {code}", Exit.FAILED), log)
    except subprocess.TimeoutExpired:
        raise CliError(f"the peer did not stop within {STOP_S_MAX:.0f} s", Exit.FAILED) from None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever happened, nothing is left behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_ready(process: subprocess.Popen[bytes], directory: Path, log: Path) -> str:
    """Its URL, once it answers requests. Raises CliError with the end of its log."""
    import httpx

    from peer.cli.client import running

    end = time.monotonic() + READY_S_MAX
    while time.monotonic() < end:
        if process.poll() is not None:
            raise with_log(CliError(f"the peer ended with {process.returncode}", Exit.FAILED), log)
        url, pid = running(directory)
        if url is not None and pid == process.pid:
            try:
                if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                    return url
            except httpx.TransportError:
                pass
        time.sleep(0.05)
    raise with_log(CliError(f"the peer is not ready after {READY_S_MAX:.0f} s", Exit.FAILED), log)


def with_log(error: CliError, log: Path) -> CliError:
    """The error with the end of the peer's log."""
    try:
        last = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        last = []
    message = "\n".join([error.message, *(f"  | {printable(line)}" for line in last)])
    return CliError(message, error.code, error.hint or f"all of its log: {log}")
