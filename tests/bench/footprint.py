"""A peer without its engine: memory after serving, time from spawn to ready and to its worker."""

from __future__ import annotations

from typing import Any

from tests.bench.accept import echo_app
from tests.bench.peer import peer, wait_ready
from tests.bench.processes import Missing, memory_mib, run_load
from tests.bench.report import Options, Result, Row, median

CONNECTIONS = 16
SERVED_S = 2.0
BESIDE = "bare quart-trio echo"


def measure(options: Options) -> Result:
    ours: list[dict[str, Any]] = []
    echo: list[dict[str, Any]] = []
    note = ""
    for _ in range(options.rounds):
        with echo_app() as (server, spec):
            ready_s = wait_ready(server, spec.port)
            run_load(spec)
            echo.append({"ready_s": ready_s, **memory_mib(server.process)})
        try:
            ours.append(_ours())
        except Missing as error:
            note = f"ours: {error}"

    def pair(pick: str) -> tuple[float | None, float | None]:
        return median([one[pick] for one in ours]), median([one[pick] for one in echo if pick in one])

    rows = [
        Row("peer's memory without its engine, RSS", *pair("rss"), "MiB", BESIDE, "ours<=80", note),
        Row("peer's memory without its engine, PSS", *pair("pss"), "MiB", BESIDE),
        Row("spawn to /readyz", *pair("ready_s"), "s", BESIDE, "ours<=1.5", note),
        Row("spawn to its first worker online", *pair("worker_s"), "s"),
    ]
    return Result(rows, {"ours": ours, "echo": echo})


def _ours() -> dict[str, Any]:
    with peer() as running:
        running.warm_up()
        idle = memory_mib(running.server.process)
        outcome = run_load(
            running.spec("/tasks?wait=30", connections=CONNECTIONS, seconds=SERVED_S, marker='"completed"')
        )
        served = memory_mib(running.server.process)
        engines = [memory_mib(child) for child in running.server.process.children(recursive=True)]
        return {
            "ready_s": running.ready_s,
            "worker_s": running.worker_s,
            **served,
            "before_serving": idle,
            "tasks_served": outcome.total,
            "engines": engines,
        }
