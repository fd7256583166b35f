"""Nobody is lost who is there: a cluster with light load, on cores that others keep busy."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.cluster.bed import bed, say
from tests.bench.processes import CORES, STOP_S, Meter
from tests.bench.report import Options, Result, Row

SOAK_S, QUICK_SOAK_S = 600.0, 60.0
BUSY_PER_CORE = 2
SEED = 1
TOKENS_PER_S = 20.0
OFFLINE = ("offline", "error")


@contextmanager
def busy_cores() -> Iterator[int]:
    """So many endless loops at the usual priority."""
    started = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(BUSY_PER_CORE * len(CORES))
    ]
    try:
        yield len(started)
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait(STOP_S)


def measure(options: Options) -> Result:
    seconds = QUICK_SOAK_S if options.quick else SOAK_S
    with bed(TOKENS_PER_S) as (made, client):
        client.load_everywhere()
        led, seen = len(made.leaderships()), len(client.events("worker_status_changed,task_requeued"))
        made.begin_traffic(SEED)
        began = time.monotonic()
        with Meter() as meter, busy_cores() as loops:
            time.sleep(seconds)
        ended = time.monotonic()
        gap_s = made.history.gap_s(began, ended)
        made.end_traffic()
        made.settle()
        tasks, _ = made.check()
        events = client.events("worker_status_changed,task_requeued")[seen:]
        failovers = len(made.leaderships()) - led
    lost = [each for each in events if each["data"].get("status") in OFFLINE]
    requeued = [each for each in events if each["event"] == "task_requeued"]
    say(f"{tasks} tasks, longest time without an acknowledged one {gap_s:.2f} s")
    name = f"soak of {seconds:.0f} s, {loops} busy loops on {len(CORES)} cores"
    rows = [
        Row(f"{name}: workers declared lost", float(len(lost)), None, "", "", "ours<=0"),
        Row(f"{name}: failovers", float(failovers), None, "", "", "ours<=0"),
        Row(f"{name}: tasks queued again", float(len(requeued)), None, "", "", "ours<=0", f"of {tasks}"),
        Row(f"{name}: longest time without an acknowledged task", gap_s, None, "s"),
    ]
    raw = {"lost": lost, "requeued": requeued, "failovers": failovers, "tasks": tasks, "gap_s": gap_s}
    return Result(rows, raw | {"foreign_share_and_loops": meter.foreign})
