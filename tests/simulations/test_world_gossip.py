"""The simulated gossip: what is seen when, what faults make of it, and that asking is cheap."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from peer.errors import Unavailable
from peer.limits import TAGS_BYTES_MAX
from simulations.errors import InvariantViolated, SimulatorError
from simulations.world.gossip import SimGossip, SimGossipPort, tags_bytes
from simulations.world.kernel import Incarnation, World, run_world
from simulations.world.network import SimNetwork

PEERS = ("h1", "h2", "h3", "h4", "h5")


class Cluster:
    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.nursery = nursery
        self.network = SimNetwork(world, world.rng("network"))
        self.gossip = SimGossip(world, self.network, world.rng("gossip"))
        self.ports: dict[str, SimGossipPort] = {}
        self.lives: dict[str, Incarnation] = {}

    def start(self, peer_id: str) -> SimGossipPort:
        life = self.lives[peer_id].life + 1 if peer_id in self.lives else 1
        incarnation = self.lives[peer_id] = Incarnation(self.world, peer_id, life)
        self.network.port(incarnation, f"{peer_id}:1")
        port = self.ports[peer_id] = self.gossip.port(incarnation)
        return port

    async def settle(self, *peers: str) -> None:
        for peer_id in peers or PEERS:
            self.start(peer_id)
        await trio.sleep(2.0)

    async def view(self, observer: str) -> dict[str, str]:
        return {member.peer_id: member.status for member in await self.ports[observer].members()}

    async def tags(self, observer: str, subject: str) -> dict[str, str]:
        (member,) = [each for each in await self.ports[observer].members() if each.peer_id == subject]
        return dict(member.tags)

    async def status(self, observer: str, subject: str) -> str:
        return (await self.view(observer)).get(subject, "")

    async def when(self, observer: str, subject: str, status: str, within_s: float = 60.0) -> float:
        """After how many seconds the observer sees it; fails if not within that time."""
        began = trio.current_time()
        while trio.current_time() - began < within_s:
            if await self.status(observer, subject) == status:
                return trio.current_time() - began
            await trio.sleep(0.05)
        raise AssertionError(
            f"{observer} sees {subject} {await self.status(observer, subject)}, never {status}"
        )


ALIVE = dict.fromkeys(PEERS, "alive")


def scenario(fn: Callable[[Cluster], Awaitable[Any]], seed: int = 1) -> Any:
    async def main(world: World) -> Any:
        async with trio.open_nursery() as nursery:
            result = await fn(Cluster(world, nursery))
            nursery.cancel_scope.cancel()
        return result

    return run_world(main, seed)


# ------------------------------------------------------------------------------------------------ who is there


@pytest.mark.parametrize("seed", range(5))
def test_joins_deaths_and_returns_are_seen_in_time(seed: int) -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle("h1", "h2", "h3", "h4")
        cluster.start("h5")
        assert await cluster.view("h5") == {"h5": "alive"}
        assert 0.1 <= await cluster.when("h1", "h5", "alive") <= 1.6
        await trio.sleep(1.5)
        assert await cluster.view("h5") == ALIVE
        cluster.lives["h5"].crash()
        with pytest.raises(Unavailable):
            await cluster.ports["h5"].members()
        with pytest.raises(Unavailable):
            await cluster.ports["h5"].set_tags({})
        assert 6.4 <= await cluster.when("h1", "h5", "failed") <= 9.1
        cluster.lives["h4"].crash(power=True)
        assert 6.4 <= await cluster.when("h1", "h4", "failed") <= 9.1
        cluster.start("h5")
        assert await cluster.when("h1", "h5", "alive") <= 1.6
        await trio.sleep(1.5)
        assert await cluster.view("h5") == {"h1": "alive", "h2": "alive", "h3": "alive", "h5": "alive"}

    scenario(run, seed)


def test_a_quick_restart_is_never_seen_failed() -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        cluster.lives["h5"].crash()
        await trio.sleep(3.0)
        cluster.start("h5")
        for _ in range(200):
            assert await cluster.view("h1") == ALIVE
            await trio.sleep(0.1)

    scenario(run)


@pytest.mark.parametrize("by_itself", [False, True])
def test_a_polite_leave_is_seen_at_once_and_stays_so(by_itself: bool) -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        if by_itself:
            await cluster.lives["h5"].run(trio.sleep, 0.0)
            cluster.gossip.leave("h5")
        else:
            cluster.gossip.leave("h5")
            with pytest.raises(Unavailable):
                await cluster.ports["h5"].members()
            cluster.lives["h5"].crash()
        cluster.lives["h4"].crash()
        cluster.gossip.leave("h4")  # the dead say no goodbye
        assert await cluster.when("h1", "h5", "left") <= 0.5
        cluster.gossip.mend()
        await trio.sleep(30.0)
        assert await cluster.view("h1") == {**ALIVE, "h4": "failed", "h5": "left"}
        cluster.start("h5")
        assert await cluster.when("h1", "h5", "alive") <= 1.6

    scenario(run)


def test_a_frozen_process_is_alive_to_the_others() -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        cluster.lives["h5"].freeze()
        await trio.sleep(60.0)
        assert await cluster.view("h1") == ALIVE

    scenario(run)


# ------------------------------------------------------------------------------------------------ tags


def test_tags_reach_all_a_little_later() -> None:
    async def run(cluster: Cluster) -> None:
        port = cluster.start("h1")
        await port.set_tags({"role": "early"})  # before anybody has heard of it
        await cluster.settle("h2", "h3")
        for seed in range(20):
            tags = {"role": "leader", "epoch": str(seed)}
            await port.set_tags(tags)
            assert await cluster.tags("h1", "h1") == tags
            await trio.sleep(1.0)
            if not cluster.world.counts["gossip: an update is lost and repaired"]:
                assert await cluster.tags("h2", "h1") != tags
                await trio.sleep(0.7)
                assert await cluster.tags("h2", "h1") == tags
        cluster.start("h4")
        await trio.sleep(1.6)
        assert await cluster.tags("h4", "h1") == tags

    scenario(run)


@pytest.mark.parametrize("seed", range(10))
def test_tags_set_while_others_join_are_not_lost(seed: int) -> None:
    async def run(cluster: Cluster) -> None:
        cluster.start("h1")
        port = cluster.start("h2")
        await trio.sleep(0.05)
        await port.set_tags({"role": "follower"})
        await trio.sleep(40.0)
        assert await cluster.tags("h1", "h2") == {"role": "follower"}

    scenario(run, seed)


def test_lost_updates_are_repaired() -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        slowest = 0.0
        for number in range(300):
            tags = {"n": str(number)}
            await cluster.ports["h1"].set_tags(tags)
            for waits in range(400):
                if await cluster.tags("h2", "h1") == tags:
                    slowest = max(slowest, waits * 0.1)
                    break
                await trio.sleep(0.1)
        assert 15.0 <= slowest <= 30.2

    scenario(run)


def test_tags_that_are_too_long_break_the_contract() -> None:
    async def run(cluster: Cluster, size: int) -> None:
        port = cluster.start("h1")
        tags = {"role": "x" * (size - 10)}
        assert tags_bytes(tags) == size
        await port.set_tags(tags)

    scenario(lambda cluster: run(cluster, TAGS_BYTES_MAX))
    with pytest.raises(InvariantViolated, match="port_contract"):
        scenario(lambda cluster: run(cluster, TAGS_BYTES_MAX + 1))


def test_an_agent_a_life() -> None:
    async def run(cluster: Cluster) -> None:
        cluster.start("h1")
        cluster.gossip.port(Incarnation(cluster.world, "h1", 2))

    with pytest.raises(SimulatorError):
        scenario(run)


# ------------------------------------------------------------------------------------------------ links


def test_one_link_or_a_short_cut_fails_nobody() -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        cluster.network.cut("h1", "h2", for_s=60.0)
        cluster.network.cut("h3", "h4", one_way=True, for_s=60.0)
        cluster.network.isolate("h5", for_s=5.0)
        for _ in range(120):
            assert await cluster.view("h1") == ALIVE
            assert await cluster.view("h5") == ALIVE
            await trio.sleep(0.5)

    scenario(run)


@pytest.mark.parametrize("only", ["", "in", "out"])
def test_who_is_cut_off_is_failed_both_ways_and_comes_back_with_its_newest_tags(only: str) -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        trouble = cluster.network.isolate("h5", only=only)
        assert 6.4 <= await cluster.when("h1", "h5", "failed") <= 9.1
        await trio.sleep(1.0)
        assert await cluster.view("h5") == {**dict.fromkeys(PEERS, "failed"), "h5": "alive"}
        assert await cluster.status("h1", "h2") == "alive"
        await cluster.ports["h5"].set_tags({"role": "candidate"})
        await trio.sleep(5.0)
        assert await cluster.tags("h1", "h5") == {}
        trouble.end()
        assert 0.8 <= await cluster.when("h1", "h5", "alive") <= 5.1
        assert await cluster.tags("h1", "h5") == {"role": "candidate"}
        await trio.sleep(5.0)
        assert await cluster.view("h5") == ALIVE

    scenario(run)


def test_a_ring_of_one_way_links_is_enough_to_hear_of_each_other() -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle("h1", "h2", "h3")
        for pair in (("h1", "h3"), ("h3", "h2"), ("h2", "h1")):
            cluster.network.cut(*pair, one_way=True)
        await trio.sleep(30.0)
        assert set((await cluster.view("h1")).values()) == {"alive"}
        cluster.network.cut("h3", "h1", one_way=True)
        await trio.sleep(30.0)
        assert await cluster.view("h1") == {"h1": "alive", "h2": "failed", "h3": "failed"}

    scenario(run)


def test_a_member_that_died_during_a_partition_is_not_alive_after_it() -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        trouble = cluster.network.partition([["h1", "h2"]])
        await trio.sleep(20.0)
        cluster.lives["h5"].crash()
        trouble.end()
        await trio.sleep(20.0)
        assert await cluster.view("h1") == {**ALIVE, "h5": "failed"}
        assert await cluster.view("h4") == {**ALIVE, "h5": "failed"}

    scenario(run)


# ------------------------------------------------------------------------------------------------ faults


def test_lies_are_told_for_a_time_and_never_of_oneself() -> None:
    async def run(cluster: Cluster) -> None:
        gossip = cluster.gossip
        await cluster.settle()
        gossip.says_dead("h5", for_s=5.0, observers=("h1", "h5"))
        assert await cluster.status("h1", "h5") == "failed"
        assert await cluster.status("h2", "h5") == "alive"
        assert await cluster.status("h5", "h5") == "alive"
        await trio.sleep(5.0)
        assert await cluster.status("h1", "h5") == "alive"
        gossip.says_alive("h5", for_s=30.0)
        cluster.lives["h5"].crash()
        await trio.sleep(29.0)
        assert await cluster.status("h1", "h5") == "alive"
        await trio.sleep(1.0)
        assert await cluster.status("h1", "h5") == "failed"
        gossip.says_dead("h4")
        await trio.sleep(1_000.0)
        assert await cluster.status("h1", "h4") == "failed"
        gossip.mend()
        assert await cluster.status("h1", "h4") == "alive"

    scenario(run)


def test_flapping_goes_to_and_fro() -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        cluster.gossip.flapping("h5", for_s=30.0)
        seen: dict[str, list[str]] = {"h1": [], "h2": []}
        for _ in range(350):
            for observer, statuses in seen.items():
                status = await cluster.status(observer, "h5")
                if not statuses or statuses[-1] != status:
                    statuses.append(status)
            await trio.sleep(0.1)
        assert all(len(statuses) > 8 and statuses[-1] == "alive" for statuses in seen.values())

    scenario(run)


def test_late_news_comes_later_and_a_mended_world_catches_up() -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        cluster.gossip.late(20.0, for_s=1.0, observers=("h1",))
        cluster.lives["h5"].crash()
        assert await cluster.when("h2", "h5", "failed") <= 9.1
        assert 10.0 <= await cluster.when("h1", "h5", "failed") <= 25.0
        cluster.gossip.late(1_000.0)
        cluster.lives["h4"].crash()
        await trio.sleep(60.0)
        assert await cluster.status("h1", "h4") == "alive"
        cluster.gossip.mend()
        assert await cluster.status("h1", "h4") == "failed"

    scenario(run)


@pytest.mark.parametrize("for_s", [0.0, 20.0])
def test_an_agent_that_dies_alone(for_s: float) -> None:
    async def run(cluster: Cluster) -> None:
        await cluster.settle()
        await cluster.ports["h5"].set_tags({"role": "x"})
        cluster.gossip.agent_dies("h5", for_s=for_s)
        with pytest.raises(Unavailable):
            await cluster.ports["h5"].members()
        assert await cluster.when("h1", "h5", "failed") <= 9.1
        await trio.sleep(for_s)
        cluster.gossip.mend()
        assert await cluster.when("h1", "h5", "alive") <= 1.6
        await trio.sleep(1.5)
        assert await cluster.tags("h1", "h5") == {"role": "x"}
        assert await cluster.view("h5") == ALIVE

    scenario(run)


# ------------------------------------------------------------------------------------------------ the whole


async def _busy(cluster: Cluster, peers: int, seconds: float) -> str:
    """Everybody polls twice a second while tags change, links flap and processes die and return."""
    world, rng = cluster.world, cluster.world.rng("faults")
    names = [f"h{number + 1}" for number in range(peers)]

    async def poll(peer_id: str) -> None:
        seen: tuple[Any, ...] = ()
        while True:
            await trio.sleep(0.5)
            try:
                members = await cluster.ports[peer_id].members()
            except Unavailable:
                continue
            if members != seen:
                seen = members
                world.trace.note("seen", peer_id, str([(each.peer_id, each.status) for each in members][:20]))

    for name in names:
        cluster.start(name)
        cluster.nursery.start_soon(poll, name)
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        await trio.sleep(rng.uniform(0.5, 3.0))
        name = rng.choice(names)
        match rng.randrange(6):
            case 0 if cluster.lives[name].alive:
                cluster.lives[name].crash()
            case 0:
                cluster.start(name)
            case 1 if cluster.lives[name].alive:
                await cluster.ports[name].set_tags({"load": str(rng.random())})
            case 2:
                cluster.network.isolate(name, for_s=rng.uniform(1.0, 30.0), flapping=rng.random() < 0.5)
            case 3:
                cluster.gossip.flapping(name, for_s=10.0)
            case 4:
                cluster.gossip.late(10.0, for_s=5.0, observers=(name,))
            case 5:
                cluster.network.partition([names[: peers // 2]], for_s=rng.uniform(1.0, 10.0))
    for name in names:
        if not cluster.lives[name].alive:
            cluster.start(name)
    cluster.network.mend()
    cluster.gossip.mend()
    await trio.sleep(40.0)
    for name in names:
        assert await cluster.view(name) == dict.fromkeys(names, "alive")
        for subject in names:
            assert await cluster.tags(name, subject) == await cluster.tags(subject, subject)
    return world.trace.hexdigest()


def test_the_same_seed_gives_the_same_trace_and_all_settles() -> None:
    hashes = [scenario(lambda cluster: _busy(cluster, 6, 300.0), seed) for seed in (1, 1, *range(2, 10))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_many_peers_are_cheap() -> None:
    async def run(cluster: Cluster) -> None:
        names = [f"h{number + 1}" for number in range(200)]

        async def poll(name: str) -> None:
            for number in range(120):
                await trio.sleep(0.5)
                if number == 20:
                    await cluster.ports[name].set_tags({"role": name})
                members = await cluster.ports[name].members()
            assert sum(each.status == "alive" for each in members) == 200
            assert all(each.tags == {"role": each.peer_id} for each in members)

        async with trio.open_nursery() as nursery:
            for name in names:
                cluster.start(name)
                nursery.start_soon(poll, name)
            await trio.sleep(20.0)
            cluster.network.partition([names[:100]], for_s=15.0)

    began = time.process_time()
    scenario(run)
    assert time.process_time() - began < 15.0
