"""What is forgotten of hosts that were put out."""

from __future__ import annotations

from peer.decide import keys, recover, retain
from peer.decide.decision import Decision
from peer.decide.lose import revoked
from peer.state.enrol import Revocation
from peer.state.index import Index
from peer.state.key import ApiKey
from peer.state.model import Assignment
from peer.state.plan import Leaving
from peer.state.snapshot import Foresee, Save
from peer.state.task import Status
from tests.decide.build import T0, World, replica, worker_report


def put_out(world: World, peer_id: str) -> None:
    made = Revocation(peer_id=peer_id, serials=(), revoked_at=T0, revoked_by="o", until=T0 + 1e6)
    world.take(Decision(changes=[Save(made)]))
    world.take(revoked(world.s, world.now, peer_id))


def test_the_workers_of_a_revoked_host_are_forgotten_with_all_that_was_wished_of_them() -> None:
    world = World()
    world.worker("w1", replica("echo"), replica("small"), peer_id="gone")
    world.worker("w2", replica("echo"), peer_id="stays")
    for worker_id in ("w1", "w2"):
        wish = Assignment(
            assignment_id="a", model_name="echo", worker_id=worker_id, preload=True, priority=5, created_at=T0
        )
        world.take(Decision(changes=[Save(wish), Foresee(worker_id, "echo", replica("echo", worker_id), T0)]))
    world.drain("small", "w1")
    world.drain("echo", "w2")
    world.take(Decision(changes=[Save(Leaving(peer_id="gone", since=T0))]))
    task = world.held("echo", "w1")
    world.take(retain.forget_revoked(world.s))
    assert "w1" in world.s.workers
    put_out(world, "gone")
    world.take(retain.forget_revoked(world.s))
    assert "w1" in world.s.workers  # its task is not elsewhere yet
    assert world.s.leaving == {}
    world.take(recover.lost_attempts(world.s, world.now))
    assert world.task(task).status is Status.QUEUED
    world.take(retain.forget_revoked(world.s))
    assert set(world.s.workers) == {"w2"}
    assert {
        key for key in world.disk if "w1" in key and not key.startswith(("task", "by/", "input"))
    } == set()
    assert (set(world.s.assignments), set(world.s.draining)) == ({("w2", "echo")}, {("w2", "echo")})
    for facts in (world.s.reports, world.s.replicas, world.s.heard_at, world.s.listened, world.s.wishes):
        assert "w1" not in facts
    assert {key[0] for key in world.s.foreseen} == {"w2"}
    fresh = Index()
    fresh.place("w2", {}, world.s.replicas["w2"])
    fresh.touch(world.s, "w2")
    for name in ("placed", "room", "unmet", "unused", "doubtful"):
        assert getattr(fresh, name) == getattr(world.s.index, name), name
    world.take(retain.forget_revoked(world.s))
    assert set(world.s.workers) == {"w2"}


def test_the_key_that_a_host_made_for_itself_ends_with_it() -> None:
    world = World()
    world.worker("w1", peer_id="gone")

    def key(key_id: str, owner: str) -> ApiKey:
        return ApiKey(
            key_id=key_id,
            owner=owner,
            scopes=("admin",),
            secret_sha256="0" * 64,
            created_at=T0,
            requests_per_hour=None,
            requests_per_minute=None,
        )

    world.take(Decision(changes=[Save(key("k1", keys.host_owner("gone")))]))
    world.take(keys.revoke_host(world.s, world.now, "gone"))
    assert world.s.keys["k1"].revoked_at is None  # nobody could make another one
    world.take(Decision(changes=[Save(key("k2", keys.host_owner("stays")))]))
    world.take(keys.revoke_host(world.s, world.now, "gone"))
    assert (world.s.keys["k1"].revoked_at, world.s.keys["k2"].revoked_at) == (T0, None)
    assert keys.revoke_host(world.s, world.now, "gone").changes == []


def test_a_report_that_was_on_its_way_changes_nothing_for_long() -> None:
    world = World()
    world.worker("w1", peer_id="gone")
    put_out(world, "gone")
    world.take(retain.forget_revoked(world.s))
    world.hear(worker_report("w1", peer_id="gone"))
    world.take(retain.forget_revoked(world.s))
    assert world.s.workers == {}
