"""Models that take turns: one whose tasks never end keeps no other out for ever."""

from __future__ import annotations

from msgspec.structs import replace as changed

from peer.decide import place, view
from peer.decide.decision import Decision
from peer.decide.record import report
from peer.limits import KEPT_OUT_S, TURN_LOADS, TURN_S
from peer.state.model import Draining, LoadProfile, Replica
from peer.state.order import LoadReplica, UnloadReplica
from peer.state.snapshot import Save
from peer.state.worker import Telemetry
from tests.decide.build import (
    CATALOGUE,
    GIB,
    SMALL,
    T0,
    World,
    finished,
    replica,
    snapshot,
    worker_report,
)
from tests.decide.test_place import assign, reconcile


def crowded(*, since: float = T0 - TURN_S) -> World:
    """`large` is busy and more of its tasks come; one of `small` waits, as there is no room for both."""
    world = World()
    world.worker("w1", replica("large", since=since))
    world.running("large")
    world.submit("small")
    world.later(KEPT_OUT_S)
    world.submit("large")
    world.hear(worker_report("w1", replica("large", since=since)))
    return world


def leaving(world: World) -> dict[tuple[str, str], Draining]:
    assert reconcile(world) == []
    return world.s.draining


def test_a_busy_model_drains_for_one_that_has_waited_and_gives_way_at_its_tasks_end() -> None:
    world = crowded()
    assert leaving(world) == {
        ("w1", "large"): Draining(worker_id="w1", model_name="large", since=world.now, because=place.ROOM)
    }
    assert world.batch.reasons == ["large leaves w1 to make room for small"]
    waiting = next(task for task in world.s.tasks.values() if task.model_name == "small")
    (reason,) = view.pending_reasons(world.s, world.now, waiting)
    assert reason.reason.endswith("large will be unloaded when its tasks end")
    assert leaving(world.later(1)).keys() == {("w1", "large")}  # and nothing else is begun meanwhile
    (running,) = world.s.held["w1"].values()
    world.take(report(world.s, world.now, finished(running, world.now)))
    assert [(type(order), order.model_name) for order in reconcile(world)] == [(UnloadReplica, "large")]
    world.hear(worker_report("w1"))
    (load,) = reconcile(world)
    assert isinstance(load, LoadReplica)
    assert load.model.name == "small"  # it waits longer than the next task of the other


def test_nothing_is_sent_away_before_a_task_has_waited() -> None:
    world = crowded()
    world.now -= 0.5
    assert leaving(world) == {}


def test_a_model_has_its_turn() -> None:
    assert leaving(crowded(since=T0 + KEPT_OUT_S - TURN_S + 0.5)) == {}
    assert leaving(crowded(since=T0 + KEPT_OUT_S - TURN_S))
    assert leaving(crowded(since=T0 + 10_000.0))  # by a clock that is ahead: it says nothing


def test_a_turn_is_longer_where_loads_are_long() -> None:
    for load_s, ends in ((TURN_S / TURN_LOADS, True), (TURN_S / TURN_LOADS + 1.0, False)):
        world = crowded(since=T0 + KEPT_OUT_S - TURN_S)
        profile = LoadProfile(model_name="small", device_name="card", memory_bytes=4 * GIB, load_s=load_s)
        world.take(Decision(changes=[Save(profile)]))
        assert bool(leaving(world)) is ends


def test_older_tasks_of_the_busy_model_go_first() -> None:
    world = World()
    world.worker("w1", replica("large"))
    world.running("large")
    world.submit("large")
    world.later(0.1).submit("small")
    world.later(KEPT_OUT_S)
    world.hear(worker_report("w1", replica("large")))
    assert leaving(world) == {}
    assert leaving(crowded())


def test_a_model_without_a_queue_that_is_never_idle_gives_way_too() -> None:
    world = World()
    world.worker("w1", replica("large"))
    world.running("large")
    world.submit("small")
    world.later(KEPT_OUT_S)
    world.hear(worker_report("w1", replica("large")))
    assert list(leaving(world)) == [("w1", "large")]


def test_what_owners_wish_for_stays() -> None:
    world = crowded()
    assign(world, "large", "w1")
    assert leaving(world) == {}


def test_idle_models_go_first_and_then_those_with_the_fewest_tasks() -> None:
    world = World()
    world.worker("w1", replica("echo"), replica("small"), replica("sized", memory_bytes=2 * GIB))
    for model in ("small", "small", "sized"):
        world.running(model)
    world.submit("large")
    world.later(KEPT_OUT_S)
    world.hear(worker_report("w1", replica("echo"), replica("small"), replica("sized", memory_bytes=2 * GIB)))
    assert reconcile(world) == []
    assert list(world.s.draining) == [("w1", "echo"), ("w1", "sized"), ("w1", "small")]


def test_the_worker_with_the_fewest_tasks_gives_way() -> None:
    world = World()
    for worker in ("w1", "w2", "w3"):
        world.worker(worker, replica("large"))
    for worker in ("w1", "w1", "w2", "w3", "w3"):
        world.held("large", worker)
    world.submit("small")
    world.later(KEPT_OUT_S)
    for worker in ("w1", "w2", "w3"):
        world.hear(worker_report(worker, replica("large")))
    assert list(leaving(world)) == [("w2", "large")]
    assert list(leaving(world.later(1))) == [("w2", "large")]


def test_a_worker_that_is_too_small_loses_nothing() -> None:
    world = World()
    world.worker("w1", replica("small"))
    world.running("small")
    world.submit("large")
    world.later(KEPT_OUT_S)
    full_of_others = Telemetry(memory_total_bytes=8 * GIB, memory_used_bytes=6 * GIB, utilization_percent=1.0)
    world.hear(worker_report("w1", replica("small"), telemetry=full_of_others))
    assert leaving(world) == {}


OTHERS = {name: changed(SMALL, name=name) for name in ("a", "b", "c")} | {
    "huge": changed(SMALL, name="huge", memory_bytes=64 * GIB)
}


def rotating(*workers: str, waits: str = "large") -> World:
    """Models of half a device that come one after the other; the first of them had its turn, the second not yet."""
    world = World(snapshot(catalogue={**CATALOGUE, **OTHERS}))
    for worker in workers:
        world.worker(worker)
    world.submit(waits)
    world.submit("c")
    world.later(TURN_S)
    for worker in workers:
        had, has_not = ("a", "b") if worker == "w1" else ("a", "small")
        replicas = [
            sized(had, T0 - TURN_S),
            sized(has_not, T0 + TURN_S / 2 if worker == "w1" else T0 + TURN_S),
        ]
        world.hear(worker_report(worker, *replicas))
        for model in (had, has_not):
            world.held(model, worker)
    return world


def sized(model: str, since: float) -> Replica:
    return replica(model, since=since, slots=1, memory_bytes=SMALL.memory_bytes)


def test_small_models_that_come_one_by_one_do_not_keep_a_large_one_out() -> None:
    world = rotating("w1")
    assert leaving(world) == {}  # "c" waits, too, and would have the place of "a" for a turn
    world.later(TURN_S / 2)
    world.hear(worker_report("w1", sized("a", T0 - TURN_S), sized("b", T0 + TURN_S / 2)))
    assert list(leaving(world)) == [("w1", "a"), ("w1", "b")]
    assert world.batch.reasons[0] == "a leaves w1 to make room for large"


def test_one_worker_is_kept_free_where_the_wait_is_shortest() -> None:
    world = rotating("w1", "w2")
    assert list(leaving(world)) == [("w2", "a")]
    assert world.batch.reasons == ["a leaves w2 to make room for c"]


def test_nothing_is_kept_free_for_a_model_that_is_served_or_fits_nowhere() -> None:
    world = rotating("w1")
    world.worker("w0", replica("large"))
    assert ("w1", "a") in leaving(world)
    world = rotating("w1", waits="huge")
    assert list(leaving(world)) == [("w1", "a")]
