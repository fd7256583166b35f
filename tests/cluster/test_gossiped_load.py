"""Every peer knows by gossip how busy the others are, also when nobody leads."""

from __future__ import annotations

from peer.state.member import load_of
from simulations.world.fleet import Fleet
from tests.cluster.rig import follower_of, in_a_cluster, submission, until


def test_hosts_tell_how_busy_they_are_when_that_has_changed() -> None:
    async def script(fleet: Fleet) -> None:
        watching = follower_of(fleet)
        cluster = fleet.hosts[watching].peer.cluster

        def running() -> int | None:
            loads = [load_of(member.tags) for member in cluster.gossip()]
            if len(loads) < len(fleet.hosts) or any(load is None or load.up < load.workers for load in loads):
                return None
            return sum(load.running for load in loads if load is not None)

        await until(lambda: running() == 0)
        for _ in range(3):
            await cluster.call(submission(tokens=2_000))
        await until(lambda: running() not in (None, 0))
        for name in fleet.hosts:
            if name != watching:
                fleet.hosts[name].kill()
        await until(lambda: not fleet.hosts[watching].peer.follower.leader)
        assert len(cluster.gossip()) == len(fleet.hosts)

    in_a_cluster(script)
