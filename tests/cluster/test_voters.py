"""The leader makes voters of peers, replaces them and parts pairs, in whole peers under a virtual clock."""

from __future__ import annotations

import trio

from peer.decide.voters import Bounds
from peer.state import command as asks
from peer.state.task import Status
from simulations.world.fleet import Fleet
from tests.cluster.rig import finished, in_a_cluster, led, submission, until
from tests.leader.authority import FakeAuthority

BOUNDS = Bounds(dead_s=60.0, pair_s=30.0, start_s=30.0, steady_s=3.0)
GROWN_S = 60.0


def votes(fleet: Fleet, *names: str) -> bool:
    """These vote, know it, and nobody else does."""
    assert fleet.roster is not None
    stand = [name for name in fleet.hosts if stands(fleet, name)]
    learners = [name for name in fleet.roster.learners if name]
    return fleet.roster.voters == sorted(names) and set(stand) <= {*names, *learners}


def stands(fleet: Fleet, name: str) -> bool:
    """Whether this peer takes part in elections."""
    host = fleet.hosts[name]
    return host.up and host.peer is not None and host.peer.election is not None


async def status(fleet: Fleet) -> asks.ClusterStatus:
    found: asks.ClusterStatus = await fleet.cluster_of(fleet.leaders()[0]).call(asks.GetStatus())
    return found


def test_one_host_becomes_three_voters_and_survives_each() -> None:
    async def script(fleet: Fleet) -> None:
        await until(lambda: votes(fleet, "h1", "h2", "h3"), GROWN_S)
        await trio.sleep(2.0)
        found = await status(fleet)
        assert found.outlook == "3 voters: any one may be lost"
        assert [(each.peer_id, each.learner, each.linked) for each in found.voters] == [
            (name, False, True) for name in ("h1", "h2", "h3")
        ]
        submitted = await fleet.hosts["h2"].peer.cluster.call(submission(tokens=200))
        fleet.hosts["h1"].kill()
        await until(lambda: led(fleet, without="h1"))
        view = await finished(fleet, "h2", submitted.view.task.task_id)
        assert view.task.status is Status.COMPLETED
        await trio.sleep(2.0)
        assert (await status(fleet)).outlook.startswith("2 of 3 voters are up: one more loss stops")

    in_a_cluster(script, grows=BOUNDS)


def test_a_host_has_the_ca_s_key_before_it_votes() -> None:
    """As the leader it would have to let hosts in, and could ask nobody but itself for the key."""
    held = {name: FakeAuthority(name, has_key=name == "h1") for name in ("h1", "h2", "h3")}

    async def script(fleet: Fleet) -> None:
        await until(lambda: fleet.roster.learners == ["h2"], GROWN_S)
        await trio.sleep(BOUNDS.start_s / 2)
        assert votes(fleet, "h1")
        held["h2"].has_key = held["h3"].has_key = True
        await until(lambda: votes(fleet, "h1", "h2", "h3"), GROWN_S)

    in_a_cluster(script, grows=BOUNDS, authorities=held)


def test_two_hosts_are_one_voter_and_one_learner() -> None:
    async def script(fleet: Fleet) -> None:
        await until(lambda: fleet.roster.learners == ["h2"], GROWN_S)
        await trio.sleep(120.0)
        assert votes(fleet, "h1")
        assert fleet.roster.learners == ["h2"]
        assert "needs `bitinglip takeover` on h2" in (await status(fleet)).outlook
        assert fleet.leaders() == ["h1"]
        assert led(fleet)  # the learner waits, and follows

    in_a_cluster(script, hosts=2, voters=1, grows=BOUNDS)


def test_a_voter_that_is_gone_for_ever_is_replaced_by_a_spare() -> None:
    async def script(fleet: Fleet) -> None:
        await until(lambda: votes(fleet, "h1", "h2", "h3"), GROWN_S)
        fleet.hosts["h2"].kill()
        await trio.sleep(BOUNDS.dead_s - 5.0)
        assert votes(fleet, "h1", "h2", "h3")
        await until(lambda: votes(fleet, "h1", "h3", "h4"), GROWN_S)
        fleet.hosts["h2"].start()  # with the data of a member that is none any more
        await until(lambda: led(fleet))
        await until(lambda: not stands(fleet, "h2"))
        await trio.sleep(60.0)
        assert votes(fleet, "h1", "h3", "h4")
        assert fleet.hosts["h2"].disk.read("seat") == b"0"

    in_a_cluster(script, hosts=4, grows=BOUNDS)


def test_a_voter_whose_store_has_died_alone_is_replaced_by_a_spare() -> None:
    async def script(fleet: Fleet) -> None:
        await until(lambda: votes(fleet, "h1", "h2", "h3"), GROWN_S)
        (leader,) = fleet.leaders()
        broken = next(name for name in ("h2", "h3") if name != leader)
        fleet.store.member_down(broken)
        await trio.sleep(10.0)
        assert (await status(fleet)).outlook.startswith("2 of 3 voters are up")
        assert broken in fleet.hosts[leader].peer.membership.members  # its host is well
        await until(lambda: votes(fleet, *({"h1", "h2", "h3", "h4"} - {broken})), 3 * GROWN_S)

    in_a_cluster(script, hosts=4, grows=BOUNDS)


def test_the_leader_itself_is_replaced_by_the_next_leader() -> None:
    async def script(fleet: Fleet) -> None:
        await until(lambda: votes(fleet, "h1", "h2", "h3"), GROWN_S)
        (old,) = fleet.leaders()
        fleet.hosts[old].kill()
        await until(lambda: votes(fleet, *({"h1", "h2", "h3", "h4"} - {old})), 3 * GROWN_S)
        await until(lambda: led(fleet, without=old))

    in_a_cluster(script, hosts=4, grows=BOUNDS)


def test_a_voter_whose_disk_is_lost_learns_anew() -> None:
    async def script(fleet: Fleet) -> None:
        await until(lambda: votes(fleet, "h1", "h2", "h3"), GROWN_S)
        (leader,) = fleet.leaders()
        lost = next(name for name in ("h2", "h3") if name != leader)
        before = dict(fleet.roster.entries)
        fleet.hosts[lost].kill(power=True)
        fleet.hosts[lost].lose_disk()
        fleet.hosts[lost].start()
        await until(lambda: lost not in fleet.roster.voters, GROWN_S)
        await until(lambda: votes(fleet, "h1", "h2", "h3"), GROWN_S)
        assert len(set(before) & set(fleet.roster.entries)) == 2

    in_a_cluster(script, grows=BOUNDS)


def test_a_third_host_that_goes_while_the_cluster_grows_leaves_no_pair_behind() -> None:
    async def script(fleet: Fleet) -> None:
        await until(lambda: len(fleet.roster.voters) == 2, GROWN_S)
        third = next(name for name in fleet.hosts if name not in fleet.roster.voters)
        fleet.hosts[third].kill()
        await until(lambda: len(fleet.roster.voters) == 1, 2 * GROWN_S)
        await until(
            lambda: len(fleet.roster.learners) == 1 and fleet.roster.learners[0] not in ("", third),
            2 * GROWN_S,
        )
        assert led(fleet)
        fleet.hosts[third].start()
        await until(lambda: votes(fleet, "h1", "h2", "h3"), 3 * GROWN_S)

    in_a_cluster(script, grows=BOUNDS)


def test_a_lone_voter_that_comes_back_leads_again() -> None:
    async def script(fleet: Fleet) -> None:
        await until(lambda: fleet.roster.learners == ["h2"], GROWN_S)
        fleet.hosts["h1"].kill()
        await trio.sleep(20.0)
        assert fleet.leaders() == []  # a learner does not lead
        fleet.hosts["h1"].start()
        await until(lambda: led(fleet))
        assert fleet.leaders() == ["h1"]

    in_a_cluster(script, hosts=2, voters=1, grows=BOUNDS)
