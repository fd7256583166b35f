"""Plans of better placements, and how they are carried out."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace as changed

from peer.decide import rebalance
from peer.decide.decision import Decision
from peer.decide.place import MOVE
from peer.errors import Conflict
from peer.state.command import Rebalance
from peer.state.metric import Bucket, Counts
from peer.state.model import Assignment, ReplicaState
from peer.state.order import LoadReplica
from peer.state.plan import Leaving, Move, Plan
from peer.state.snapshot import Save
from tests.decide.build import CATALOGUE, ECHO, GIB, SMALL, T0, World, device, replica, worker_report


def ask(world: World, strategy: str = "memory_optimized", **fields: bool) -> Plan:
    command = Rebalance(**{"strategy": strategy, "force": False, "dry_run": False, **fields})
    plan: Plan = world.take(rebalance.rebalance(world.s, world.now, command, "r1"))
    return plan


def advance(world: World) -> Move:
    world.take(rebalance.advance(world.s, world.now))
    return world.s.plans["r1"].moves[0]


def uneven(*models: str) -> World:
    world = World()
    world.worker("w1", *(replica(model) for model in models))
    world.worker("w2")
    return world


def test_one_worker_has_nothing_to_move_to() -> None:
    world = World()
    world.worker("w1", replica("echo"))
    plan = ask(world)
    assert (plan.status, plan.moves, plan.reasons) == (
        "completed",
        (),
        ("a move needs two workers that are up",),
    )
    assert plan.finished_at == T0
    assert world.events == []
    assert rebalance.advance(world.s, T0).changes == []


def test_a_dry_run_is_not_kept() -> None:
    world = uneven("small", "echo")
    plan = ask(world, dry_run=True)
    assert plan.status == "planned"
    assert [(move.model, move.from_worker, move.to_worker) for move in plan.moves] == [("echo", "w1", "w2")]
    assert (world.s.plans, world.events) == ({}, [])


@pytest.mark.parametrize("strategy", ["load_balanced", "latency_optimized"])
def test_tasks_are_spread(strategy: str) -> None:
    world = uneven("small", "echo")
    for model in ("small", "echo"):
        for _ in range(3):
            world.held(model, "w1")
    counts = {w: Counts(completed=1, run_s=1.0, tokens=n) for w, n in (("w1", 100), ("w2", 20))}
    world.take(Decision(changes=[Save(Bucket(resolution="1s", start=int(T0), workers=counts))]))
    plan = ask(world, strategy)
    if strategy == "load_balanced":
        assert [move.tasks_touched for move in plan.moves] == [3]
    else:
        assert plan.moves == ()  # the second is too slow to help
        assert "by at least 10%" in plan.reasons[0]


def test_a_small_gain_needs_force() -> None:
    world = World()
    world.worker("w1", replica("small"), replica("tiny", memory_bytes=GIB // 4))
    world.worker("w2", replica("sized", memory_bytes=3 * GIB))
    tiny = changed(ECHO, name="tiny", memory_bytes=GIB // 4)
    world.s.catalogue = {**CATALOGUE, "tiny": tiny}
    assert ask(world).moves == ()
    assert [move.model for move in ask(world, force=True).moves][:1] == ["tiny"]


def test_nothing_to_gain_even_by_force() -> None:
    world = uneven("small")
    assert "improves memory_optimized (" in ask(world, force=True).reasons[0]
    assert World().s.plans == {}
    empty = uneven()
    assert ask(empty).moves == ()


def test_what_cannot_move_stays() -> None:
    world = World()
    world.worker("w1", replica("echo"), replica("unknown", memory_bytes=GIB), replica("large"))
    world.worker("w2", replica("small", memory_bytes=3 * GIB), device=device(stand_in=False))
    # echo needs the stand-in, `unknown` is in no catalogue, `large` has no room on w2
    assert ask(world).moves == ()


def test_a_model_is_not_moved_where_it_already_is() -> None:
    world = World()
    world.worker("w1", replica("small"), replica("small2", memory_bytes=GIB))
    world.worker("w2", replica("small"))
    world.s.catalogue = {"small": SMALL}
    assert ask(world).moves == ()


def test_a_model_is_not_moved_where_its_load_has_failed() -> None:
    world = uneven("small", "echo")
    assert [move.model for move in ask(world).moves] == ["echo"]
    world = uneven("small", "echo")
    world.hear(worker_report("w2", replica("echo", state=ReplicaState.FAILED, memory_bytes=0)))
    assert "echo" not in [move.model for move in ask(world).moves]


def test_a_model_is_not_moved_where_an_owner_has_unloaded_it() -> None:
    world = uneven("small", "echo")
    world.drain("echo", "w2")
    assert [move.model for move in ask(world).moves] == ["small"]
    world.drain("small", "w2")
    assert ask(world, dry_run=True).moves == ()
    assert advance(world).reason == "w2 can no longer take it"
    assert world.orders == []


def test_carried_out_step_by_step() -> None:
    world = uneven("small", "echo")
    wish = Assignment(
        assignment_id="a", model_name="echo", worker_id="w1", preload=True, priority=5, created_at=T0
    )
    world.take(Decision(changes=[Save(wish)]))
    plan = ask(world)
    assert (plan.status, world.events) == ("initiated", ["cluster_rebalance_started"])
    with pytest.raises(Conflict, match="r1 is still under way"):
        ask(world)
    assert ask(world, dry_run=True).status == "planned"
    assert advance(world).state == "loading"
    assert [type(order) for order in world.orders] == [LoadReplica]
    assert rebalance.advance(world.s, T0).changes == []
    world.later(3).hear(worker_report("w2", replica("echo")))
    assert advance(world).state == "draining"
    assert set(world.s.assignments) == {("w2", "echo")}
    assert ("w1", "echo") in world.s.draining
    assert rebalance.advance(world.s, world.now).changes == []
    world.hear(worker_report("w1", replica("small")))
    move = advance(world)
    assert (move.state, move.actual_s) == ("done", 3.0)
    assert (world.s.plans["r1"].status, world.events) == ("completed", ["cluster_rebalance_finished"])
    assert ask(world).moves == ()  # what was carried out is not undone


def test_two_moves_one_after_the_other() -> None:
    world = World()
    world.worker("w1", *(replica(m, memory_bytes=GIB) for m in ("small", "echo", "sized")))
    world.worker("w2")
    world.worker("w3")
    world.s.catalogue = {n: changed(m, memory_bytes=GIB) for n, m in CATALOGUE.items()}
    plan = ask(world)
    assert len({move.model for move in plan.moves}) == len(plan.moves) == 2
    first = plan.moves[0]
    advance(world)
    target = first.to_worker or ""
    world.hear(worker_report(target, replica(first.model, memory_bytes=GIB)))
    advance(world)
    world.s.replicas["w1"].pop(first.model)
    advance(world)
    assert [move.state for move in world.s.plans["r1"].moves] == ["done", "planned"]
    assert (world.s.plans["r1"].status, world.s.plans["r1"].finished_at) == ("initiated", None)


def begun(**fields: Any) -> World:
    world = uneven("small", "echo")
    ask(world)
    if fields:
        plan = world.s.plans["r1"]
        moves = (changed(plan.moves[0], **fields),)
        world.take(Decision(changes=[Save(changed(plan, moves=moves))]))
    return world


def test_a_target_that_already_has_it() -> None:
    world = begun()
    world.hear(worker_report("w2", replica("echo")))
    assert advance(world).state == "loading"
    assert world.orders == []
    assert advance(world).state == "draining"


def test_a_move_that_cannot_begin_fails_the_plan() -> None:
    world = begun()
    world.hear(worker_report("w2", replica("large"), replica("x", memory_bytes=GIB)))
    assert advance(world).reason == "it no longer fits on w2"
    assert world.data("cluster_rebalance_finished")["status"] == "failed"
    world = begun()
    world.s.catalogue = {}
    assert advance(world).reason == "w2 can no longer take it"
    world = begun()
    world.later(7).wake()
    assert advance(world).reason == "w2 can no longer take it"
    world = begun()
    peer_id = world.s.workers["w2"].peer_id
    world.take(Decision(changes=[Save(Leaving(peer_id=peer_id, since=T0))]))
    assert advance(world).reason == "w2 can no longer take it"
    assert world.orders == []


def test_a_load_that_fails_or_is_lost_fails_the_move() -> None:
    world = begun(state="loading", started_at=T0)
    world.hear(worker_report("w2", replica("echo", state=ReplicaState.FAILED, error="bad")))
    move = advance(world)
    assert (move.state, move.reason) == ("failed", "bad")
    world = begun(state="loading", started_at=T0)
    assert advance(world).reason == "w2 lost it"


def test_a_move_is_given_up_after_a_time() -> None:
    world = begun(state="loading", started_at=T0)
    world.later(601)
    assert (advance(world).reason, world.s.plans["r1"].status) == ("it took too long", "failed")


def test_a_new_leader_judges_a_move_only_once_it_has_heard_of_both_workers() -> None:
    world = begun(state="draining", started_at=T0)
    world.s.reports.clear()
    world.s.replicas.clear()
    assert advance(world).state == "draining"
    world.later(6.5)
    assert advance(world).state == "done"


def test_a_target_that_is_lost_gives_its_source_back() -> None:
    world = begun(state="draining", started_at=T0)
    world.drain("echo", "w1", MOVE)
    move = advance(world)
    assert (move.state, move.reason) == ("failed", "w2 lost it")
    assert ("w1", "echo") not in world.s.draining


def test_what_an_owner_unloads_is_not_given_back() -> None:
    world = begun(state="draining", started_at=T0)
    world.drain("echo", "w1")
    assert advance(world).state == "failed"
    assert ("w1", "echo") in world.s.draining


def test_an_owner_who_unloads_the_target_ends_the_move() -> None:
    world = begun(state="draining", started_at=T0)
    world.hear(worker_report("w2", replica("echo")))
    world.drain("echo", "w2")
    move = advance(world)
    assert (move.state, move.reason) == ("failed", "w2 is to unload it")


def test_no_wish_no_change_of_wishes() -> None:
    world = begun(state="loading", started_at=T0)
    world.hear(worker_report("w2", replica("echo")))
    assert advance(world).state == "draining"
    assert world.s.assignments == {}


def test_a_plan_without_an_open_move_is_left_alone() -> None:
    world = begun(state="done")
    assert rebalance.advance(world.s, T0).changes == []
