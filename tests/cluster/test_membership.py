"""Who is there, as an agent tells it that does not always answer."""

from __future__ import annotations

from typing import Any

import trio
from structlog.testing import capture_logs

from peer.errors import Unavailable
from peer.membership import Membership
from peer.state.member import Member


class Now:
    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class Agent:
    """peer.ports.Gossip; takes no tags until `takes_tags`, and answers nothing while `silent`."""

    def __init__(self) -> None:
        self.silent = False
        self.takes_tags = False
        self.tags: dict[str, str] = {}

    async def members(self) -> tuple[Member, ...]:
        await trio.lowlevel.checkpoint()
        if self.silent:
            raise Unavailable("the agent is silent")
        return (
            Member(peer_id="me", address="10.0.0.1", status="alive", tags=self.tags, port=1),
            Member(peer_id="h2", address="10.0.0.2", status="alive", tags={}, port=1),
        )

    async def set_tags(self, tags: dict[str, str]) -> None:
        await trio.lowlevel.checkpoint()
        if not self.takes_tags:
            raise Unavailable("the agent takes no tags")
        self.tags = dict(tags)


async def test_an_agent_that_takes_no_tags_tells_of_others_all_the_same(autojump_clock: Any) -> None:
    agent, seen = Agent(), []
    membership = Membership("me", agent, Now(), lambda member: seen.append(member.peer_id))  # type: ignore[arg-type]
    membership.announce({"role": "follower"})
    with capture_logs() as logs, trio.move_on_after(60.0):
        await membership.run()
    assert sorted(seen) == ["h2", "me"]
    assert sorted(membership.members) == ["h2", "me"]
    assert [each["event"] for each in logs].count("gossip_not_answering") == 1

    agent.takes_tags = True
    with trio.move_on_after(2.0):
        await membership.run()
    assert agent.tags == {"role": "follower"}
