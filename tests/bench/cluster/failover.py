"""How long nothing is acknowledged when the leader's host goes, and how long its lease would have taken to end.

A round kills everything on that host at once (peer, engine, Serf, etcd), or cuts it off so that nobody is told. At that
moment a client submits a task at another peer, which holds the request until it can be acknowledged. Beside it, in the
same round: a key under a lease of the same length, in the same store, is kept alive until the fault. Whoever waits for
the leader's lease alone cannot be faster than this key is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime

from peer.limits import LEASE_TTL_S
from tests.bench.cluster.bed import Client, bed, say
from tests.bench.processes import Missing
from tests.bench.report import Options, Result, Row, median
from tests.process.cluster import faults, stores
from tests.process.cluster.cluster import Cluster
from tests.process.cluster.member import Member
from tests.process.peers import submission

KILLS, CUTS = 20, 4
QUICK_KILLS, QUICK_CUTS = 2, 1
GAP_S_MAX = 60.0
PAUSE_S = 0.02
BEGIN_S_MAX = 10.0
WAIT_S_MAX = stores.LEASE_S_MAX + BEGIN_S_MAX
PHASES = ("leader_lost", "deposing", "elected", "leading")


@dataclass
class Gap:
    """Seconds from the fault. `phases`: when the survivors' logs first tell of each."""

    fault: str
    gap_s: float = 0.0
    lease_s: float = 0.0
    store_led: bool = False  # the host had the leader of the store's own elections, too
    store_s: float = 0.0  # until the store had another one, if so
    phases: dict[str, float] = field(default_factory=dict)


def measure(options: Options) -> Result:
    kills, cuts = (QUICK_KILLS, QUICK_CUTS) if options.quick else (KILLS, CUTS)
    found: list[Gap] = []
    with bed() as (made, client):
        for number in range(kills):
            found.append(_round(made, client, "killed", _kill, f"kill-{number}"))
        for number in range(cuts):
            found.append(_round(made, client, "cut off", _cut, f"cut-{number}"))
    return Result(_rows(found), {"rounds": [asdict(gap) for gap in found]})


def _kill(made: Cluster, leader: Member) -> Callable[[], None]:
    doomed = leader.host.processes()
    return lambda: void(faults.kill(doomed))


def _cut(made: Cluster, leader: Member) -> Callable[[], None]:
    return lambda: made.faults.isolate(leader.host)


def void(_: object) -> None:
    """A fault hands nothing back."""


def _round(
    made: Cluster,
    client: Client,
    fault: str,
    prepare: Callable[[Cluster, Member], Callable[[], None]],
    key: str,
) -> Gap:
    leader = made.leader()
    survivor = next(member for member in made.members if member is not leader)
    store_leader = stores.leader(survivor)
    gap = Gap(fault, store_led=store_leader == leader.host.name)
    strike = prepare(made, leader)
    begun = threading.Event()
    with (
        _meanwhile(lambda: stores.await_lease_end(survivor, LEASE_TTL_S, begun.set)) as lease_ended,
        _meanwhile(lambda: stores.await_next_leader(survivor, store_leader), gap.store_led) as store_led,
    ):
        if not begun.wait(BEGIN_S_MAX):
            raise Missing("no lease was granted")
        struck_at = time.time()
        began = time.monotonic()
        strike()
        while True:
            request = {"json": submission(key), "headers": {"Idempotency-Key": key}}
            status, body = client.call(survivor, "POST", "/tasks", **request)
            gap.gap_s = time.monotonic() - began
            if status == 201:
                break
            if gap.gap_s > GAP_S_MAX:
                raise Missing(f"nothing is acknowledged {gap.gap_s:.0f} s after the fault: {status} {body}")
            time.sleep(PAUSE_S)
        gap.store_s = store_led() - began if gap.store_led else 0.0
        gap.lease_s = lease_ended() - began
    gap.phases = _phases(made, leader, struck_at)
    told = f"lease {gap.lease_s:.2f} s, etcd's own election {gap.store_s:.2f} s, {gap.phases}"
    say(f"leader {leader.host.name} {fault}: {gap.gap_s:.2f} s, {told}")
    if fault == "killed":
        leader.host.kill_all()
    made.settle()
    return gap


@contextmanager
def _meanwhile(call: Callable[[], float], wanted: bool = True) -> Iterator[Callable[[], float]]:
    """The call goes on during the body; what is yielded waits for it and hands its result over."""
    done: list[float] = []
    thread = threading.Thread(target=lambda: done.append(call()))

    def result() -> float:
        thread.join(WAIT_S_MAX)
        if not done:
            raise Missing("the store did not tell what was waited for")
        return done[0]

    if wanted:
        thread.start()
    try:
        yield result
    finally:
        if wanted:
            thread.join(WAIT_S_MAX)


def _phases(made: Cluster, leader: Member, struck_at: float) -> dict[str, float]:
    """When each was first logged by one of the others."""
    found: dict[str, float] = {}
    for member in made.members:
        if member is leader:
            continue
        for line in member.log_lines():
            name = str(line.get("event"))
            if name in PHASES:
                after = datetime.fromisoformat(line["timestamp"]).timestamp() - struck_at
                if after > 0 and after < found.get(name, GAP_S_MAX):
                    found[name] = round(after, 3)
    return {name: found[name] for name in PHASES if name in found}


def _rows(found: list[Gap]) -> list[Row]:
    beside = f"end of a lease of {LEASE_TTL_S:g} s"
    rows = []
    for fault, goals in (("killed", ("ours<=3", "ours<=5")), ("cut off", ("", ""))):
        rounds = [gap for gap in found if gap.fault == fault]
        name = f"failover, leader's host {fault}"
        ours, leases = [gap.gap_s for gap in rounds], [gap.lease_s for gap in rounds]
        note = f"{sum(gap.store_led for gap in rounds)} of {len(rounds)} had etcd's leader, too"
        if fault == "cut off":
            note += "; no FIN and no RST: its silence is all there is"
        rows.append(Row(f"{name}, median", median(ours), median(leases), "s", beside, goals[0], note))
        worst = f"{name}, worst of {len(rounds)}"
        rows.append(Row(worst, max(ours, default=None), max(leases, default=None), "s", beside, goals[1]))
    elections = [gap.store_s for gap in found if gap.store_led]
    rows.append(Row("of a failover, until etcd has a leader, median", median(elections), None, "s"))
    rows.append(
        Row(
            f"of a failover, until etcd has a leader, worst of {len(elections)}",
            max(elections, default=None),
            None,
            "s",
        )
    )
    return rows
