"""Three peers of the product's own code under a virtual clock, for tests of how they act together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

import trio

from peer.decide.voters import Bounds
from peer.ports import Authority
from peer.state import command as asks
from peer.state.task import TERMINAL
from simulations.scenario import Scenario
from simulations.world.fleet import Fleet
from simulations.world.kernel import World, run_world

WAIT_S = 60.0  # of virtual time, for whatever must come true


def in_a_cluster(
    script: Callable[[Fleet], Awaitable[None]],
    *,
    hosts: int = 3,
    voters: int = 3,
    upgraded: tuple[str, ...] = (),
    grows: Bounds | None = None,
    absent: frozenset[str] = frozenset(),
    authorities: Mapping[str, Authority] = MappingProxyType({}),
) -> None:
    """Run `script` once a cluster has a leader that all follow."""

    async def main(world: World) -> None:
        scenario = Scenario(seed=1, hosts=hosts, voters=voters, gpus=1, upgraded=upgraded)
        fleet = Fleet(world, scenario, grows=grows)
        for name, authority in authorities.items():
            fleet.hosts[name].authority = authority
        fleet.start(absent)
        await until(lambda: led(fleet))
        await script(fleet)

    run_world(main, 1, limit_s=3_600.0)


def led(fleet: Fleet, *, without: str = "") -> bool:
    """One leads and all others that are up follow."""
    leaders = [name for name in fleet.leaders() if name != without]
    return len(leaders) == 1 and all(
        host.peer is not None and host.peer.follower.leader == leaders[0]
        for name, host in fleet.hosts.items()
        if name not in (leaders[0], without) and host.up
    )


async def until(true: Callable[[], Any], limit_s: float = WAIT_S) -> float:
    """The virtual seconds that it took."""
    began = trio.current_time()
    with trio.fail_after(limit_s):
        while not true():  # noqa: ASYNC110 - whatever it is, it has no event of its own
            await trio.sleep(0.02)
    return trio.current_time() - began


def follower_of(fleet: Fleet) -> str:
    return next(name for name in fleet.hosts if name not in fleet.leaders())


def submission(tokens: int = 20, key: str = "", model: str = "m0") -> asks.SubmitTask:
    return asks.SubmitTask(
        task_type="text_generation",
        model_name=model,
        parameters={"prompt": "hello", "max_tokens": tokens},
        priority=5,
        timeout_s=120.0,
        owner="tests",
        key_id="k1",
        idempotency_key=key,
        body_digest="d" if key else "",
    )


async def finished(fleet: Fleet, peer: str, task_id: str) -> asks.TaskView:
    cluster = fleet.cluster_of(peer)
    assert cluster is not None
    with trio.fail_after(WAIT_S):
        while True:
            view: asks.TaskView = await cluster.call(asks.GetTask(task_id=task_id, wait_s=5.0))
            if view.task.status in TERMINAL:
                return view
