"""The leadership is handed over on request: to another voter, at once, and without an answer that is lost."""

from __future__ import annotations

import pytest
import trio

from peer.errors import Conflict
from peer.limits import ASIDE_S, GUARD_S
from peer.state import command as asks
from simulations.world.fleet import Fleet
from tests.cluster.rig import finished, follower_of, in_a_cluster, led, submission, until

POLITE_S_MAX = 1.0


async def ask(fleet: Fleet, peer_id: str) -> asks.Led:
    """As the API does: who leads now is to lead no more."""
    await tagged(fleet)
    cluster = fleet.hosts[peer_id].peer.cluster
    status: asks.ClusterStatus = await cluster.call(asks.GetStatus())
    answer: asks.Led = await cluster.call(asks.TransferLeadership(epoch=status.epoch))
    assert answer.epoch > status.epoch
    return answer


async def tagged(fleet: Fleet) -> None:
    """Until the leader knows who votes: here its store is not run by the cluster, so that it is for gossip to say."""
    gossip = fleet.hosts[fleet.leaders()[0]].peer.membership
    await until(lambda: sum("voter" in each.tags for each in gossip.members.values()) == len(fleet.hosts))


@pytest.mark.parametrize("where", ["leader", "follower"])
def test_another_voter_leads_at_once_and_the_first_one_follows(where: str) -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        await tagged(fleet)
        began = trio.current_time()
        answer = await ask(fleet, old if where == "leader" else follower_of(fleet))
        assert trio.current_time() - began < POLITE_S_MAX < GUARD_S
        assert answer.peer_id != old
        await until(lambda: led(fleet))
        assert fleet.leaders() == [answer.peer_id]
        await trio.sleep(2 * ASIDE_S)
        assert fleet.leaders() == [answer.peer_id]

    in_a_cluster(script)


def test_no_write_is_lost_or_left_unclear_meanwhile() -> None:
    async def script(fleet: Fleet) -> None:
        answered: list[asks.Submitted] = []
        over = trio.Event()

        async def clients(name: str) -> None:
            while not over.is_set():
                answered.append(await fleet.hosts[name].peer.cluster.call(submission(tokens=1)))

        async with trio.open_nursery() as nursery:
            for name in fleet.hosts:
                for _ in range(4):
                    nursery.start_soon(clients, name)  # fails the test with the first error
            for _ in range(3):
                await trio.sleep(1.0)
                before = len(answered)
                await ask(fleet, follower_of(fleet))
                await until(lambda seen=before: len(answered) > seen + 20)  # type: ignore[misc]
            over.set()
        for submitted in answered[::10]:
            view = await finished(fleet, follower_of(fleet), submitted.view.task.task_id)
            assert view.result is not None

    in_a_cluster(script)


def test_asked_twice_it_moves_once() -> None:
    async def script(fleet: Fleet) -> None:
        first = await ask(fleet, follower_of(fleet))
        again = asks.TransferLeadership(epoch=first.epoch - 1)
        assert await fleet.hosts[follower_of(fleet)].peer.cluster.call(again) == first

    in_a_cluster(script)


def test_it_stays_where_nobody_else_could_lead() -> None:
    async def alone(fleet: Fleet) -> None:
        leadership = fleet.hosts[fleet.leaders()[0]].peer.election.leadership
        with pytest.raises(Conflict, match="nobody else"):
            await ask(fleet, follower_of(fleet))
        assert fleet.hosts[fleet.leaders()[0]].peer.election.leadership is leadership

    in_a_cluster(alone, hosts=2, voters=1)


def test_a_peer_that_led_leads_again_when_the_next_one_is_lost() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        new = (await ask(fleet, old)).peer_id
        await until(lambda: led(fleet))
        (third,) = set(fleet.hosts) - {old, new}
        fleet.hosts[new].kill()
        took_s = await until(lambda: led(fleet, without=new))
        assert took_s < ASIDE_S
        assert fleet.leaders()[0] in (old, third)

    in_a_cluster(script)


def test_a_peer_that_stops_answers_all_that_it_was_asked() -> None:
    async def script(fleet: Fleet) -> None:
        old, other = fleet.leaders()[0], follower_of(fleet)
        errors: list[BaseException] = []
        done = 0

        async def client() -> None:
            nonlocal done
            while not led(fleet, without=old):
                try:
                    await fleet.hosts[other].peer.cluster.call(submission(tokens=1))
                except Exception as error:
                    errors.append(error)
                done += 1

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(client)
            await trio.sleep(0.5)
            await fleet.hosts[old].peer.drain(5.0)
        assert not errors
        assert done > 10

    in_a_cluster(script)
