"""The faults that clusters are put through: each does one bad thing to a cluster and says to whom.

A scenario returns when its fault is over or, for kills, has been done; `Cluster.settle` then heals what is left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.process.cluster import faults, stores
from tests.process.cluster.cluster import Cluster
from tests.process.cluster.faults import Role
from tests.process.cluster.member import STORE, Member
from tests.process.peers import poll

HOLD_S: Final = 8.0  # of faults that last: longer than a lease
FREEZE_S: Final = 10.0
DOWN_S: Final = 2.0  # between a kill and the start
LOSS_PERCENT: Final = 20
DELAY_S: Final = 0.2
SWELL_PIECES: Final = 16  # MiB: more than its file grows by at once

Deed = Callable[[Cluster, Member], None]


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    deed: Deed
    leader: bool = True  # else a follower is the target

    def run(self, cluster: Cluster, chance: random.Random) -> str:
        """The name of the host that it was done to."""
        target = cluster.leader() if self.leader else chance.choice(cluster.followers())
        self.deed(cluster, target)
        return target.host.name


def _kill_peer(cluster: Cluster, target: Member) -> None:
    target.kill()
    time.sleep(DOWN_S)


def _kill_host(cluster: Cluster, target: Member) -> None:
    target.host.kill_all()
    time.sleep(DOWN_S)


def _kill_child(role: Role) -> Deed:
    def deed(cluster: Cluster, target: Member) -> None:
        assert faults.kill(faults.having(target.host, role)), f"{target.host.name} has no {role}"
        time.sleep(DOWN_S)

    return deed


def _freeze_peer(cluster: Cluster, target: Member) -> None:
    with cluster.faults.frozen(faults.having(target.host, "peer"), FREEZE_S):
        pass


def _freeze_host(cluster: Cluster, target: Member) -> None:
    with cluster.faults.frozen(target.host.processes(), FREEZE_S):
        pass


def _isolate(cluster: Cluster, target: Member) -> None:
    """And a client that reaches the one who is cut off is not told that anything was done."""
    cluster.faults.isolate(target.host)
    time.sleep(HOLD_S)
    assert not cluster.submits(target), f"{target.host.name} is cut off, and has acknowledged a task"


def _deafen(cluster: Cluster, target: Member) -> None:
    cluster.faults.isolate(target.host, direction="in")
    time.sleep(HOLD_S)


def _silence(cluster: Cluster, target: Member) -> None:
    cluster.faults.isolate(target.host, direction="out")
    time.sleep(HOLD_S)


def _cut_one(cluster: Cluster, target: Member) -> None:
    other = next(member for member in cluster.members if member is not target)
    cluster.faults.cut(target.host, other.host)
    time.sleep(HOLD_S)


def _lose(cluster: Cluster, target: Member) -> None:
    cluster.faults.lose(target.host, LOSS_PERCENT)
    time.sleep(HOLD_S)


def _delay(cluster: Cluster, target: Member) -> None:
    cluster.faults.delay(target.host, DELAY_S)
    time.sleep(HOLD_S)


def _no_quorum_frozen(cluster: Cluster, target: Member) -> None:
    """The members of all others stand still: the leader's own is alone."""
    others = [member for member in cluster.members if member is not target]
    stores = [process for member in others for process in faults.having(member.host, "etcd")]
    with cluster.faults.frozen(stores, HOLD_S):
        pass


def _no_quorum_blocked(cluster: Cluster, target: Member) -> None:
    """The stores do not reach each other; everything else does."""
    cluster.faults.block(STORE)
    time.sleep(HOLD_S)


def _fill_disk(cluster: Cluster, target: Member) -> None:
    """Its store needs room, gets none, and ends."""
    other = next(member for member in cluster.members if member is not target)
    for member in cluster.members:
        stores.defragment(member)  # else each such fault would have to write more than the one before
    before = faults.having(target.host, "etcd")
    faults.fill_disk(target.host)
    stores.swell(other, SWELL_PIECES)
    name = target.host.name
    poll(f"the store of {name} ends", lambda: faults.having(target.host, "etcd") != before, HOLD_S)
    time.sleep(HOLD_S)
    stores.shrink(other)


def _fill_disk_and_kill_store(cluster: Cluster, target: Member) -> None:
    """Its store has to start on a disk that is full."""
    faults.fill_disk(target.host)
    faults.kill(faults.having(target.host, "etcd"))
    time.sleep(HOLD_S)


KILL_ENGINE: Final = "kill engine"

ALL: Final = (
    Scenario("kill leader", _kill_peer),
    Scenario("kill follower", _kill_peer, leader=False),
    Scenario(f"{KILL_ENGINE} of leader", _kill_child("engine")),
    Scenario(f"{KILL_ENGINE} of follower", _kill_child("engine"), leader=False),
    Scenario("kill serf of leader", _kill_child("serf")),
    Scenario("kill serf of follower", _kill_child("serf"), leader=False),
    Scenario("kill etcd of leader", _kill_child("etcd")),
    Scenario("kill etcd of follower", _kill_child("etcd"), leader=False),
    Scenario("kill host of leader", _kill_host),
    Scenario("kill host of follower", _kill_host, leader=False),
    Scenario("freeze leader", _freeze_peer),
    Scenario("freeze host of leader", _freeze_host),
    Scenario("cut off leader", _isolate),
    Scenario("cut off follower", _isolate, leader=False),
    Scenario("leader hears nothing", _deafen),
    Scenario("leader is not heard", _silence),
    Scenario("cut between leader and one", _cut_one),
    Scenario(f"{LOSS_PERCENT} % lost at leader", _lose),
    Scenario(f"{DELAY_S * 1000:.0f} ms later at leader", _delay),
    Scenario("stores of others frozen", _no_quorum_frozen),
    Scenario("stores cut off", _no_quorum_blocked),
    Scenario("disk full on leader", _fill_disk),
    Scenario("disk full, store killed", _fill_disk_and_kill_store),
    Scenario("disk full on follower", _fill_disk, leader=False),
)
