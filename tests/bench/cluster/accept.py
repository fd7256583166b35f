"""Durable `POST /tasks` at the leader, through a follower, and on a single node; and what one forward adds to a read.

Rounds of the three alternate, each with everything on the same cores, the client too. What is acknowledged is on disk:
of two hosts in the cluster (here the same disk), in SQLite on the single node. Tasks run meanwhile, and drain between.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from tests.bench.cluster.bed import Client, bed, say
from tests.bench.load import Outcome, Spec, http_request
from tests.bench.peer import TASK, Peer, peer
from tests.bench.processes import run_load
from tests.bench.report import Options, Result, Row, enough, median, noise, steady
from tests.process.cluster.cluster import Cluster
from tests.process.cluster.member import API, SLOTS, Member

CONNECTIONS = (32, 64)
DRAIN_S = 60.0
SINGLE = f"engine:\n  slots: {SLOTS}\n"
Rounds = dict[str, list[Outcome]]


def measure(options: Options) -> Result:
    rounds: Rounds = defaultdict(list)
    with bed() as (made, client), peer(config=SINGLE) as single:
        client.load_everywhere()
        single.warm_up()
        leader, follower = made.leader(), made.followers()[0]
        read = f"/tasks/{client.submit(leader, 'hello')}"
        client.await_idle(leader, DRAIN_S)
        done = 0
        while not enough(rounds, done, options):
            done += 1
            for connections in CONNECTIONS:
                shape: dict[str, Any] = {"connections": connections, "seconds": options.seconds}
                for name, member in (("leader", leader), ("follower", follower)):
                    outcome = _load(made, member, "POST", "/tasks", TASK, shape)
                    rounds[f"{name} {connections}"].append(outcome)
                    client.await_idle(leader, DRAIN_S)
                rounds[f"single {connections}"].append(_single(single, shape))
            for name, member in (("leader", leader), ("follower", follower)):
                shape = {"connections": 1, "seconds": options.seconds}
                rounds[f"{name} read"].append(_load(made, member, "GET", read, b"", shape))
        led = made.leader() is leader
        kept, accepted = _kept(client, leader, rounds)
    result = Result(
        _rows(rounds, led), {"rounds": {name: list(map(asdict, all_)) for name, all_ in rounds.items()}}
    )
    result.raw |= {"tasks_accepted": accepted, "tasks_kept": kept, "led_throughout": led}
    if kept < accepted:
        result.rows.append(
            Row("accepted tasks that the cluster has not kept", float(accepted - kept), goal="ours<=0")
        )
    return result


def _load(
    made: Cluster, member: Member, method: str, path: str, body: bytes, shape: dict[str, Any]
) -> Outcome:
    """From the member's own host: the same way through the kernel as on a single node."""
    request = http_request(method, path, body, {"Authorization": f"Bearer {made.key}"})
    outcome = run_load(Spec(port=API, request=request, **shape), namespace_of=member.host.pid)
    p50, p99 = outcome.latency_ms["p50"], outcome.latency_ms["p99"]
    many = f"{shape['connections']} connections"
    say(f"{method} at {member.host.name}, {many}: {outcome.per_s:.0f}/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    return outcome


def _single(single: Peer, shape: dict[str, Any]) -> Outcome:
    outcome = run_load(single.spec(**shape))
    single.drain()
    say(f"POST at the single node, {shape['connections']} connections: {outcome.per_s:.0f}/s")
    return outcome


def _kept(client: Client, leader: Member, rounds: Rounds) -> tuple[int, int]:
    """How many tasks the cluster has, and how many it has said to have."""
    posts = [name for name in rounds if not name.endswith("read") and not name.startswith("single")]
    accepted = sum(outcome.total for name in posts for outcome in rounds[name])
    return int(client.get(leader, "/tasks?limit=1")["total"]) - 1, accepted


def _rows(rounds: Rounds, led: bool) -> list[Row]:
    def of(name: str, pick: str = "per_s") -> float | None:
        every = steady(rounds[name])
        return median([each.per_s if pick == "per_s" else each.latency_ms[pick] for each in every])

    rows = []
    moved = "" if led else "the leader changed during the measurement"
    for connections in CONNECTIONS:
        leader, follower, single = (f"{who} {connections}" for who in ("leader", "follower", "single"))
        failed = sum(each.failed + each.unanswered for name in (leader, follower) for each in rounds[name])
        note = (
            moved
            or (f"{failed} requests failed" if failed else "")
            or noise(rounds[leader], rounds[follower])
        )
        name = f"durable accepts, {connections} connections"
        rows += [
            Row(
                f"{name}, at the leader of 3",
                of(leader),
                of(single),
                "1/s",
                "single node",
                "ratio>=0.333",
                note,
            ),
            Row(
                f"{name}, at a follower", of(follower), of(leader), "1/s", "at the leader", "ratio>=0.7", note
            ),
        ]
        for pick in ("p50", "p99"):
            rows.append(
                Row(
                    f"{name}, at a follower, {pick}",
                    of(follower, pick),
                    of(leader, pick),
                    "ms",
                    "at the leader",
                )
            )
    for pick in ("p50", "p99"):
        ours, direct = of("follower read", pick), of("leader read", pick)
        added = None if ours is None or direct is None else ours - direct
        rows.append(
            Row(f"added to a read by one forward, {pick}", added, direct, "ms", "the read at the leader")
        )
    return rows
