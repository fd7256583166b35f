"""What every `peer.ports.Gossip` must do: a hint that is late, but right in the end while nobody is at fault.

A test module subclasses `GossipContract` and says how a scenario is played. Nothing here sleeps and hopes: what is to
be seen is polled for, within bounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping

import pytest
import trio

from peer.errors import Unavailable
from peer.ports import Gossip
from peer.state.member import Member

PEERS = ("h1", "h2", "h3")
SEEN_S_MAX = 40.0  # joins and tags take a second or two, lost ones half a minute
FAILED_S_MAX = 30.0  # seven and more
POLL_S = 0.05

View = Mapping[str, Member]


class Rig(ABC):
    """Agents of peers, each life of which has a `Gossip`."""

    def __init__(self) -> None:
        self.gossips: dict[str, Gossip] = {}

    @abstractmethod
    async def start(self, peer_id: str) -> None:
        """A new life: its agent starts and joins the others."""

    @abstractmethod
    async def kill(self, peer_id: str) -> None:
        """Peer and agent end at once."""

    @abstractmethod
    async def leave(self, peer_id: str) -> None:
        """They end politely."""

    @abstractmethod
    def address(self, peer_id: str) -> str:
        """Of its host."""

    @abstractmethod
    def port(self, peer_id: str) -> int:
        """Of its gossip."""

    async def view(self, observer: str) -> View:
        return {member.peer_id: member for member in await self.gossips[observer].members()}

    async def seen(
        self, what: str, holds: Callable[[View], bool], *observers: str, within_s: float = SEEN_S_MAX
    ) -> None:
        """Until it holds in the eyes of all of these (all that run by default)."""
        for observer in observers or tuple(self.gossips):
            with trio.move_on_after(within_s) as scope:
                while not holds(await self.view(observer)):  # noqa: ASYNC110 - agents are polled
                    await trio.sleep(POLL_S)
            assert not scope.cancelled_caught, f"{observer}: {what}: {await self.view(observer)}"

    async def all_alive(self) -> None:
        names = set(self.gossips)
        await self.seen("all are alive", lambda view: names <= {n for n in view if view[n].status == "alive"})

    async def start_all(self) -> None:
        for peer_id in PEERS:
            await self.start(peer_id)
        await self.all_alive()


Scenario = Callable[[Rig], Awaitable[None]]


def tagged(subject: str, tags: Mapping[str, str]) -> Callable[[View], bool]:
    return lambda view: subject in view and view[subject].tags == tags


def called(subject: str, *statuses: str) -> Callable[[View], bool]:
    return lambda view: subject in view and view[subject].status in statuses


class GossipContract(ABC):
    @abstractmethod
    def play(self, scenario: Scenario) -> None:
        """Run it with a rig without agents."""

    def test_an_agent_knows_itself_and_its_tags_at_once(self) -> None:
        async def scenario(rig: Rig) -> None:
            await rig.start("h1")
            (me,) = await rig.gossips["h1"].members()
            address, port = rig.address("h1"), rig.port("h1")
            assert me == Member(peer_id="h1", address=address, status="alive", tags={}, port=port)
            for tags in ({"role": "leader", "epoch": "7"}, {"epoch": "8", "é~": "ü \u2028"}, {}, {"a": ""}):
                await rig.gossips["h1"].set_tags(tags)
                assert (await rig.view("h1"))["h1"].tags == tags

        self.play(scenario)

    def test_tags_are_replaced_and_reach_everybody(self) -> None:
        async def scenario(rig: Rig) -> None:
            await rig.start_all()
            for observer in PEERS:
                for subject, member in (await rig.view(observer)).items():
                    assert (member.peer_id, member.address) == (subject, rig.address(subject))
                    assert member.port == rig.port(subject)
            for tags in ({"role": "follower", "link": "127.0.0.1:1"}, {"role": "leader", "epoch": "3"}, {}):
                await rig.gossips["h2"].set_tags(tags)
                await rig.seen(f"tags {tags}", tagged("h2", tags))

        self.play(scenario)

    def test_as_many_tags_as_are_allowed(self) -> None:
        async def scenario(rig: Rig) -> None:
            await rig.start("h1")
            await rig.start("h2")
            await rig.all_alive()
            tags = {"a": "x" * 240, "b": "y" * 240}  # with what Serf adds: less than 512 bytes
            await rig.gossips["h1"].set_tags(tags)
            await rig.seen("long tags", tagged("h1", tags))

        self.play(scenario)

    def test_who_is_killed_fails_and_who_is_back_is_alive_without_tags(self) -> None:
        async def scenario(rig: Rig) -> None:
            await rig.start_all()
            await rig.gossips["h3"].set_tags({"role": "leader"})
            await rig.seen("tags", tagged("h3", {"role": "leader"}))
            old = rig.gossips["h3"]
            await rig.kill("h3")
            for call in (old.members, lambda: old.set_tags({"a": "b"})):
                with pytest.raises(Unavailable):
                    await call()
            await rig.seen("h3 has failed", called("h3", "failed"), "h1", "h2", within_s=FAILED_S_MAX)
            assert (await rig.view("h1"))["h3"].tags == {"role": "leader"}  # the last that was heard
            await rig.start("h3")
            await rig.all_alive()
            assert (await rig.view("h3"))["h3"].tags == {}
            await rig.gossips["h3"].set_tags({"role": "follower"})
            await rig.seen("tags of the new life", tagged("h3", {"role": "follower"}))

        self.play(scenario)

    def test_who_leaves_has_left_soon_and_may_come_back(self) -> None:
        async def scenario(rig: Rig) -> None:
            await rig.start_all()
            began = trio.current_time()
            await rig.leave("h2")
            await rig.seen("h2 has left", called("h2", "left"), "h1", "h3")
            assert trio.current_time() - began < FAILED_S_MAX
            await rig.start("h2")
            await rig.all_alive()

        self.play(scenario)
