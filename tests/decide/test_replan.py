"""Plans that the leader makes by itself: hosts that are emptied, and hosts that came or went."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peer.decide import place, rebalance, replan
from peer.decide.replan import EMPTY, PLANS_EVERY_S, QUIET_S, RETRY_S
from peer.errors import Conflict, NotFound
from peer.state.command import AssignModel, DrainHost, Rebalance
from peer.state.model import Assignment, ReplicaState
from peer.state.order import LoadReplica, UnloadReplica
from peer.state.plan import Plan
from peer.state.snapshot import Save
from tests.decide.build import POLICY, T0, World, replica, snapshot, worker_report


def hosts(*loaded: tuple[str, ...], auto: str = "") -> World:
    """One worker w1, w2, ... on each of host-1, host-2, ..., with these models."""
    world = World(snapshot(replace(POLICY, auto_rebalance=auto)))
    for number, models in enumerate(loaded, 1):
        world.worker(f"w{number}", *(replica(model) for model in models), peer_id=f"host-{number}")
    return world


def ask(world: World, name: str = "host-1", *, undo: bool = False) -> bool:
    draining: bool = world.take(
        replan.drain_host(world.s, world.now, DrainHost(name=name, undo=undo, by="o"))
    ).draining
    return draining


def plan(world: World) -> Plan | None:
    """Whether the leader makes one now."""
    before = set(world.s.plans)
    world.take(replan.replan(world.s, world.now, f"r{len(before)}"))
    return next((each for name, each in world.s.plans.items() if name not in before), None)


def hear(world: World, *loaded: tuple[str, ...]) -> None:
    for number, models in enumerate(loaded, 1):
        found = (replica(model) for model in models)
        world.hear(worker_report(f"w{number}", *found, peer_id=f"host-{number}"))


# ---------------------------------------------------------------- a host that leaves


def test_a_model_is_loaded_elsewhere_before_it_leaves() -> None:
    world = hosts(("small",), ())
    wish = Assignment(
        assignment_id="a1", model_name="small", worker_id="w1", preload=True, priority=5, created_at=T0
    )
    world.take(rebalance.Decision(changes=[Save(wish)]))
    assert plan(world) is None
    assert ask(world)
    assert "leaving/host-1" in world.disk
    made = plan(world)
    assert made is not None
    assert (made.strategy, made.status) == (EMPTY, "initiated")
    [move] = made.moves
    assert (move.type, move.model, move.from_worker, move.to_worker) == (
        "model_migration",
        "small",
        "w1",
        "w2",
    )
    assert plan(world) is None  # one is under way
    world.take(rebalance.advance(world.s, world.now))
    assert [type(order) for order in world.orders] == [LoadReplica]
    hear(world, ("small",), ("small",))
    world.take(rebalance.advance(world.s, world.now))
    assert ("w2", "small") in world.s.assignments
    world.take(place.reconcile(world.s, world.now))
    assert [type(order) for order in world.orders] == [UnloadReplica]
    hear(world, (), ("small",))
    world.take(rebalance.advance(world.s, world.now))
    assert world.s.plans[made.rebalance_id].status == "completed"
    assert plan(world) is None


def test_a_model_that_is_elsewhere_just_leaves() -> None:
    world = hosts(("small",), ("small",))
    ask(world)
    made = plan(world)
    assert made is not None
    assert [(move.type, move.to_worker, move.memory_bytes) for move in made.moves] == [
        ("model_unload", "w2", 0)
    ]


def test_what_fits_nowhere_stays_and_is_said_to() -> None:
    world = hosts(("large", "echo"), ("large",), ("large",))
    world.drain("large", "w2")
    world.drain("large", "w3")
    ask(world)
    made = plan(world)
    assert made is not None
    assert [move.model for move in made.moves] == ["echo"]
    assert made.reasons == ("host-1 leaves", "large stays on w1: it fits on no other host")


def test_what_an_owner_unloaded_elsewhere_stays() -> None:
    world = hosts(("small",), ())
    world.drain("small", "w2")
    ask(world)
    assert plan(world) is None
    world.undrain("small", "w2")
    assert plan(world) is not None


def test_two_models_do_not_get_the_same_room() -> None:
    world = hosts(("small", "echo"), ("echo",))
    world.hear(worker_report("w2", replica("large"), peer_id="host-2"))
    ask(world)
    made = plan(world)
    assert made is not None
    assert [move.model for move in made.moves] == ["echo"]


def test_a_model_that_is_in_no_catalogue_stays() -> None:
    world = hosts(("gone",), ())
    ask(world)
    assert plan(world) is None


def test_no_plan_is_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replan, "MOVES_MAX", 1)
    world = hosts(("small", "echo"), ())
    ask(world)
    made = plan(world)
    assert made is not None
    assert len(made.moves) == 1


def test_after_a_failure_it_is_tried_again_in_a_while() -> None:
    world = hosts(("small",), ())
    ask(world)
    made = plan(world)
    assert made is not None
    world.hear(worker_report("w2", replica("large"), peer_id="host-2"))
    world.take(rebalance.advance(world.s, world.now))
    assert world.s.plans[made.rebalance_id].status == "failed"
    hear(world, ("small",), ())
    assert plan(world) is None
    world.later(RETRY_S)
    hear(world, ("small",), ())
    assert plan(world) is not None


def test_nothing_new_comes_to_a_host_that_leaves() -> None:
    world = hosts((), ())
    ask(world)
    with pytest.raises(Conflict, match="is being emptied") as error:
        place.assign(
            world.s,
            world.now,
            AssignModel(model_name="small", worker_ids=("w1",), preload=True, priority=5),
            "a1",
        )
    assert error.value.code == "host_drains"
    assigned = place.assign(
        world.s, world.now, AssignModel(model_name="small", worker_ids=(), preload=True, priority=5), "a1"
    )
    assert [each.worker_id for each in assigned.reply.placed] == ["w2"]
    world.submit("small")
    world.take(place.reconcile(world.s, world.now))
    assert [order.worker_id for order in world.orders] == ["w2"]


def test_a_wish_waits_for_the_end_of_the_drain() -> None:
    world = hosts((), ())
    command = AssignModel(model_name="small", worker_ids=("w1",), preload=True, priority=5)
    world.take(place.assign(world.s, world.now, command, "a1"))
    ask(world)
    world.take(place.reconcile(world.s, world.now))
    assert world.orders == []
    assert not ask(world, undo=True)
    assert "leaving/host-1" not in world.disk
    world.take(place.reconcile(world.s, world.now))
    assert [type(order) for order in world.orders] == [LoadReplica]


def test_asking_again_changes_nothing() -> None:
    world = hosts((), ())
    ask(world)
    since = world.s.leaving["host-1"].since
    world.later(5.0)
    assert ask(world)
    assert world.s.leaving["host-1"].since == since
    assert not ask(world, undo=True)
    assert not ask(world, undo=True)


def test_who_cannot_be_emptied() -> None:
    world = hosts((), ())
    with pytest.raises(NotFound, match="there is no host `host-9`"):
        ask(world, "host-9")
    with pytest.raises(Conflict, match="2 peers are called host"):
        ask(world, "host")
    ask(world)
    with pytest.raises(Conflict, match="no other host") as error:
        ask(world, "host-2")
    assert error.value.code == "no_other_host"


def test_a_failed_replica_does_not_move() -> None:
    world = World()
    world.worker("w1", replica("small", state=ReplicaState.FAILED), peer_id="host-1")
    world.worker("w2", peer_id="host-2")
    ask(world)
    assert plan(world) is None


# ---------------------------------------------------------------- hosts that came or went


def settle(world: World, seconds: float, *loaded: tuple[str, ...]) -> Plan | None:
    """The first plan within that time; every host reports."""
    for _ in range(round(seconds)):
        world.later(1.0)
        hear(world, *loaded)
        world.wake()
        made = plan(world)
        if made is not None:
            return made
    return None


def test_a_new_host_gets_its_share_when_it_has_stayed_for_a_while() -> None:
    world = hosts(("small", "echo"), auto="memory_optimized")
    assert settle(world, 2 * QUIET_S, ("small", "echo")) is None
    world.worker("w2", peer_id="host-2")
    assert settle(world, QUIET_S - 2.0, ("small", "echo"), ()) is None
    made = settle(world, 5.0, ("small", "echo"), ())
    assert made is not None
    assert (made.strategy, len(made.moves)) == ("memory_optimized", 1)


def test_a_host_that_went_makes_a_plan_and_not_too_often() -> None:
    world = hosts(("echo",), ("echo",), ("echo",), auto="load_balanced")
    three = (("echo",), ("echo",), ("echo",))
    assert settle(world, 5.0, *three) is None
    made = settle(world, 2 * QUIET_S, *three[:2])
    assert made is not None
    assert made.status == "completed"  # there was nothing to move
    assert settle(world, PLANS_EVERY_S - QUIET_S, *three) is None
    assert settle(world, 2 * QUIET_S, *three) is not None


def test_without_the_owners_wish_nothing_moves() -> None:
    world = hosts(("small", "echo"))
    settle(world, 5.0, ("small", "echo"))
    world.worker("w2", peer_id="host-2")
    assert settle(world, 2 * QUIET_S, ("small", "echo"), ()) is None


def test_a_plan_of_the_owners_comes_first() -> None:
    world = hosts(("small", "echo"), (), auto="memory_optimized")
    command = Rebalance(strategy="memory_optimized", force=False, dry_run=False)
    world.take(rebalance.rebalance(world.s, world.now, command, "mine"))
    assert plan(world) is None
    ask(world)
    assert plan(world) is None
