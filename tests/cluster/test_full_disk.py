"""A host whose disk takes nothing more obeys no new leader and leads no more, and its peer goes on."""

from __future__ import annotations

import trio
from structlog.testing import capture_logs

from simulations.world.fleet import Fleet
from tests.cluster.rig import finished, follower_of, in_a_cluster, led, submission, until
from tests.cluster.test_transfer import ask


def test_a_host_that_cannot_keep_the_epoch_leaves_the_lead_to_another() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        full, other = (name for name in fleet.hosts if name != old)
        lives = {name: host.lives for name, host in fleet.hosts.items()}
        fleet.hosts[full].disk.fill(True)
        for _ in range(3):  # whoever is chosen first, one that can lead does
            answer = await ask(fleet, other)
            assert answer.peer_id != full
            await until(lambda: led(fleet, without=full))
        assert not fleet.hosts[full].peer.follower.leader
        fleet.hosts[full].disk.fill(False)
        await until(lambda: led(fleet) and fleet.hosts[full].peer.follower.leader)
        assert {name: host.lives for name, host in fleet.hosts.items()} == lives
        accepted = await fleet.hosts[full].peer.cluster.call(submission(tokens=1))
        assert (await finished(fleet, follower_of(fleet), accepted.view.task.task_id)).result is not None

    in_a_cluster(script)


def test_a_host_with_a_full_disk_follows_whom_it_has_followed() -> None:
    async def script(fleet: Fleet) -> None:
        follower = follower_of(fleet)
        fleet.hosts[follower].disk.fill(True)
        accepted = await fleet.hosts[follower].peer.cluster.call(submission(tokens=1))
        await finished(fleet, follower, accepted.view.task.task_id)
        await trio.sleep(5.0)
        assert fleet.hosts[follower].peer.follower.leader == fleet.leaders()[0]

    in_a_cluster(script)


def test_a_host_with_a_full_disk_does_not_knock_at_a_new_leader_all_the_time() -> None:
    """Each time is a session that begins and ends on both hosts, and lines of a log that may lie on that disk."""

    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        full, other = (name for name in fleet.hosts if name != old)
        fleet.hosts[full].disk.fill(True)
        await ask(fleet, other)
        await until(lambda: led(fleet, without=full))
        with capture_logs() as lines:
            await trio.sleep(60.0)
        refused = [line for line in lines if line["event"] == "leader_refused"]
        assert 1 <= len(refused) <= 15
        fleet.hosts[full].disk.fill(False)
        await until(lambda: led(fleet) and fleet.hosts[full].peer.follower.leader)

    in_a_cluster(script)
