"""How many fsync and fdatasync calls a server makes, counted by strace for a while (it slows it)."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.environments import program
from tests.bench.load import Outcome
from tests.bench.processes import Missing

ATTACH_S = 0.7
STOP_S = 10.0
COUNT = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(?:fsync|fdatasync)$", re.MULTILINE)


def per_exchange(pid: int, summary: Path, load: Callable[[], Outcome]) -> float:
    """Calls of process `pid` (all its threads) per exchange of `load`. Raises Missing."""
    strace = program("strace", "strace")
    command = [strace, "-f", "-c", "-e", "trace=fsync,fdatasync", "-o", str(summary), "-p", str(pid)]
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(ATTACH_S)
        if tracer.poll() is not None:
            raise Missing(f"strace could not attach: {tracer.stderr.read() if tracer.stderr else ''}")
        outcome = load()
    finally:
        if tracer.poll() is None:
            tracer.send_signal(signal.SIGINT)
        try:
            tracer.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.communicate()
    text = summary.read_text() if summary.exists() else ""
    return sum(int(count) for count in COUNT.findall(text)) / max(1, outcome.total)
