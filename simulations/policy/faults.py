"""Swarm testing: a seed draws which faults a run knows at all, and how often each of them occurs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from simulations.policy.sometimes import FAULTS

# Events of the whole cluster per hour, at the most.
_PER_HOUR_MAX = {
    "engine_death": 120.0, "engine_hang": 30.0, "foreign_memory": 30.0, "peer_crash": 60.0, "peer_freeze": 60.0,
    "leader_crash": 40.0, "slow_store": 60.0, "burst": 30.0, "worker_flap": 20.0,
    "session_drop": 120.0, "wrong_gossip": 60.0, "leader_stall": 40.0, "sessions_drop": 20.0,
}  # fmt: skip
# The chance of each single occasion, at the most.
_CHANCE_MAX = {
    "load_failure": 0.5, "run_error": 0.2, "commit_fails": 0.004, "commit_ambiguous": 0.004,
    "crash_after_commit": 0.004, "report_lost": 0.2, "report_late": 0.2, "report_duplicated": 0.2,
    "order_lost": 0.1, "order_late": 0.2, "clock_step": 1.0, "stuck_cancel": 0.3, "memory_surprise": 1.0,
}  # fmt: skip
_ENABLED = 0.45
_CALM = 0.08  # of all runs know no fault at all: what fails there is no matter of robustness


@dataclass(slots=True)
class FaultPlan:
    """`rates` in events per hour of the cluster, `chances` per occasion. Nothing occurs once `over` is set."""

    rates: dict[str, float] = field(default_factory=dict)
    chances: dict[str, float] = field(default_factory=dict)
    over: bool = False

    def knows(self, name: str) -> bool:
        return name in self.rates or name in self.chances

    def strikes(self, name: str, rng: random.Random) -> bool:
        """Whether it occurs on this occasion. Draws only if this run knows the fault."""
        chance = self.chances.get(name)
        return chance is not None and not self.over and rng.random() < chance


def draw(rng: random.Random, hosts: int) -> FaultPlan:
    """Rates grow with the cluster, by its square root: each host sees fewer faults in a large one."""
    plan = FaultPlan()
    if rng.random() < _CALM:
        return plan
    scale = max(1.0, (hosts / 4) ** 0.5)
    for name in FAULTS:
        if rng.random() >= _ENABLED:
            continue
        share = 10.0 ** rng.uniform(-1.5, 0.0)
        if name in _PER_HOUR_MAX:
            plan.rates[name] = max(6.0, _PER_HOUR_MAX[name] * share * scale)
        else:
            plan.chances[name] = _CHANCE_MAX[name] * share
    return plan
