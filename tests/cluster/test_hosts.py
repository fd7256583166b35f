"""Hosts join, renew and are revoked through any peer: the leader decides, and every peer knows who is out."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from peer.errors import Unauthorized, Unavailable
from peer.state import enrol as records
from peer.state.command import AssignModel
from peer.state.enrol import (
    CreateJoinToken,
    Enrol,
    Enrolled,
    GetAuthority,
    ListHosts,
    Renew,
    RevokeHost,
)
from peer.state.task import Status
from simulations.world.fleet import Fleet
from tests.cluster.rig import finished, in_a_cluster, led, submission, until
from tests.leader.authority import FakeAuthority

ID, SECRET, KEY = "0123456789ab", "ab" * 16, "11" * 32
TOKEN = CreateJoinToken(token_id=ID, secret_sha256=records.digest(SECRET), ttl_s=60.0)
JOIN = Enrol(token_id=ID, secret_sha256=records.digest(SECRET), peer_id="new-1", csr="CSR", key_sha256=KEY)


def authorities(hosts: int) -> dict[str, FakeAuthority]:
    return {name: FakeAuthority(name) for name in (f"h{number}" for number in range(1, hosts + 1))}


async def call(fleet: Fleet, name: str, request: Any) -> Any:
    peer = fleet.hosts[name].peer
    assert peer is not None
    with trio.fail_after(60.0):
        return await peer.cluster.call(request)


def followers(fleet: Fleet) -> list[str]:
    return [name for name in fleet.hosts if name not in fleet.leaders()]


def renewal(name: str) -> Renew:
    return Renew(peer_id=name, csr="CSR", key_sha256=KEY)


async def code_of(fleet: Fleet, name: str, request: Any) -> str:
    with pytest.raises(Unauthorized) as caught:
        await call(fleet, name, request)
    return caught.value.code


def test_a_host_joins_through_a_follower_with_a_token_of_another() -> None:
    held = authorities(3)

    async def script(fleet: Fleet) -> None:
        first, second = followers(fleet)
        made = await call(fleet, first, TOKEN)
        assert made.ca_sha256 == "ca" * 32
        forged = records.digest("cd" * 16)
        for wrong in (
            Enrol("0" * 12, JOIN.secret_sha256, "new-1", "CSR", KEY),
            Enrol(ID, forged, "new-1", "CSR", KEY),
        ):
            assert await code_of(fleet, second, wrong) == "join_token_invalid"
        await until(lambda: len(fleet.hosts[fleet.leaders()[0]].peer.membership.seeds()) == 3)
        enrolled = await call(fleet, second, JOIN)
        assert isinstance(enrolled, Enrolled)
        assert (enrolled.peer_id, len(enrolled.seeds)) == ("new-1", 3)
        assert all(seed.endswith(":7946") for seed in enrolled.seeds)
        assert [name for name, each in held.items() if each.signed] == fleet.leaders()
        other = Enrol(ID, JOIN.secret_sha256, "new-2", "CSR", "22" * 32)
        assert await code_of(fleet, first, other) == "join_token_used"
        assert (await call(fleet, first, JOIN)).peer_id == "new-1"  # its answer may have been lost
        listed = {view.peer_id: view.status for view in await call(fleet, first, ListHosts())}
        assert listed == {"new-1": "offline", fleet.leaders()[0]: "online"}

    in_a_cluster(script, authorities=held)


def test_a_token_expires_also_under_the_next_leader() -> None:
    async def script(fleet: Fleet) -> None:
        old, other = fleet.leaders()[0], followers(fleet)[0]
        await call(fleet, other, TOKEN)
        fleet.hosts[old].kill()
        await until(lambda: led(fleet, without=old))
        assert (await call(fleet, other, JOIN)).peer_id == "new-1"
        await trio.sleep(61.0)
        assert await code_of(fleet, other, JOIN) == "join_token_expired"

    in_a_cluster(script, authorities=authorities(3))


def test_a_peer_asks_for_itself_only() -> None:
    async def script(fleet: Fleet) -> None:
        first, second = followers(fleet)
        assert await code_of(fleet, first, renewal(second)) == "not_this_peer"
        assert await code_of(fleet, first, GetAuthority(peer_id=second)) == "not_this_peer"
        assert (
            await code_of(fleet, first, GetAuthority(peer_id=first)) == "not_a_voter"
        )  # not known to be one
        renewed = await call(fleet, first, renewal(first))
        assert renewed.peer_id == first
        assert (await call(fleet, first, GetAuthority(peer_id=first))).pem == "KEY"
        leader = fleet.leaders()[0]
        assert (await call(fleet, leader, renewal(leader))).peer_id == leader

    in_a_cluster(script, authorities=authorities(3))


def test_a_revoked_host_is_cut_off_by_every_peer_and_its_tasks_are_run_elsewhere() -> None:
    async def script(fleet: Fleet) -> None:
        out = "h4"
        await call(fleet, out, renewal(out))
        leader = fleet.hosts[fleet.leaders()[0]].peer.leader
        await until(lambda: "h4-gpu0" in leader._snapshot.workers)
        await call(fleet, "h1", AssignModel("m0", ("h4-gpu0",), preload=True, priority=5))
        tasks = [(await call(fleet, "h1", submission(tokens=400))).view.task.task_id for _ in range(4)]

        def on_it() -> list[str]:
            return [
                task_id
                for worker_id, held in leader._snapshot.held.items()
                if leader._snapshot.workers[worker_id].peer_id == out
                for task_id in held
            ]

        await until(on_it)
        began, lost = trio.current_time(), on_it()
        revocation = await call(fleet, followers(fleet)[0], RevokeHost(name=out, revoked_by="me"))
        assert revocation.peer_id == out
        await until(lambda: not fleet.hosts[out].peer.follower.leader)
        await until(lambda: not on_it())
        assert trio.current_time() - began < 1.5
        rest = [name for name in fleet.hosts if name != out]
        for name in rest:
            peer, address = fleet.hosts[name].peer, fleet.hosts[out].address
            with pytest.raises(Unavailable, match="revoked"):
                await peer._network.dial(out, address)
            with pytest.raises(Unavailable):
                await fleet.hosts[out].peer._network.dial(name, fleet.hosts[name].address)
        for task_id in tasks:
            view = await finished(fleet, rest[0], task_id)
            assert view.task.status is Status.COMPLETED
            assert view.task.worker_id is not None
            assert (task_id not in lost) or not view.task.worker_id.startswith(out)
        # It stays out under the next leader and after the death of those who knew, for it is in the store.
        old = fleet.leaders()[0]
        fleet.hosts[old].kill()
        await until(lambda: led_but(fleet, {old, out}))
        fleet.hosts[old].start()
        await until(lambda: led_but(fleet, {out}))
        await trio.sleep(5.0)
        assert fleet.hosts[out].peer.follower.leader == ""
        with pytest.raises(Unavailable):
            await fleet.hosts[old].peer._network.dial(out, fleet.hosts[out].address)

    in_a_cluster(script, hosts=4, voters=3, authorities=authorities(4))


def led_but(fleet: Fleet, out: set[str]) -> bool:
    """One leads and all others but these follow."""
    leaders = [name for name in fleet.leaders() if name not in out]
    return len(leaders) == 1 and all(
        host.peer is not None and host.peer.follower.leader == leaders[0]
        for name, host in fleet.hosts.items()
        if name not in (leaders[0], *out)
    )
