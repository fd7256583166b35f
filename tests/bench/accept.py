"""Durable `POST /tasks` beside a bare quart-trio echo of the same body, both pinned to the same core.

The peer runs what it accepts meanwhile, as it would in earnest; its stand-in engine has the client's core.
Rounds of ours and the echo alternate, and the peer drains in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

from tests.bench.load import Outcome, Spec, http_request
from tests.bench.peer import TASK, Peer, peer
from tests.bench.processes import (
    CLIENT_CORE,
    PYTHON,
    SERVER_CORE,
    Missing,
    Server,
    cpu_s,
    free_port,
    run_load,
    started,
    temporary,
)
from tests.bench.report import Options, Result, Row, median

CONNECTIONS = (1, 16, 64)
ECHO_START_S = 20.0


@contextmanager
def echo_app() -> Iterator[tuple[Server, Spec]]:
    """The bare echo app and the load for it. Raises Missing."""
    with temporary() as home:
        port = free_port()
        command = [PYTHON, "-m", "tests.bench.references.echo_app", str(port)]
        with started(command, home / "log") as server:
            server.wait_port(port, ECHO_START_S)
            yield server, Spec(port=port, request=http_request("POST", "/echo", TASK))


def measure(options: Options) -> Result:
    result = Result()
    rounds: dict[str, list[Outcome]] = defaultdict(list)
    with ExitStack() as stack:
        echo, echo_spec = stack.enter_context(echo_app())
        echo.pin(SERVER_CORE)
        ours, why = None, ""
        try:
            ours = stack.enter_context(peer())
            ours.warm_up()
            _pin(ours)
        except Missing as error:
            ours, why = None, f"ours: {error}"
        for _ in range(options.rounds):
            for connections in CONNECTIONS:
                shape: dict[str, Any] = {
                    "connections": connections,
                    "seconds": options.seconds,
                    "core": CLIENT_CORE,
                }
                if ours is not None:
                    try:
                        rounds[f"ours {connections}"].append(_round(ours, shape, result))
                    except Missing as error:
                        ours, why = None, f"ours: {error}"
                rounds[f"echo {connections}"].append(run_load(replace(echo_spec, **shape)))
    for connections in CONNECTIONS:
        result.rows += _rows(connections, rounds, why)
    result.raw["rounds"] = {name: [asdict(outcome) for outcome in every] for name, every in rounds.items()}
    return result


def _pin(ours: Peer) -> None:
    ours.server.pin(SERVER_CORE)
    for child in ours.server.process.children(recursive=True):
        child.cpu_affinity([CLIENT_CORE])


def _round(ours: Peer, shape: dict[str, Any], result: Result) -> Outcome:
    before = cpu_s([ours.server.process])
    outcome = run_load(ours.spec(**shape))
    if not ours.drain():
        raise Missing(f"the peer did not drain {outcome.total} tasks: {ours.call('GET', '/cluster/status')}")
    spent = cpu_s([ours.server.process]) - before
    result.raw.setdefault("peer_cpu_ms_per_task_run", []).append(spent * 1e3 / max(1, outcome.total))
    return outcome


def _rows(connections: int, rounds: dict[str, list[Outcome]], why: str) -> list[Row]:
    """Requests a second and the latencies, medians of the rounds."""

    def of(who: str, pick: str) -> float | None:
        every = rounds.get(f"{who} {connections}", [])
        values = [every_.per_s if pick == "per_s" else every_.latency_ms[pick] for every_ in every]
        return median(values)

    name, beside = f"accept, connections: {connections}", "bare quart-trio echo"
    failed = sum(outcome.failed + outcome.unanswered for outcome in rounds.get(f"ours {connections}", []))
    note = why or (f"{failed} requests of ours failed" if failed else "")
    return [
        Row(name, of("ours", "per_s"), of("echo", "per_s"), "1/s", beside, "ratio>=0.5", note),
        Row(f"{name}, p50", of("ours", "p50"), of("echo", "p50"), "ms", beside),
        Row(f"{name}, p99", of("ours", "p99"), of("echo", "p99"), "ms", beside),
    ]
