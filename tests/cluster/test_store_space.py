"""The store of a simulated cluster runs out of room: each voter sees to its own member, and all goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import trio

from peer import store_space
from peer.adapters.clock import SystemClock
from peer.adapters.stores.etcd_client import Header, Member, Status
from peer.adapters.stores.etcd_voting import EtcdUpkeep
from peer.adapters.stores.sqlite_store import SqliteStore
from peer.errors import Ambiguous, BitinglipError, NotFound, Unavailable
from peer.state.command import GetStatus
from simulations.scenario import Scenario
from simulations.world.electorate import BOUNDS
from simulations.world.fleet import Fleet
from simulations.world.kernel import World, run_world
from simulations.world.room import QUOTA, SimRooms
from simulations.world.voting import SimRoster

CURE_S = 90.0  # an alarm, with a new leader at the end
LEADERS_LAST_S = 700.0


async def until(true: Callable[[], bool], within_s: float, what: str) -> None:
    with trio.move_on_after(within_s):
        while not true():  # noqa: ASYNC110 - of other hosts
            await trio.sleep(0.1)
    assert true(), f"{what}: not within {within_s:g} s"


async def grown(world: World, hosts: int = 3) -> tuple[Fleet, SimRooms]:
    fleet = Fleet(world, Scenario(seed=1, hosts=hosts, voters=3, gpus=1), grows=BOUNDS)
    fleet.start()
    voters = 3 if hosts >= 3 else 1
    learners = ["h2"] if hosts == 2 else []
    await until(
        lambda: len(fleet.voters()) == voters and roster_of(fleet).learners == learners, 200.0, "who votes"
    )
    await until(lambda: len(fleet.leaders()) == 1, 20.0, "somebody leads")
    return fleet, roster_of(fleet).rooms


def roster_of(fleet: Fleet) -> SimRoster:
    assert fleet.roster is not None
    return fleet.roster


def member_of(fleet: Fleet, peer_id: str) -> int:
    return next(each for each, member in roster_of(fleet).entries.items() if member.peer_id == peer_id)


@pytest.mark.parametrize("whose", ["leader", "follower"])
def test_a_member_that_reached_its_quota_cures_itself(whose: str) -> None:
    async def main(world: World) -> None:
        fleet, rooms = await grown(world)
        (leader,) = fleet.leaders()
        name = leader if whose == "leader" else next(each for each in fleet.voters() if each != leader)
        rooms.fill(member_of(fleet, name))
        await until(lambda: not fleet.leaders(), 10.0, "nobody leads a store that takes no writes")
        await until(lambda: not rooms.short(set()), CURE_S, "the store is cured")
        await until(lambda: len(fleet.leaders()) == 1, CURE_S, "somebody leads again")
        assert rooms.disarmed == 1
        assert (await fleet.any().call(GetStatus())).room.level == ""

    run_world(main, 1)


def test_who_asks_meanwhile_is_told_why_nobody_leads() -> None:
    async def main(world: World) -> None:
        fleet, rooms = await grown(world, hosts=1)
        rooms.used = QUOTA  # data that no cure makes room for
        rooms.fill(member_of(fleet, "h1"))
        await until(lambda: not fleet.leaders(), 20.0, "nobody leads")
        with pytest.raises(Unavailable, match="the store is full") as refused:
            await fleet.any().call(GetStatus())
        assert refused.value.code == "no_leader"
        assert "store is full" in fleet.any().ready()

    run_world(main, 2)


def test_the_alarm_of_a_host_that_is_gone_is_taken_back_by_others() -> None:
    async def main(world: World) -> None:
        fleet, rooms = await grown(world)
        (leader,) = fleet.leaders()
        name = next(each for each in fleet.voters() if each != leader)
        rooms.fill(member_of(fleet, name))
        fleet.hosts[name].kill(power=True)
        await until(lambda: not rooms.short({name}), CURE_S, "the alarm is taken back")
        await until(lambda: len(fleet.leaders()) == 1, CURE_S, "somebody leads again")

    run_world(main, 3)


def test_others_whose_files_are_near_the_quota_make_room_before_they_take_that_alarm_back() -> None:
    async def main(world: World) -> None:
        fleet, rooms = await grown(world)
        (leader,) = fleet.leaders()
        name = next(each for each in fleet.voters() if each != leader)
        rooms.swell(QUOTA // 100 * 97)
        rooms.fill(member_of(fleet, name))
        fleet.hosts[name].kill(power=True)
        await until(lambda: not rooms.short({name}), CURE_S, "the alarm is taken back")
        await until(lambda: len(fleet.leaders()) == 1, CURE_S, "somebody leads again")

    run_world(main, 6)


def test_files_near_their_quota_are_defragmented_one_after_the_other_and_the_leaders_last() -> None:
    async def main(world: World) -> None:
        fleet, rooms = await grown(world)
        (leader,) = fleet.leaders()
        rooms.swell()
        await until(lambda: rooms.defragmented >= 1, 60.0, "those that do not lead")
        assert fleet.leaders() == [leader]
        assert rooms.is_swollen(member_of(fleet, leader))
        await until(lambda: not rooms.short(set()), LEADERS_LAST_S, "all are")
        assert rooms.disarmed == 0

    run_world(main, 4)


def test_a_full_learner_learns_anew() -> None:
    async def main(world: World) -> None:
        fleet, rooms = await grown(world, hosts=2)
        (learner,) = roster_of(fleet).learners
        before = member_of(fleet, learner)
        rooms.fill(before)
        await until(lambda: not rooms.short(set()), CURE_S, "the alarm is taken back")
        await until(lambda: roster_of(fleet).learners == [learner], CURE_S, "it learns again")
        assert member_of(fleet, learner) != before

    run_world(main, 5)


@pytest.mark.parametrize("error", [None, NotFound("no"), Ambiguous("not answered in time")])
async def test_a_turn_ends_at_once_unless_the_member_may_be_at_it_yet(
    tmp_path: Path, error: BitinglipError | None
) -> None:
    class Upkeep:
        async def defragment(self) -> None:
            if error is not None:
                raise error

    async with trio.open_nursery() as nursery:
        store = await SqliteStore.open(tmp_path / "s.db", nursery, clock=SystemClock())
        nothing: Any = None
        keeper = store_space.SpaceKeeper(nothing, nothing, SystemClock(), nothing)
        upkeep: Any = Upkeep()
        with pytest.raises(type(error)) if error is not None else nullcontext():
            await keeper._alone(upkeep, store)
        assert bool(await store.get([store_space.TURN_KEY])) == isinstance(error, Ambiguous)
        nursery.cancel_scope.cancel()


async def test_who_votes_is_read_after_the_alarms_which_only_a_member_that_is_up_to_date_tells() -> None:
    class Client:
        """Of a member that is behind until it is asked for what all have agreed on."""

        learns = True

        async def status(self) -> Status:
            return Status(header=Header(member_id=1), leader=1, errors=("memberID:2 alarm:NOSPACE",))

        async def alarms(self) -> tuple[tuple[int, str], ...]:
            self.learns = False
            return ((2, "NOSPACE"),)

        async def members(self) -> tuple[Member, ...]:
            return (Member(member_id=1), Member(member_id=2, is_learner=self.learns))

    client: Any = Client()
    found = await EtcdUpkeep(client, QUOTA).look()
    assert found is not None
    assert (found.alarmed, found.voters, found.learners) == ((2,), (1, 2), ())
