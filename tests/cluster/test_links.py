"""What goes wrong on one link costs what went over it, and neither the session nor anybody else."""

from __future__ import annotations

import pytest
import trio

from peer import limits
from peer.errors import TooLarge, Unavailable
from peer.ports import REFUSED, Connection
from peer.state import command as asks
from simulations.world.fleet import Fleet
from tests.cluster.rig import follower_of, in_a_cluster, submission, until


def test_an_answer_that_is_too_large_for_a_frame_is_an_error_and_ends_no_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else whoever asks for it again and again keeps its peer from the cluster, and the peer's tasks are lost."""

    async def script(fleet: Fleet) -> None:
        name = follower_of(fleet)
        cluster, leader = fleet.hosts[name].peer.cluster, fleet.leaders()[0]
        for _ in range(40):
            await cluster.call(submission(tokens=2))
        monkeypatch.setattr(limits, "FRAME_BYTES_MAX", 4_096)
        session = fleet.hosts[leader].peer._followers._sessions[name]
        with pytest.raises(TooLarge):
            await cluster.call(asks.ListTasks(limit=50))
        assert len((await cluster.call(asks.ListTasks(limit=2))).tasks) == 2
        assert fleet.hosts[leader].peer._followers._sessions[name] is session

    in_a_cluster(script)


def test_shared_state_that_is_too_large_for_a_frame_ends_no_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(fleet: Fleet) -> None:
        name, leader = follower_of(fleet), fleet.leaders()[0]
        monkeypatch.setattr(limits, "FRAME_BYTES_MAX", 100)
        fleet.hosts[leader].peer._followers._sessions[name].end("the test ends it")
        await trio.sleep(5.0)
        assert fleet.leaders() == [leader]

    in_a_cluster(script)


def test_a_refusal_that_comes_after_a_new_session_kills_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall between the two, or an address that others do not reach: the peer itself comes back at once."""

    async def script(fleet: Fleet) -> None:
        name, leads = follower_of(fleet), fleet.leaders()[0]
        leading = fleet.hosts[leads].peer
        await trio.sleep(5.0)
        knocks: list[str] = []

        async def refused(peer_id: str, address: str) -> Connection:
            knocks.append(peer_id)
            await trio.sleep(0.9)
            raise Unavailable("nobody listens there, somebody says", code=REFUSED)

        monkeypatch.setattr(leading._network, "dial", refused)
        leading._followers._sessions[name].end("the test ends it")
        await until(lambda: knocks)
        await trio.sleep(5.0)
        assert knocks == [name]
        assert name in leading._followers.linked
        assert name not in leading.leader._snapshot.losses

    in_a_cluster(script)
