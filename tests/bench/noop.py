"""No-op tasks from submission to result, 64 clients, beside Celery, NATS JetStream and Ray Serve.

Rounds alternate between all that are up. Ray comes after the others, because its daemons are never idle. CPU
is that of the servers, workers and engine included, the load client excluded. Clients of Celery and NATS are
their own Python libraries, which is what their users have; ours and Ray's is HTTP.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from tests.bench import fsyncs
from tests.bench.contenders import CLIENTS, RAY_ONGOING, Celery, Contender, Nats, Ours, Ray
from tests.bench.load import Outcome
from tests.bench.processes import Missing, cpu_s, run_load, temporary
from tests.bench.report import Options, Result, Row, enough, median, noise, steady

FSYNC_S = 2.0
FSYNC_CONNECTIONS = (1, CLIENTS)


class Race:
    """Contenders and what their rounds gave."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rounds: dict[str, list[Outcome]] = defaultdict(list)
        self.cpu_ms: dict[str, list[float]] = defaultdict(list)
        self.missing: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.extra: dict[str, Any] = {}

    def enter(self, stack: ExitStack, contender: Contender) -> list[Contender]:
        """It, started; or nothing, and why."""
        try:
            started = stack.enter_context(contender)
        except Missing as error:
            self.missing[contender.name] = str(error)
            return []
        finally:
            self.versions |= contender.versions
        return [started]

    def run(self, contenders: list[Contender], rounds: int = 0) -> None:
        """Rounds in turn, so that all see the same noise."""
        done = 0
        here = [contender.name for contender in contenders]
        while not (done >= rounds if rounds else enough(self._since(here), done, self.options)):
            done += 1
            for contender in contenders:
                if contender.name not in self.missing:
                    self._round(contender)

    def _since(self, names: list[str]) -> dict[str, list[Outcome]]:
        return {name: self.rounds[name] for name in names if name not in self.missing}

    def _round(self, contender: Contender) -> None:
        processes = contender.processes()
        before = cpu_s(processes)
        try:
            outcome = contender.round(self.options.seconds)
        except Missing as error:
            self.missing[contender.name] = f"{error}\n{contender.died()}".strip()
            return
        self.cpu_ms[contender.name].append((cpu_s(processes) - before) * 1e3 / max(1, outcome.total))
        self.rounds[contender.name].append(outcome)

    def per_s(self, name: str) -> float | None:
        return median([outcome.per_s for outcome in steady(self.rounds[name])])


def measure(options: Options) -> Result:
    race = Race(options)
    default, raised = Ray(0), Ray(RAY_ONGOING)
    fsync_rows: list[Row] = []
    with ExitStack() as stack:
        ours = race.enter(stack, Ours())
        with ExitStack() as first:
            celery = race.enter(first, Celery())
            race.run([*ours, *celery, *race.enter(first, Nats())])
            fsync_rows = _fsyncs(ours, celery)
            for contender in celery:
                assert isinstance(contender, Celery)
                race.extra["celery_tried"] = contender.tried
        with ExitStack() as second:
            race.run([*ours, *race.enter(second, raised)])
        with ExitStack() as third:
            race.run(race.enter(third, default), rounds=1)
    rows = [
        _row(race, "Celery", "ratio>=1.5", f"best of {race.extra.get('celery_tried', {})}"),
        _row(race, raised.name, "ratio>=2", "keeps nothing durably"),
        _row(
            race, default.name, "", "Serve's default of 5 collapses under 64 clients: judged by the row above"
        ),
        _row(race, "NATS JetStream", "", "sync always, durable results; not durable across hosts"),
        *(_cpu_row(race, name) for name in ("Celery", raised.name, "NATS JetStream")),
        *_latency_rows(race),
        *fsync_rows,
    ]
    raw = {
        "rounds": {name: [asdict(outcome) for outcome in every] for name, every in race.rounds.items()},
        "server_cpu_ms_per_task": race.cpu_ms,
        "missing": race.missing,
        "versions": race.versions,
        **race.extra,
    }
    return Result(rows, raw)


def _note(race: Race, *names: str) -> str:
    def say(name: str) -> str:
        rounds = len(race.rounds[name])
        return f"{name} stopped after {rounds} rounds" if rounds else f"{name} missing"

    return "; ".join(f"{say(name)}: {race.missing[name]}" for name in names if name in race.missing)


def _row(race: Race, name: str, goal: str, remark: str) -> Row:
    note = _note(race, "ours", name) or remark
    if noisy := noise(race.rounds["ours"], race.rounds[name]):
        note = f"{noisy}; {note}"
    return Row(
        f"no-op tasks, {CLIENTS} clients", race.per_s("ours"), race.per_s(name), "1/s", name, goal, note
    )


def _cpu_row(race: Race, name: str) -> Row:
    ours, theirs = median(race.cpu_ms["ours"]), median(race.cpu_ms[name])
    return Row("CPU of the servers per no-op task", ours, theirs, "ms", name, "", _note(race, name))


def _latency_rows(race: Race) -> list[Row]:
    def of(name: str, pick: str) -> float | None:
        return median([outcome.latency_ms[pick] for outcome in steady(race.rounds[name])])

    return [
        Row(f"no-op task, {pick}", of("ours", pick), of("Celery", pick), "ms", "Celery")
        for pick in ("p50", "p99")
    ]


def _fsyncs(ours: list[Contender], celery: list[Contender]) -> list[Row]:
    """Of accepted tasks of ours (run to their end), and of Redis per Celery task."""
    rows, theirs, why = [], None, ""
    with temporary() as home:
        for contender in celery:
            assert isinstance(contender, Celery)
            try:
                theirs = fsyncs.per_exchange(
                    contender.redis.popen.pid, home / "redis", partial(contender.round, FSYNC_S)
                )
            except Missing as error:
                why = f"Celery: {error}"
        for connections in FSYNC_CONNECTIONS:
            mine, note = None, why
            for contender in ours:
                assert isinstance(contender, Ours)
                spec = replace(contender.peer.spec(), connections=connections, seconds=FSYNC_S)
                summary = home / f"ours-{connections}"
                try:
                    mine = fsyncs.per_exchange(
                        contender.peer.server.popen.pid, summary, partial(run_load, spec)
                    )
                    contender.peer.drain()
                except Missing as error:
                    note = f"ours: {error}"
            beside = theirs if connections == CLIENTS else None
            label = f"fsyncs per accepted task, connections: {connections}"
            rows.append(Row(label, mine, beside, "", "Celery (Redis)" if beside else "", "", note))
    return rows
