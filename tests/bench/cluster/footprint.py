"""What an idle peer of a cluster and its children take: memory, and CPU over a while."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import psutil

from tests.bench.cluster.bed import bed
from tests.bench.processes import Missing, cpu_s, memory_mib
from tests.bench.report import Options, Result, Row, median
from tests.process.cluster import faults
from tests.process.cluster.faults import Role
from tests.process.cluster.member import Member

CALM_S = 5.0  # after the cluster has come up
IDLE_S, QUICK_IDLE_S = 30.0, 10.0
ROLES: Sequence[Role] = ("peer", "engine", "serf", "etcd")


def measure(options: Options) -> Result:
    with bed() as (made, client):
        client.load_everywhere()
        leader = made.leader()
        time.sleep(CALM_S)
        found = {
            (member.host.name, role): _process(member, role) for member in made.members for role in ROLES
        }
        before = {who: cpu_s([process]) for who, process in found.items()}
        began = time.monotonic()
        time.sleep(QUICK_IDLE_S if options.quick else IDLE_S)
        after = {who: cpu_s([process]) for who, process in found.items()}
        idle_s = time.monotonic() - began
        taken: dict[str, list[dict[str, Any]]] = {}
        for who, process in found.items():
            host, role = who
            kind = (
                f"{'leader' if host == leader.host.name else 'follower'}'s peer" if role == "peer" else role
            )
            percent = 100.0 * (after[who] - before[who]) / idle_s
            taken.setdefault(kind, []).append({**memory_mib(process), "cpu_percent": percent, "host": host})
    rows = []
    for kind in ("leader's peer", "follower's peer", "engine", "serf", "etcd"):
        each = taken[kind]
        for pick, unit in (("rss", "MiB"), ("pss", "MiB"), ("cpu_percent", "% of a core")):
            name = f"idle {kind}, {'CPU' if pick == 'cpu_percent' else pick.upper()}"
            rows.append(Row(name, median([one[pick] for one in each]), None, unit))
    return Result(rows, {"idle_s": idle_s, "processes": taken})


def _process(member: Member, role: Role) -> psutil.Process:
    found = faults.having(member.host, role)
    if len(found) != 1:
        raise Missing(f"{member.host.name} has {len(found)} processes of the role {role}")
    return found[0]
