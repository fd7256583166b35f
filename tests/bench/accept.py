"""Durable `POST /tasks` beside a bare quart-trio echo of the same body, both pinned to the same core.

The peer runs what it accepts meanwhile, as it would in earnest; its stand-in engine has the client's core.
Rounds of ours and the echo alternate, and the peer drains in between.
"""

from __future__ import annotations

import os
import time
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
from tests.bench.report import Options, Result, Row, enough, median, noise, steady

CONNECTIONS = (1, 16, 64)
ECHO_START_S = 20.0
STEADIER = "what others do on the machine hardly shows here; ours runs accepted tasks meanwhile"


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
        done = 0
        while not enough(rounds, done, options):
            done += 1
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
                rounds[f"echo {connections}"].append(
                    _loaded(echo, replace(echo_spec, **shape), result, "echo")
                )
        if ours is not None:
            why = _check(ours, rounds, result) or why
    for connections in CONNECTIONS:
        result.rows += _rows(connections, rounds, why)
        per_cpu_s = result.raw["per_cpu_s"]
        pair = [median(per_cpu_s.get(f"{who} {connections}", [])) for who in ("ours", "echo")]
        name = f"accept, connections: {connections}, per CPU second of the server"
        result.rows.append(
            Row(name, pair[0], pair[1], "1/s", "bare quart-trio echo", "", "" if why else STEADIER)
        )
    result.raw["rounds"] = {name: [asdict(outcome) for outcome in every] for name, every in rounds.items()}
    return result


def _pin(ours: Peer) -> None:
    ours.server.pin(SERVER_CORE)
    for child in ours.server.process.children(recursive=True):
        child.cpu_affinity([CLIENT_CORE])


def _round(ours: Peer, shape: dict[str, Any], result: Result) -> Outcome:
    before = cpu_s([ours.server.process])
    outcome = _loaded(ours.server, ours.spec(**shape), result, "ours")
    if not ours.drain():
        raise Missing(f"the peer did not drain {outcome.total} tasks: {ours.call('GET', '/cluster/status')}")
    spent = cpu_s([ours.server.process]) - before
    result.raw.setdefault("peer_cpu_ms_per_task_run", []).append(spent * 1e3 / max(1, outcome.total))
    return outcome


def _loaded(server: Server, spec: Spec, result: Result, name: str) -> Outcome:
    """The load, and how much of one core the server's process took: over 1 would mean that it is not pinned."""
    before, began = cpu_s([server.process]), time.perf_counter()
    outcome = run_load(spec)
    spent = cpu_s([server.process]) - before
    result.raw.setdefault(f"{name}_cores_busy", []).append(round(spent / (time.perf_counter() - began), 3))
    per_cpu_s = result.raw.setdefault("per_cpu_s", {}).setdefault(f"{name} {spec.connections}", [])
    per_cpu_s.append(round(outcome.total / max(spent, 0.01), 1))
    return outcome


def _check(ours: Peer, rounds: dict[str, list[Outcome]], result: Result) -> str:
    """Whether every accepted task is in the table; says what is wrong."""
    accepted = sum(
        outcome.total for name, every in rounds.items() if name.startswith("ours") for outcome in every
    )
    unanswered = sum(outcome.unanswered for every in rounds.values() for outcome in every)
    _, page = ours.call("GET", "/tasks?limit=1")
    kept = page["total"] - 1  # the warm-up's
    cores = {tuple(os.sched_getaffinity(thread.id)) for thread in ours.server.process.threads()}
    result.raw |= {"tasks_accepted": accepted, "tasks_kept": kept, "peer_cores": sorted(cores)}
    if not accepted <= kept <= accepted + unanswered:
        return f"{accepted} tasks were accepted, {kept} are in the table"
    return "" if cores == {(SERVER_CORE,)} else f"the peer's threads were not all pinned: {sorted(cores)}"


def _rows(connections: int, rounds: dict[str, list[Outcome]], why: str) -> list[Row]:
    """Requests a second and the latencies, medians of the rounds."""

    def of(who: str, pick: str) -> float | None:
        every = steady(rounds.get(f"{who} {connections}", []))
        values = [every_.per_s if pick == "per_s" else every_.latency_ms[pick] for every_ in every]
        return median(values)

    name, beside = f"accept, connections: {connections}", "bare quart-trio echo"
    failed = sum(outcome.failed + outcome.unanswered for outcome in rounds.get(f"ours {connections}", []))
    note = why or (f"{failed} requests of ours failed" if failed else "")
    note = note or noise(*(rounds.get(f"{who} {connections}", []) for who in ("ours", "echo")))
    return [
        Row(name, of("ours", "per_s"), of("echo", "per_s"), "1/s", beside, "ratio>=0.5", note),
        Row(f"{name}, p50", of("ours", "p50"), of("echo", "p50"), "ms", beside),
        Row(f"{name}, p99", of("ours", "p99"), of("echo", "p99"), "ms", beside),
    ]
