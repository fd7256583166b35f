"""How peers act together: who leads, what followers answer, and what survives the leader."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from peer.errors import NotFound, Unavailable
from peer.limits import GUARD_S, RELINK_S, STEP_DOWN_S
from peer.ports import LEADER_KEY, Delete
from peer.state import command as asks
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.task import Status
from simulations.world.cards import expected_text
from simulations.world.fleet import Fleet
from tests.cluster.rig import finished, follower_of, in_a_cluster, led, submission, until

A_KEY = ApiKey(
    key_id="k9",
    owner="tests",
    scopes=("read",),
    secret_sha256="0" * 64,
    created_at=0.0,
    requests_per_hour=None,
    requests_per_minute=None,
)


def test_any_peer_takes_a_task_and_any_other_answers() -> None:
    async def script(fleet: Fleet) -> None:
        ask = submission()
        submitted = await fleet.hosts[follower_of(fleet)].peer.cluster.call(ask)
        for name in fleet.hosts:
            view = await finished(fleet, name, submitted.view.task.task_id)
            assert view.task.status is Status.COMPLETED
            assert view.result is not None
            assert view.result.generated_text == expected_text(ask.parameters)

    in_a_cluster(script)


def test_errors_come_through_a_follower_as_they_are() -> None:
    async def script(fleet: Fleet) -> None:
        with pytest.raises(NotFound, match="there is no model") as error:
            await fleet.hosts[follower_of(fleet)].peer.cluster.call(submission(model="m00"))
        assert error.value.details["nearest"]

    in_a_cluster(script)


def test_a_killed_leader_is_replaced_past_the_guard_and_its_task_is_done() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        other = follower_of(fleet)
        submitted = await fleet.hosts[other].peer.cluster.call(submission(tokens=400))
        epoch = fleet.hosts[old].peer.election.leadership.epoch
        fleet.hosts[old].kill()
        took_s = await until(lambda: led(fleet, without=old))
        assert GUARD_S <= took_s < 4.0
        new = fleet.leaders()[0]
        assert fleet.hosts[new].peer.election.leadership.epoch > epoch
        view = await finished(fleet, other, submitted.view.task.task_id)
        assert view.task.status is Status.COMPLETED

    in_a_cluster(script)


def test_a_request_that_was_not_sent_is_held_until_somebody_leads() -> None:
    async def script(fleet: Fleet) -> None:
        old, other = fleet.leaders()[0], follower_of(fleet)
        fleet.hosts[old].kill()
        await until(lambda: not fleet.hosts[other].peer.follower.leader)
        submitted = await fleet.hosts[other].peer.cluster.call(submission())
        assert submitted.view.task.status is Status.QUEUED

    in_a_cluster(script)


def test_without_a_majority_nothing_is_accepted_and_the_leader_steps_down() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        fleet.network.isolate(old)
        took_s = await until(lambda: fleet.hosts[old].peer.leader is None)
        assert took_s < STEP_DOWN_S + 1.0
        with pytest.raises(Unavailable):
            await fleet.hosts[old].peer.cluster.call(submission())
        assert led(fleet, without=old)
        fleet.network.mend()
        await until(lambda: led(fleet))

    in_a_cluster(script)


def test_a_store_that_is_silent_for_a_moment_costs_a_command_and_not_the_leadership() -> None:
    async def script(fleet: Fleet) -> None:
        host = fleet.hosts[fleet.leaders()[0]]
        leadership = host.peer.election.leadership
        fleet.network.isolate(host.peer_id, for_s=2.2)
        with pytest.raises(Unavailable, match="the store does not answer"):
            await host.peer.leader.call(asks.CancelTask(task_id="task-none"))
        await until(lambda: led(fleet))
        assert host.peer.election.leadership is leadership
        assert host.lives == 1

    in_a_cluster(script)


def test_a_leader_whose_commits_fail_goes_on_as_a_follower() -> None:
    async def script(fleet: Fleet) -> None:
        host = fleet.hosts[fleet.leaders()[0]]
        leadership = host.peer.election.leadership
        fleet.store.apply_txn([], [Delete(LEADER_KEY)], [], "h9")
        with pytest.raises(Unavailable):
            await host.peer.leader.call(submission())
        await until(lambda: leadership.lost)
        await until(lambda: led(fleet))
        assert host.lives == 1

    in_a_cluster(script)


def test_a_leader_that_is_lost_while_it_makes_sure_of_an_answer_goes_on_as_a_follower() -> None:
    async def script(fleet: Fleet) -> None:
        host = fleet.hosts[fleet.leaders()[0]]
        fleet.network.isolate(host.peer_id)
        await until(lambda: not host.peer.election.leadership.fresh())
        refused = asks.UnloadModel(model_name="unknown", worker_ids=(), force=False)
        with pytest.raises(Unavailable):
            await host.peer.leader.call(refused)
        await trio.sleep(1.0)
        assert host.up
        assert host.lives == 1

    in_a_cluster(script)


def test_a_polite_stop_hands_over_without_waiting_for_the_guard() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        fleet.world.spawn(fleet.hosts[old].stop)
        took_s = await until(lambda: [name for name in fleet.leaders() if name != old])
        assert took_s < GUARD_S

    in_a_cluster(script)


def test_a_link_that_breaks_does_not_depose_a_leader_that_can_write() -> None:
    async def script(fleet: Fleet) -> None:
        old = fleet.leaders()[0]
        epoch = fleet.hosts[old].peer.election.leadership.epoch
        for name in fleet.hosts:
            if name != old:
                fleet.network.reset(old, name)
        await trio.sleep(5.0)
        assert fleet.leaders() == [old]
        assert fleet.hosts[old].peer.election.leadership.epoch == epoch
        assert led(fleet)

    in_a_cluster(script)


def test_a_voter_finds_the_leader_in_the_store_when_gossip_knows_nobody() -> None:
    async def script(fleet: Fleet) -> None:
        other = fleet.hosts[follower_of(fleet)]
        before = other.peer
        other.kill()
        other.start()
        await until(lambda: other.peer is not before and other.peer is not None)
        fleet.gossip.agent_dies(other.peer_id)
        await until(lambda: other.peer.follower.leader == fleet.leaders()[0], 10.0)
        assert set(other.peer.membership.members) <= {other.peer_id}

    in_a_cluster(script)


def test_the_tasks_of_a_process_that_has_ended_wait_for_no_time_limit() -> None:
    async def script(fleet: Fleet) -> None:
        leader = fleet.hosts[fleet.leaders()[0]].peer.leader
        held: dict[str, str] = {}  # by follower, a task that it runs

        async def spread() -> bool:
            submitted = await leader.call(submission(tokens=2_000))
            await trio.sleep(5.0)
            view = await leader.call(asks.GetTask(task_id=submitted.view.task.task_id))
            peer_id = (view.task.worker_id or "").partition("-")[0]
            if view.task.status is Status.RUNNING and peer_id not in fleet.leaders():
                held[peer_id] = view.task.task_id
            return bool(held)

        with trio.fail_after(300.0):
            while not await spread():
                pass
        peer_id, task_id = held.popitem()
        fleet.hosts[peer_id].kill()
        began = trio.current_time()
        while (await leader.call(asks.GetTask(task_id=task_id))).task.status is Status.RUNNING:
            await trio.sleep(0.01)
            assert trio.current_time() - began < RELINK_S / 2

    in_a_cluster(script)


def test_keys_reach_every_peer_and_so_do_revocations() -> None:
    async def script(fleet: Fleet) -> None:
        cluster = fleet.hosts[follower_of(fleet)].peer.cluster
        await cluster.call(asks.CreateKey(key=A_KEY))
        await until(lambda: all(host.peer.cluster.key("k9") for host in fleet.hosts.values()), 1.0)
        await cluster.call(asks.RevokeKey(key_id="k9"))
        await until(lambda: all(host.peer.cluster.key("k9").revoked_at for host in fleet.hosts.values()), 1.0)

    in_a_cluster(script)


def test_a_reader_of_events_sees_each_once_across_a_failover() -> None:
    async def script(fleet: Fleet) -> None:
        old, other = fleet.leaders()[0], follower_of(fleet)
        seen: list[Event] = []

        async def read() -> None:
            async with fleet.hosts[other].peer.cluster.events(0) as events:
                async for event in events:
                    seen.append(event)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for _ in range(3):
                await fleet.hosts[other].peer.cluster.call(submission())
            fleet.hosts[old].kill()
            await until(lambda: led(fleet, without=old))
            for _ in range(3):
                await fleet.hosts[other].peer.cluster.call(submission())
            await until(lambda: sum(event.event == "task_completed" for event in seen) == 6)
            nursery.cancel_scope.cancel()
        assert [event.id for event in seen] == list(range(1, len(seen) + 1))

    in_a_cluster(script)


def test_a_repeated_key_names_the_first_task_whoever_leads() -> None:
    async def script(fleet: Fleet) -> None:
        old, other = fleet.leaders()[0], follower_of(fleet)
        first = await fleet.hosts[other].peer.cluster.call(submission(tokens=200, key="once"))
        fleet.hosts[old].kill()
        await until(lambda: led(fleet, without=old))
        again = await fleet.hosts[other].peer.cluster.call(submission(tokens=200, key="once"))
        assert again.replayed
        assert again.view.task.task_id == first.view.task.task_id

    in_a_cluster(script)


def test_peers_of_two_wire_versions_work_together() -> None:
    async def script(fleet: Fleet) -> None:
        assert fleet.hosts["h1"].wire != fleet.hosts["h2"].wire
        for name in fleet.hosts:
            submitted = await fleet.hosts[name].peer.cluster.call(submission())
            assert (await finished(fleet, name, submitted.view.task.task_id)).task.status is Status.COMPLETED

    in_a_cluster(script, upgraded=("h1",))


def test_a_peer_that_speaks_no_common_version_is_refused_and_harms_nobody() -> None:
    async def script(fleet: Fleet) -> None:
        other = fleet.hosts[follower_of(fleet)]
        other.kill()
        other.wire = (9, 9)
        other.start()
        await trio.sleep(5.0)
        assert other.peer.follower.leader == ""
        with suppress(Unavailable):
            await other.peer.cluster.call(submission())
        rest = next(name for name in fleet.hosts if name not in (other.peer_id, *fleet.leaders()))
        await fleet.hosts[rest].peer.cluster.call(submission())

    in_a_cluster(script)


def test_a_worker_without_a_vote_serves_and_forwards() -> None:
    async def script(fleet: Fleet) -> None:
        assert fleet.hosts["h4"].peer.election is None
        submitted = await fleet.hosts["h4"].peer.cluster.call(submission())
        view = await finished(fleet, "h4", submitted.view.task.task_id)
        assert view.task.status is Status.COMPLETED

    in_a_cluster(script, hosts=4, voters=3)
