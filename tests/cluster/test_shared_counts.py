"""What is the cluster's, whichever peer is asked: rate limits, WebSockets, tickets, revocations, metrics; and what a
peer that is cut off says of itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio

from peer.errors import RateLimited, Unauthorized, Unavailable
from peer.limits import COUNT_S_MAX, HOLD_S_MAX, LINK_SILENT_S, STEP_DOWN_S, TICKET_S
from peer.routing import RoutedCluster
from peer.state import command as asks
from peer.state.key import ApiKey
from peer.state.quota import Client, KeepTicket, RedeemTicket, Spend, Verdict
from simulations.world.fleet import Fleet
from tests.cluster.rig import finished, follower_of, in_a_cluster, led, submission, until

ASK = Spend(key_id="k", per_hour=None, per_minute=10)
TWO = Client(key_id="k", sockets_max=2)
A_KEY = ApiKey(
    key_id="k9",
    owner="tests",
    scopes=("read",),
    secret_sha256="0" * 64,
    created_at=0.0,
    requests_per_hour=None,
    requests_per_minute=None,
)


def clusters(fleet: Fleet) -> list[RoutedCluster]:
    """Of all hosts, the leader's first."""
    leader = fleet.leaders()[0]
    names = sorted(fleet.hosts, key=lambda name: name != leader)
    return [fleet.hosts[name].peer.cluster for name in names]


async def spend(cluster: RoutedCluster, ask: Spend = ASK) -> Verdict:
    verdict = await cluster.spend(ask)
    assert verdict is not None
    return verdict


async def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returned or which Unavailable it raised, and the virtual seconds that it took."""
    began = trio.current_time()
    try:
        answer = await work()
    except Unavailable as error:
        answer = error
    return answer, trio.current_time() - began


# ---------------------------------------------------------------- rate limits


def test_all_peers_share_one_window() -> None:
    async def script(fleet: Fleet) -> None:
        peers = clusters(fleet)
        verdicts = [await spend(peers[number % 3]) for number in range(13)]
        assert [each.allowed for each in verdicts] == [True] * 10 + [False] * 3
        assert [each.remaining for each in verdicts] == [*range(9, -1, -1), 0, 0, 0]
        assert {each.limit for each in verdicts} == {10}
        assert all(each.retry_after_s > 0 for each in verdicts[10:])
        await trio.sleep(verdicts[-1].retry_after_s)
        assert (await spend(peers[1])).allowed

    in_a_cluster(script)


def test_requests_at_the_same_moment_never_exceed_the_limit() -> None:
    async def script(fleet: Fleet) -> None:
        allowed = []

        async def one(cluster: RoutedCluster) -> None:
            allowed.append((await spend(cluster)).allowed)

        async with trio.open_nursery() as nursery:
            for cluster in clusters(fleet) * 10:
                nursery.start_soon(one, cluster)
        assert allowed.count(True) == 10

    in_a_cluster(script)


def test_without_a_leader_each_peer_goes_by_its_own_count() -> None:
    async def script(fleet: Fleet) -> None:
        name = follower_of(fleet)
        cluster = fleet.hosts[name].peer.cluster
        for _ in range(4):
            assert (await spend(cluster)).allowed
        fleet.network.isolate(name)
        verdict, took_s = await timed(lambda: spend(cluster))  # it still believes in its session
        assert verdict.allowed
        assert verdict.remaining == 5
        assert took_s <= COUNT_S_MAX
        await until(lambda: not fleet.hosts[name].peer.follower.leader)
        rest = [await timed(lambda: spend(cluster)) for _ in range(6)]
        assert [verdict.allowed for verdict, _ in rest] == [True] * 5 + [False]
        assert all(took_s < 0.01 for _, took_s in rest)

    in_a_cluster(script)


def test_a_new_leader_begins_with_what_it_has_let_through() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        for cluster in clusters(fleet):
            for _ in range(3):
                await spend(cluster)
        fleet.hosts[old].kill()
        await until(lambda: led(fleet, without=old))
        verdict = await spend(fleet.hosts[fleet.leaders()[0]].peer.cluster)
        assert verdict.remaining == 10 - 3 - 1

    in_a_cluster(script)


# ---------------------------------------------------------------- WebSockets


def counted(fleet: Fleet) -> dict[str, int]:
    return dict(fleet.hosts[fleet.leaders()[0]].peer.leader.quota.sockets)


def test_websockets_count_at_all_peers_together() -> None:
    async def script(fleet: Fleet) -> None:
        leader, one, other = clusters(fleet)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(leader.events(None, TWO))
            await stack.enter_async_context(one.events(None, TWO))
            assert counted(fleet) == {"k": 2}
            for cluster in (leader, one, other):
                with pytest.raises(RateLimited, match="2 WebSocket connections") as refused:
                    async with cluster.events(None, TWO):
                        pass
                assert refused.value.code == "too_many_websockets"
            async with other.events(None, Client(key_id="k2", sockets_max=1)):
                assert counted(fleet) == {"k": 2, "k2": 1}
        await until(lambda: not counted(fleet), 1.0)
        async with other.events(None, TWO):
            pass

    in_a_cluster(script)


def test_the_websockets_of_a_peer_that_dies_are_released() -> None:
    async def script(fleet: Fleet) -> None:
        name = follower_of(fleet)

        async def read() -> None:
            async with fleet.hosts[name].peer.cluster.events(None, TWO) as events:
                async for _ in events:
                    pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await until(lambda: counted(fleet) == {"k": 1}, 1.0)
            fleet.network.isolate(name)
            await until(lambda: not counted(fleet), 2 * LINK_SILENT_S)
            fleet.network.mend()
            await until(lambda: counted(fleet) == {"k": 1})  # its client is still there, and counts again
            nursery.cancel_scope.cancel()
        await until(lambda: not counted(fleet), 1.0)

    in_a_cluster(script)


def test_websockets_are_counted_by_the_next_leader_too() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        rest = [host.peer.cluster for name, host in fleet.hosts.items() if name != old]

        async def read(cluster: RoutedCluster) -> None:
            async with cluster.events(None, TWO) as events:
                async for _ in events:
                    pass

        async with trio.open_nursery() as nursery:
            for cluster in rest:
                nursery.start_soon(read, cluster)
            await until(lambda: counted(fleet) == {"k": 2}, 1.0)
            fleet.hosts[old].kill()
            await until(lambda: led(fleet, without=old))
            await until(lambda: counted(fleet) == {"k": 2}, 2.0)
            with pytest.raises(RateLimited):
                async with rest[0].events(None, TWO):
                    pass
            nursery.cancel_scope.cancel()

    in_a_cluster(script)


# ---------------------------------------------------------------- tickets


def test_a_ticket_is_redeemed_once_at_any_peer() -> None:
    async def script(fleet: Fleet) -> None:
        leader, one, other = clusters(fleet)
        for number, (maker, taker) in enumerate(((one, other), (leader, one), (one, leader))):
            ticket = f"ticket-{number}"
            await maker.call(KeepTicket(ticket=ticket, key_id="k"))
            assert await taker.call(RedeemTicket(ticket=ticket)) == "k"
            for cluster in (leader, one, other):
                with pytest.raises(Unauthorized):
                    await cluster.call(RedeemTicket(ticket=ticket))
        await one.call(KeepTicket(ticket="late", key_id="k"))
        await trio.sleep(TICKET_S)
        with pytest.raises(Unauthorized):
            await other.call(RedeemTicket(ticket="late"))

    in_a_cluster(script)


def test_an_unused_ticket_ends_with_its_leader() -> None:
    async def script(fleet: Fleet) -> None:
        old, name = fleet.leaders()[0], follower_of(fleet)
        cluster = fleet.hosts[name].peer.cluster
        await cluster.call(KeepTicket(ticket="t", key_id="k"))
        fleet.hosts[old].kill()
        await until(lambda: led(fleet, without=old))
        with pytest.raises(Unauthorized):
            await cluster.call(RedeemTicket(ticket="t"))

    in_a_cluster(script)


# ---------------------------------------------------------------- keys, models, metrics


def test_a_key_revoked_at_one_peer_is_refused_at_the_others_at_once() -> None:
    async def script(fleet: Fleet) -> None:
        leader, one, other = clusters(fleet)
        await one.call(asks.CreateKey(key=A_KEY))
        await trio.sleep(0.1)
        assert all(cluster.key("k9") for cluster in (leader, one, other))
        await one.call(asks.RevokeKey(key_id="k9"))
        for cluster in (leader, one):  # where it was done, and where it was asked for: when that is answered
            found = cluster.key("k9")
            assert found is not None
            assert found.revoked_at
        assert await until(lambda: other.key("k9").revoked_at) < 0.1

    in_a_cluster(script)


def test_models_and_metrics_are_the_same_at_every_peer() -> None:
    async def script(fleet: Fleet) -> None:
        peers = clusters(fleet)
        submitted = await peers[2].call(submission())
        await finished(fleet, follower_of(fleet), submitted.view.task.task_id)
        await peers[1].call(asks.AssignModel(model_name="m0", worker_ids=(), preload=True, priority=5))
        metrics = [await cluster.call(asks.GetMetrics(timeframe="1h")) for cluster in peers]
        assert metrics[0].total_tasks == 1
        assert metrics == [metrics[0]] * 3
        wished = [await cluster.call(asks.ListAssignments()) for cluster in peers]
        wishes = [[wish for view in each for wish in view.wishes] for each in wished]
        assert wishes[0]
        assert wishes == [wishes[0]] * 3

    in_a_cluster(script)


# ---------------------------------------------------------------- the minority side


def test_a_follower_that_is_cut_off_answers_reads_marked_and_refuses_writes() -> None:
    async def script(fleet: Fleet) -> None:
        name = follower_of(fleet)
        peer = fleet.hosts[name].peer
        cluster = peer.cluster
        await cluster.call(asks.CreateKey(key=A_KEY))
        fresh, age_s = await cluster.read(asks.ListWorkers())
        assert age_s is None
        task = (await cluster.call(submission(tokens=2_000))).view.task
        await cluster.call(asks.GetTask(task_id=task.task_id))
        fleet.network.isolate(name)
        await trio.sleep(30.0)
        assert not peer.follower.leader

        (answer, age_s), took_s = await timed(lambda: cluster.read(asks.ListWorkers()))
        assert answer == fresh
        assert age_s == pytest.approx(30.0, abs=5.0)
        assert took_s < 0.01
        old, age_s = await cluster.read(asks.GetTask(task_id=task.task_id, wait_s=5.0))
        assert old.task.task_id == task.task_id
        assert age_s > 0

        assert cluster.key("k9").key_id == "k9"  # who is known is still known
        assert "no leader" in cluster.ready()
        for refused in (asks.ListWorkers(), submission(), asks.RevokeKey(key_id="k9")):
            error, took_s = await timed(lambda refused=refused: cluster.call(refused))
            assert isinstance(error, Unavailable)
            assert error.code == "no_leader"
            assert error.retry_after_s
            assert "majority" in error.message
            assert HOLD_S_MAX <= took_s < HOLD_S_MAX + 1.0
        error, _ = await timed(lambda: cluster.read(asks.GetMetrics(timeframe="7d")))  # it never had that
        assert isinstance(error, Unavailable)

        fleet.network.mend()
        await until(lambda: led(fleet))
        answer, age_s = await cluster.read(asks.ListWorkers())
        assert age_s is None
        view = await finished(fleet, name, task.task_id)
        assert view.task.completed_at is not None

    in_a_cluster(script)


def test_a_leader_that_is_cut_off_does_the_same() -> None:
    async def script(fleet: Fleet) -> None:
        name = fleet.leaders()[0]
        peer = fleet.hosts[name].peer
        cluster = peer.cluster
        await cluster.call(asks.CreateKey(key=A_KEY))
        await cluster.read(asks.GetStatus())
        fleet.network.isolate(name)
        answer, took_s = await timed(lambda: cluster.read(asks.GetStatus()))
        assert took_s < STEP_DOWN_S + 1.0
        assert answer[1] is None or answer[1] > 0
        await until(lambda: peer.leader is None, STEP_DOWN_S + 1.0)
        status, age_s = await cluster.read(asks.GetStatus())
        assert status.leader == name
        assert age_s > 0
        assert cluster.key("k9") == A_KEY
        error, _ = await timed(lambda: cluster.call(submission()))
        assert isinstance(error, Unavailable)
        assert error.code == "no_leader"

    in_a_cluster(script)


def test_a_peer_that_has_never_heard_of_a_key_refuses_none() -> None:
    async def script(fleet: Fleet) -> None:
        name = follower_of(fleet)
        host = fleet.hosts[name]
        before = host.peer
        host.kill()
        fleet.network.isolate(name)
        host.start()
        await until(lambda: host.peer is not before and host.peer is not None)
        with pytest.raises(Unavailable, match="majority"):
            host.peer.cluster.key("k9")

    in_a_cluster(script)
