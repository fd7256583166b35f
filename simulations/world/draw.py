"""Swarm testing: a seed draws how large the cluster is, which faults a run knows at all, and how often each occurs."""

from __future__ import annotations

import random

from msgspec.structs import replace

from simulations.scenario import Fault, Scenario
from simulations.world.faults import KINDS, LATER, kind
from simulations.world.workload import draw_ops

HOSTS = (3, 3, 3, 4, 4, 5, 5, 6, 7)  # as often as it is listed
FAULT_S = (80.0, 550.0)
CALM = 0.05  # of all runs know no fault at all
KNOWN = 0.25  # of the kinds, in the others
FAULTS_PER_MINUTE = (0.5, 14.0)  # of the cluster, in all
LEADERS = 3.0  # so many times as likely: what happens to a leader matters most
PLANS_ITSELF = 0.5  # of the runs have a leader that plans anew after hosts came or went
GROWS = 0.2  # of them begin with one voter
BURST = 0.15  # of the runs have their faults close together


def draw(seed: int, *, hosts: int | None = None, fault_s: float | None = None) -> Scenario:
    rng = random.Random(f"{seed}/scenario")
    many = hosts if hosts is not None else rng.choice(HOSTS)
    voters = 5 if many >= 5 and rng.random() < 0.3 else 3 if many >= 3 else 1
    seconds = fault_s if fault_s is not None else rng.uniform(*FAULT_S)
    peers = tuple(f"h{number}" for number in range(1, many + 1))
    scenario = Scenario(
        seed=seed,
        hosts=many,
        voters=voters,
        gpus=rng.choice((1, 1, 2, 4)) if many <= 20 else 1,
        fault_s=round(seconds, 3),
        models=rng.randint(1, 4),
        upgraded=tuple(peer for peer in peers if rng.random() < 0.5) if rng.random() < 0.2 else (),
    )
    scenario = _later(scenario)
    ops = draw_ops(rng, scenario, peers)
    faults = draw_faults(rng, scenario, peers)
    if faults:
        faults = tuple(sorted((*faults, *_later_faults(scenario, peers)), key=lambda fault: fault.at_s))
    return replace(scenario, faults=faults, ops=ops)


def _later(scenario: Scenario) -> Scenario:
    """Drawn by a chance of its own, so that all else of a seed stays what it was."""
    rng = random.Random(f"{scenario.seed}/later")
    strategy = "load_balanced" if rng.random() < PLANS_ITSELF else ""
    return replace(scenario, rebalance=strategy, grows=scenario.hosts >= 3 and rng.random() < GROWS)


def _later_faults(scenario: Scenario, peers: tuple[str, ...]) -> list[Fault]:
    rng = random.Random(f"{scenario.seed}/later faults")
    found: list[Fault | None] = []
    for name in LATER:
        if name == "voter_lost_for_ever":
            if scenario.grows and scenario.hosts > 3:
                at_s = rng.uniform(0.2, 0.8) * scenario.fault_s
                found.append(_one(rng, name, at_s, scenario, peers))
        elif rng.random() < KNOWN:
            for _ in range(rng.randint(1, 4)):
                found.append(_one(rng, name, rng.uniform(3.0, scenario.fault_s), scenario, peers))
    return [fault for fault in found if fault is not None]


def draw_faults(rng: random.Random, scenario: Scenario, peers: tuple[str, ...]) -> tuple[Fault, ...]:
    if rng.random() < CALM:
        return ()
    names = [
        name for name in KINDS if name not in LATER and rng.random() < KNOWN * (2 if "leader" in name else 1)
    ] or [rng.choice([name for name in KINDS if name not in LATER])]
    weights = [10.0 ** rng.uniform(-1.0, 0.0) * (LEADERS if "leader" in name else 1.0) for name in names]
    low, high = FAULTS_PER_MINUTE
    rate = low * (high / low) ** rng.random() * max(1.0, (scenario.hosts / 5) ** 0.5)
    count = max(1, round(rate * scenario.fault_s / 60.0))
    burst_at = rng.uniform(10.0, scenario.fault_s) if rng.random() < BURST else None
    faults = []
    joined: set[str] = set()
    for name in rng.choices(names, weights, k=count):
        at_s = rng.uniform(3.0, scenario.fault_s)
        if burst_at is not None:
            at_s = min(scenario.fault_s, burst_at + rng.expovariate(0.3))
        fault = _one(rng, name, at_s, scenario, peers)
        if fault is None or (name == "join" and fault.targets[0] in joined):
            continue
        if name == "join":
            joined.add(fault.targets[0])
        faults.append(fault)
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _one(
    rng: random.Random, name: str, at_s: float, scenario: Scenario, peers: tuple[str, ...]
) -> Fault | None:
    known = kind(name)
    voters = peers[: scenario.voters]
    match known.targets:
        case "peer" | "engine":
            targets: tuple[str, ...] = (rng.choice(peers),)
        case "worker":
            if len(peers) == len(voters):
                return None
            targets = (rng.choice(peers[len(voters) :]),)
        case "voter":
            targets = (rng.choice(voters),)
        case "pair":
            if len(peers) < 2:
                return None
            targets = tuple(rng.sample(peers, 2))
        case "group":
            targets = tuple(sorted(rng.sample(peers, rng.randint(1, max(1, len(peers) - 1)))))
        case _:
            targets = ()
    low, high = known.for_s
    weak, strong = known.strength
    return Fault(
        at_s=round(at_s, 3),
        kind=name,
        targets=targets,
        for_s=round(low * (high / low) ** rng.random(), 3) if low else 0.0,
        strength=round(rng.uniform(weak, strong), 4),
    )
