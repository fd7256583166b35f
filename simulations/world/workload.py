"""What clients and owners want of a cluster, drawn by a seed. Carried out by simulations.world.clients."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec.structs import replace

from simulations.scenario import Op, Scenario
from simulations.world.clients import Clients

SUBMITS_MAX: Final = 250
BEGIN_S: Final = 2.0  # nobody asks a cluster that has only just been started
CLIENTS: Final = 6
STREAMED: Final = 0.1  # share of the tasks whose text is read as it comes
PRIORITIES: Final = (1, 3, 5, 5, 5, 8)

__all__ = ["Clients", "draw_ops"]


@dataclass
class _Plan:
    """Operations as they are drawn. `about` names a submit by its number here, until all are put in order."""

    rng: random.Random
    peers: Sequence[str]
    models: Sequence[str]
    gpus: int
    end_s: float
    ops: list[tuple[Op, int | None]] = field(default_factory=list)
    submits: int = 0

    def add(self, at_s: float, kind: str, about: int | None = None, **more: Any) -> int:
        """At a random peer, by a random client; cut to the time that there is."""
        more.setdefault("peer", self.rng.choice(self.peers))
        more.setdefault("client", self.rng.randrange(CLIENTS))
        moment = round(min(max(at_s, BEGIN_S), self.end_s), 3)
        self.ops.append((Op(at_s=moment, kind=kind, **more), about))
        return len(self.ops) - 1

    def vanish(self, chance: float, low_s: float, high_s: float) -> float:
        return round(self.rng.uniform(low_s, high_s), 3) if self.rng.random() < chance else 0.0


def draw_ops(rng: random.Random, scenario: Scenario, peers: Sequence[str]) -> tuple[Op, ...]:
    """In the order of their moments. What is common in one scenario may be missing in the next."""
    models = tuple(f"m{n}" for n in range(scenario.models))
    plan = _Plan(rng, peers, models, scenario.gpus, scenario.fault_s)
    _owners(plan)
    weights = [rng.random() + 0.05 for _ in models]
    rate = 0.2 * (15.0 ** rng.random())  # tasks per second of the whole cluster
    streams = random.Random(f"streams {scenario.seed}")  # its own: the other operations stay as they were
    shape = _Shape(
        weights,
        keyed=rng.choice((0.2, 0.5, 0.9)),
        cancelled=rng.choice((0.0, 0.1, 0.3)),
        read=rng.choice((0.3, 1.0, 2.0)),
        tokens=rng.choice((20, 60, 150)),
        impatient=rng.choice((0.0, 0.05, 0.2)),
    )
    at_s = BEGIN_S
    while (at_s := at_s + rng.expovariate(rate)) < plan.end_s and plan.submits < SUBMITS_MAX:
        first = _task(plan, shape, at_s)
        if streams.random() < STREAMED:
            peer, client = streams.choice(peers), streams.randrange(CLIENTS)
            plan.add(at_s + streams.expovariate(1.0), "stream", first, peer=peer, client=client)
    if rng.random() < 0.4:
        at_s = rng.uniform(BEGIN_S, plan.end_s)
        for _ in range(rng.randrange(10, 80)):
            _task(plan, shape, at_s + rng.random() * 0.5)
    for _ in range(rng.randrange(0, 8)):
        plan.add(rng.uniform(BEGIN_S, plan.end_s), "list")
    for _ in range(rng.randrange(1, 4)):
        _follower(plan)
    _operators(plan, random.Random(f"operators {scenario.seed}"))
    return _in_order(plan)


@dataclass(frozen=True)
class _Shape:
    """Of this scenario's tasks: shares of them, and typical sizes."""

    weights: list[float]
    keyed: float
    cancelled: float
    read: float  # reads per task
    tokens: int
    impatient: float


def _task(plan: _Plan, shape: _Shape, at_s: float) -> int:
    """A submit and what its client does about it later; the submit's number."""
    rng = plan.rng
    keyed = rng.random() < shape.keyed
    tokens = max(1, min(4_000, round(rng.lognormvariate(0.0, 1.0) * shape.tokens)))
    wish: dict[str, Any] = {
        "model": rng.choices(plan.models, shape.weights)[0],
        "tokens": tokens,
        "priority": rng.choice(PRIORITIES),
        "timeout_s": round(rng.uniform(1.0, 15.0), 3) if rng.random() < 0.1 else 60.0,
        "key": f"k{plan.submits}" if keyed else "",
    }
    plan.submits += 1
    first = plan.add(at_s, "submit", **wish, vanish_s=plan.vanish(shape.impatient, 0.0, 2.0))
    while keyed and rng.random() < 0.15:  # again: at once, or long after
        plan.add(at_s + rng.choice((0.0, rng.random(), rng.expovariate(0.05))), "submit", first, **wish)
    if rng.random() < shape.cancelled:
        after_s = rng.choice((rng.random() * 0.3, rng.expovariate(0.3), rng.expovariate(0.03)))
        plan.add(at_s + after_s, "cancel", first, vanish_s=plan.vanish(shape.impatient, 0.0, 1.0))
    reads = rng.random() * 2.0 * shape.read
    while reads > rng.random():
        reads -= 1.0
        if rng.random() < 0.3:
            wait_s = round(rng.uniform(1.0, 40.0), 3)
            vanish_s = plan.vanish(shape.impatient, 0.0, 20.0)
            plan.add(at_s + rng.expovariate(0.5), "wait", first, timeout_s=wait_s, vanish_s=vanish_s)
        else:
            plan.add(at_s + rng.expovariate(0.1), "get", first)
    return first


def _follower(plan: _Plan) -> None:
    rng = plan.rng
    at_s = rng.uniform(0.0, plan.end_s * 0.7)
    slow_ms = rng.randrange(50, 2_000) if rng.random() < 0.2 else 0
    since = "all" if rng.random() < 0.5 else ""
    plan.add(at_s, "events", timeout_s=round(plan.end_s - at_s, 3), tokens=slow_ms, key=since)


def _owners(plan: _Plan) -> None:
    """Some models are assigned early; later on somebody changes his mind."""
    rng = plan.rng
    for model in plan.models:
        if rng.random() < 0.6:
            plan.add(rng.uniform(BEGIN_S, BEGIN_S + 5.0), "assign", model=model, worker=_worker(plan, 0.5))
    for _ in range(rng.choice((0, 0, 2, 6))):
        at_s = rng.uniform(BEGIN_S, plan.end_s)
        kind = rng.choice(("assign", "unload", "rebalance", "rebalance", "restart"))
        if kind == "rebalance":
            plan.add(at_s, kind, key="dry" if rng.random() < 0.2 else "", tokens=rng.randrange(2))
        elif kind == "restart":
            plan.add(at_s, kind, worker=_worker(plan, 1.0))
        else:
            model = rng.choice(plan.models)
            plan.add(at_s, kind, model=model, worker=_worker(plan, 0.5), tokens=rng.randrange(2))


def _operators(plan: _Plan, rng: random.Random) -> None:
    """In some scenarios hosts are taken out of service, and the leadership is moved."""
    if rng.random() < 0.5:
        return
    for _ in range(rng.randrange(1, 6)):
        at_s = rng.uniform(BEGIN_S, plan.end_s)
        kind = rng.choice(("drain", "drain", "undrain", "transfer"))
        where: dict[str, Any] = {"peer": rng.choice(plan.peers), "client": rng.randrange(CLIENTS)}
        host = rng.choice(plan.peers) if kind != "transfer" else ""
        plan.add(at_s, kind, host=host, **where)
        if kind == "drain" and rng.random() < 0.5:
            plan.add(at_s + rng.expovariate(0.05), "undrain", host=host, **where)


def _worker(plan: _Plan, chance: float) -> str:
    rng = plan.rng
    return f"{rng.choice(plan.peers)}-gpu{rng.randrange(plan.gpus)}" if rng.random() < chance else ""


def _in_order(plan: _Plan) -> tuple[Op, ...]:
    order = sorted(range(len(plan.ops)), key=lambda n: (plan.ops[n][0].at_s, n))
    places = {n: place for place, n in enumerate(order)}
    ops = []
    for n in order:
        op, about = plan.ops[n]
        ops.append(op if about is None else replace(op, task=places[about]))
    return tuple(ops)
