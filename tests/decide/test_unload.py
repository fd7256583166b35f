"""Unloading: drains are durable, and end when the replica is gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from peer.decide import place, recover, view
from peer.decide.workers import load_seconds
from peer.errors import Conflict
from peer.limits import UNLOADED_S
from peer.state.model import Draining, ReplicaState
from peer.state.order import LoadReplica, StopAttempt, UnloadReplica
from peer.state.record import decode
from peer.state.task import Task, TaskInput
from peer.state.worker import Worker
from tests.decide.build import GIB, T0, World, replica, snapshot, worker_report
from tests.decide.test_place import assign, reconcile, unload


def test_unloading_drains_first() -> None:
    world = World()
    world.worker("w1", replica("small"))
    task = world.running("small")
    assign(world, "small", "w1")
    reply = unload(world, "small")
    assert (reply.affected_workers, reply.requeued_tasks) == (("w1",), ())
    assert world.s.assignments == {}
    assert reconcile(world) == []
    assert view.shown_replicas(world.s, "w1")[0].state is ReplicaState.DRAINING
    world.take(recover.fail(world.s, T0, task, "x", "y"))
    assert [type(order) for order in reconcile(world)] == [UnloadReplica]


def test_unloading_by_force_requeues() -> None:
    world = World()
    world.worker("w1", replica("small"), replica("echo"))
    task, other = world.running("small"), world.running("echo")
    reply = unload(world, "small", "w1", force=True)
    assert reply.requeued_tasks == (task.task_id,)
    assert [type(order) for order in world.orders] == [StopAttempt]
    assert list(world.s.held["w1"]) == [other.task_id]
    assert [type(order) for order in reconcile(world)] == [UnloadReplica]


def test_unloading_takes_back_a_wish_that_has_not_begun() -> None:
    world = World()
    world.known("w1")
    world.known("w2")
    assign(world, "small", "w1")
    world.hear(worker_report("w1"))
    world.hear(worker_report("w2"))
    assert unload(world, "small").affected_workers == ("w1",)
    assert (world.s.assignments, world.s.draining) == ({}, {})


def test_an_unload_outlives_its_leader() -> None:
    """The next one has not heard the worker yet, and must not take its silence for the replica's end."""
    old = World()
    old.worker("w1", replica("small"))
    running = old.running("small")
    unload(old, "small")
    assert old.disk["draining/w1/small"]
    new = World(snapshot())
    for prefix, kind in (
        ("worker/", Worker),
        ("draining/", Draining),
        ("task/", Task),
        ("input/", TaskInput),
    ):
        for key, value in old.disk.items():
            if key.startswith(prefix):
                new.s.load(decode(kind, value))
    assert reconcile(new) == []
    assert new.s.draining == old.s.draining
    new.hear(worker_report("w1", replica("small"), running=(f"{running.task_id}/1",)))
    assert view.shown_replicas(new.s, "w1")[0].state is ReplicaState.DRAINING
    assert reconcile(new) == []  # a task still runs there
    new.take(recover.fail(new.s, T0, new.task(running), "x", "y"))
    assert [type(order) for order in reconcile(new)] == [UnloadReplica]
    assert ("w1", "small") in new.s.draining
    new.hear(worker_report("w1"))
    reconcile(new)
    assert new.s.draining == {}


def test_a_young_leader_unloads_where_it_has_heard_nothing_yet() -> None:
    world = World()
    world.known("w1")
    world.worker("w2")
    assert unload(world, "small").affected_workers == ("w1",)
    assert list(world.s.draining) == [("w1", "small")]
    world.later(7)
    with pytest.raises(Conflict, match="not on w1, w2"):
        unload(world, "echo")  # whoever is still silent may be gone for good
    assert unload(world, "echo", "w1").affected_workers == ("w1",)  # asked for by its name
    world.hear(worker_report("w1", replica("small")))
    assert [(o.worker_id, o.model_name) for o in reconcile(world)] == [("w1", "small")]
    assert list(world.s.draining) == [("w1", "small")]


def test_what_an_owner_unloads_stays_so_for_every_other_reason() -> None:
    world = World()
    world.worker("w1", replica("small"))
    world.drain("small", because=place.ROOM)
    assert world.s.draining["w1", "small"].because == "room"
    unload(world, "small")
    assert world.s.draining["w1", "small"].because == "owner"
    world.later(1).drain("small", because=place.MOVE)
    assert world.s.draining["w1", "small"] == Draining(
        worker_id="w1", model_name="small", since=T0, because="owner"
    )
    assign(world, "small", "w1")
    assert world.s.draining == {}
    assert "draining/w1/small" not in world.disk


def test_what_is_no_longer_in_the_catalogue_can_be_unloaded() -> None:
    world = World()
    world.worker("w1", replica("old", memory_bytes=GIB))
    assert unload(world, "old").affected_workers == ("w1",)
    assert len(reconcile(world)) == 1


def test_what_was_unloaded_by_force_is_not_brought_back_by_its_tasks_for_a_while() -> None:
    world = World()
    world.worker("w1", replica("small"))
    world.worker("w2")
    task = world.running("small")
    unload(world, "small", force=True)
    assert sorted(world.s.draining) == [("w1", "small"), ("w2", "small")]  # no worker was named
    assert [type(order) for order in reconcile(world)] == [UnloadReplica]
    world.hear(worker_report("w1"))
    assert reconcile(world) == []
    reasons = [each.reason for each in view.pending_reasons(world.s, world.now + 1.0, world.task(task))]
    assert len(reasons) == 2
    assert all("by force" in each and each.endswith("in 599 s") for each in reasons)
    load_s = load_seconds(world.s, world.s.catalogue["small"], "w1")
    assert view.estimated_wait_s(world.s, world.now + 1.0, world.task(task)) == 599.0 + load_s
    world.later(UNLOADED_S - 0.5)
    for worker in ("w1", "w2"):
        world.hear(worker_report(worker))
    unload_again = world.s.draining["w1", "small"]
    assert reconcile(world) == []
    assert world.s.draining["w1", "small"] == unload_again
    world.later(0.5)
    assert reconcile(world) == []
    assert world.s.draining == {}
    (load,) = reconcile(world)
    assert isinstance(load, LoadReplica)
    assert load.model.name == "small"


class Walked(dict[tuple[str, str], Draining]):
    """Counts how often its keys are gone through."""

    walks = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        self.walks += 1
        return super().__iter__()


def test_what_is_kept_out_of_many_workers_is_not_gone_through_for_each_of_them() -> None:
    """Every tick, or the answer for one task: their square, where many models were unloaded everywhere."""
    world = World()
    for number in range(5):
        world.worker(f"w{number}", replica("large"), replica("echo"))
    unload(world, "echo", force=True)
    task = world.submit("small")
    assert len(world.s.draining) == 5
    world.s.draining = Walked(world.s.draining)
    assert {type(order) for order in reconcile(world)} == {UnloadReplica}
    assert len(view.pending_reasons(world.s, world.now, world.task(task))) == 5
    assert world.s.draining.walks == 0


def test_an_assignment_ends_what_a_forced_unload_holds() -> None:
    world = World()
    world.worker("w1", replica("small"))
    world.worker("w2")
    world.running("small")
    unload(world, "small", "w1", force=True)
    assert list(world.s.draining) == [("w1", "small")]
    assert [type(order) for order in reconcile(world)] == [UnloadReplica, LoadReplica]  # on the other one
    unload(world, "small", "w2")
    unload(world, "small", "w1")
    assert world.s.draining["w1", "small"].until == T0 + UNLOADED_S  # what was asked by force holds
    assert world.s.draining["w2", "small"].until == 0.0
    world.hear(worker_report("w1"))
    assign(world, "small", "w1")
    assert list(world.s.draining) == [("w2", "small")]
    assert "w1" in [order.worker_id for order in reconcile(world) if isinstance(order, LoadReplica)]
