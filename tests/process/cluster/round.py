"""One fault after the other on one cluster, each followed by its checks, and what is told of it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Final

from tests.process.cluster.cluster import Cluster
from tests.process.cluster.scenarios import Scenario
from tests.process.peers import poll

UNDER_WAY: Final = 3  # tasks, when a fault comes


@dataclass(frozen=True, slots=True)
class Round:
    """`gap_s`: the longest time without an acknowledged task, from the fault until all was well."""

    fault: str
    target: str
    gap_s: float
    settled_s: float
    requeued: int
    tasks: int
    elections: int


def perform(cluster: Cluster, scenario: Scenario, chance: random.Random) -> Round:
    """Do it, wait until the cluster is whole, check. Fails with what is wrong."""
    poll("tasks are under way", lambda: len(cluster.history.waiting()) >= UNDER_WAY)
    before, led = cluster.epoch(), len(cluster.leaderships())
    began = time.monotonic()
    target = scenario.run(cluster, chance)
    over = time.monotonic()
    cluster.settle()
    now = time.monotonic()
    epoch = cluster.epoch()
    assert epoch >= before, f"the epoch fell from {before} to {epoch}"
    if epoch > before:
        for member in cluster.voters():
            cluster.check_fencing(member, before)
    tasks, requeued = cluster.check()
    gap_s = cluster.history.gap_s(began, now)
    elections = len(cluster.leaderships()) - led
    return Round(scenario.name, target, gap_s, now - over, requeued, tasks, elections)
