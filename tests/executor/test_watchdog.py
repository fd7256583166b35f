"""The watchdog of an engine that says nothing, and of a peer that could not hear it."""

from __future__ import annotations

import trio

from simulations.scenario import Scenario
from simulations.world.fleet import Fleet
from simulations.world.kernel import World, run_world
from tests.cluster.rig import until

FROZEN_S = 100.0  # beyond every limit for an engine that does nothing


def deaths_after(held_up: bool) -> int:
    """Of the one engine of a host whose peer was stopped, or whose engine hung, for so long."""
    deaths: list[int] = []

    async def main(world: World) -> None:
        fleet = Fleet(world, Scenario(seed=1, hosts=1, voters=1, gpus=1))
        fleet.start()
        host = fleet.hosts["h1"]
        await until(lambda: host.peer is not None and host.engines and host.engines[0].alive)
        await trio.sleep(5.0)
        assert host.incarnation is not None
        if held_up:
            host.incarnation.freeze_for(FROZEN_S)
        else:
            host.engines[0].hang(FROZEN_S)
        await trio.sleep(FROZEN_S + 5.0)
        deaths.append(host.engines[0].lives - 1)

    run_world(main, 1)
    return deaths[0]


def test_an_engine_that_hangs_is_ended() -> None:
    assert deaths_after(held_up=False) >= 1


def test_a_peer_that_was_stopped_does_not_take_its_engine_for_dead() -> None:
    assert deaths_after(held_up=True) == 0
