"""Models where owners wish for them and where tasks need them; what clients are told of it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace as changed

from peer.decide import meter, place, recover, view
from peer.decide.decision import Decision
from peer.decide.workers import memory
from peer.errors import Conflict, NotFound
from peer.state.command import AssignModel, RestartWorker, UnloadModel
from peer.state.metric import Bucket, Counts
from peer.state.model import LoadProfile, Model, ReplicaState
from peer.state.order import LoadReplica, UnloadReplica
from peer.state.snapshot import Pace, Save
from peer.state.worker import EngineState, Telemetry
from tests.decide.build import (
    CATALOGUE,
    GIB,
    LARGE,
    SMALL,
    T0,
    World,
    device,
    replica,
    worker_report,
)

FETCHING, LOADING, FAILED, UNLOADING = (
    ReplicaState.FETCHING,
    ReplicaState.LOADING,
    ReplicaState.FAILED,
    ReplicaState.UNLOADING,
)


def assign(world: World, model: str, *workers: str, preload: bool = True, priority: int = 5) -> Any:
    ask = AssignModel(model_name=model, worker_ids=workers, preload=preload, priority=priority)
    return world.take(place.assign(world.s, world.now, ask, "a1"))


def unload(world: World, model: str, *workers: str, force: bool = False) -> Any:
    ask = UnloadModel(model_name=model, worker_ids=workers, force=force)
    return world.take(place.unload(world.s, world.now, ask))


def reconcile(world: World) -> list[Any]:
    world.take(place.reconcile(world.s, world.now))
    return world.orders


# ---------------------------------------------------------------- wishes


def test_where_no_worker_is_named_one_that_has_it_or_has_most_room() -> None:
    world = World()
    with pytest.raises(Conflict, match="no worker that is up"):
        assign(world, "small")
    world.worker("w1", replica("large"))
    world.worker("w2")
    assert assign(world, "small").placed[0].worker_id == "w2"
    (placed,) = assign(world, "large").placed
    assert (placed.worker_id, placed.status, placed.estimated_s) == ("w1", "loaded", 0.0)
    assert set(world.s.assignments) == {("w2", "small"), ("w1", "large")}


def test_what_does_not_exist_is_named() -> None:
    world = World()
    world.worker("host-gpu0")
    with pytest.raises(NotFound, match="did you mean small"):
        assign(world, "smal")
    with pytest.raises(NotFound, match="did you mean host-gpu0"):
        assign(world, "small", "host-gpu1")
    with pytest.raises(NotFound, match=r"`zz`$"):
        place.restart(world.s, T0, RestartWorker(worker_id="zz"))
    with pytest.raises(NotFound, match="did you mean small"):
        unload(world, "smal")
    with pytest.raises(NotFound, match="host-gpu0"):
        unload(world, "small", "host-gpu1")
    with pytest.raises(Conflict, match="`small` is not on host-gpu0"):
        unload(world, "small")
    with pytest.raises(Conflict, match="not on any worker"):
        unload(World(), "small")


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    world = World()
    telemetry = Telemetry(memory_total_bytes=8 * GIB, memory_used_bytes=6 * GIB)
    world.worker("w1", telemetry=telemetry)
    text = "`small` does not fit on w1: it needs 4GB, 2GB of 8GB free .6GB used by other processes.$"
    with pytest.raises(Conflict, match=text) as caught:
        assign(world, "small", "w1")
    assert caught.value.details["free_bytes"] == 2 * GIB
    assert world.s.assignments == {}


def test_the_arithmetic_names_the_reserve_and_each_model() -> None:
    world = World()
    world.worker("w1", replica("small"))
    room = memory(world.s, "w1")
    assert room.arithmetic(5 * GIB) == "needs 5GB, 4GB of 8GB free (4GB by small)"
    policy = type(world.s.policy)
    world.s.policy = policy(**{**_fields(world.s.policy), "memory_reserve_bytes": GIB})
    assert "(1GB reserved, 4GB by small)" in memory(world.s, "w1").arithmetic(1)
    empty = World()
    empty.worker("w1")
    assert memory(empty.s, "w1").arithmetic(GIB) == "needs 1GB, 8GB of 8GB free"


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


def test_a_builtin_model_needs_the_stand_in() -> None:
    world = World()
    world.worker("w1", device=device(stand_in=False))
    with pytest.raises(Conflict) as caught:
        assign(world, "echo", "w1")
    assert caught.value.code == "wrong_engine"


def test_what_becomes_of_a_wish() -> None:
    world = World()
    world.known("w0")
    world.worker("w1", replica("small", state=LOADING), replica("gone", state=LOADING, memory_bytes=1))
    world.worker("w2", state=EngineState.RESTARTING)
    world.worker("w3")
    world.take(Decision(changes=[Save(
        LoadProfile(model_name="small", device_name="card", memory_bytes=GIB, load_s=9.0)
    )]))  # fmt: skip
    reply = assign(world, "echo", "w0", "w1", "w2", "w3")
    assert [(p.worker_id, p.status, p.estimated_s, p.reason) for p in reply.placed] == [
        ("w0", "queued", 1.0, "when the worker is up"),
        ("w1", "queued", 10.0, "after another load"),
        ("w2", "queued", 1.0, "when the worker is up"),
        ("w3", "loading", 1.0, ""),
    ]
    (placed,) = assign(world, "echo", "w3", preload=False).placed
    assert (placed.status, placed.reason) == ("assigned", "on first use")
    assert [order.worker_id for order in reconcile(world)] == []  # w3's is on first use now


def test_wishes_are_loaded_one_at_a_time_by_priority() -> None:
    world = World()
    world.worker("w1")
    assign(world, "sized", "w1", priority=5)
    assign(world, "small", "w1", priority=1)
    (order,) = reconcile(world)
    assert order.model == SMALL
    assert reconcile(world) == []
    world.hear(worker_report("w1", replica("small")))
    assert [order.model.name for order in reconcile(world)] == ["sized"]
    world.hear(worker_report("w1", replica("small"), replica("sized")))
    assert reconcile(world) == []


def test_a_wish_whose_load_failed_waits_for_its_next_try() -> None:
    world = World()
    world.worker("w1")
    assign(world, "small", "w1")
    world.hear(worker_report("w1", replica("small", state=FAILED)))
    assert reconcile(world) == []
    world.later(1.1)
    assert [order.model.name for order in reconcile(world)] == ["small"]


def test_a_wish_for_what_left_the_catalogue_waits() -> None:
    world = World()
    world.worker("w1")
    assign(world, "small", "w1")
    world.submit("sized")
    world.s.catalogue = {}
    assert reconcile(world) == []


# ---------------------------------------------------------------- demand


def test_a_queued_task_brings_its_model_where_it_is_wished_for_else_where_room_is() -> None:
    world = World()
    world.worker("w1", replica("echo"))
    world.worker("w2")
    world.submit("small")
    assert [order.worker_id for _, order in place.reconcile(world.s, T0).orders] == ["w2"]
    assign(world, "small", "w1", preload=False)
    assert [order.worker_id for order in reconcile(world)] == ["w1"]
    assert reconcile(world) == []  # it is on its way


def test_a_second_replica_where_the_first_is_full_and_a_worker_idles() -> None:
    world = World()
    world.worker("w1", replica("small", slots=1))
    world.worker("w2", replica("echo"))
    world.held("small", "w1")
    world.submit("small")
    echo = world.held("echo", "w2")
    assert reconcile(world) == []
    world.take(recover.fail(world.s, T0, echo, "x", "y"))
    assert [(order.worker_id, type(order)) for order in reconcile(world)] == [("w2", LoadReplica)]


def test_room_is_made_by_what_was_used_longest_ago() -> None:
    world = World()
    a, b, c = (
        replica(name, memory_bytes=2 * GIB, last_used=used)
        for name, used in (("a", 3.0), ("b", 1.0), ("c", 2.0))
    )
    world.worker("w1", a, b, c)
    world.submit("small")
    assert reconcile(world) == []
    assert list(world.s.draining) == [("w1", "b")]
    assert [type(order) for order in reconcile(world)] == [UnloadReplica]
    assert reconcile(world) == []
    world.hear(worker_report("w1", a, c))
    assert [type(order) for order in reconcile(world)] == [LoadReplica]
    assert list(world.s.draining) == []


def test_what_drains_already_is_not_sent_away_twice() -> None:
    world = World()
    world.worker("w1", replica("a", memory_bytes=4 * GIB), replica("b", memory_bytes=4 * GIB, last_used=1))
    world.drain("a")
    world.submit("large")
    world.take(place.reconcile(world.s, T0))
    assert set(world.s.draining) == {("w1", "a"), ("w1", "b")}
    assert world.batch.reasons == ["b leaves w1 to make room for large"]


def test_nothing_is_sent_away_in_vain() -> None:
    """Two models that tasks ask for in turn must not chase each other for a third that never fits."""
    huge = changed(LARGE, name="huge", memory_bytes=9 * GIB)
    world = World()
    world.s.catalogue = {**CATALOGUE, "huge": huge}
    world.worker("w1", replica("small"), replica("echo", memory_bytes=GIB))
    world.submit("huge")
    for _ in range(3):
        assert reconcile(world) == []
        assert world.s.draining == {}


@pytest.mark.parametrize("why", ["wished", "held", "queued"])
def test_what_is_needed_stays(why: str) -> None:
    world = World()
    world.worker("w1", replica("small", slots=1))
    if why == "wished":
        assign(world, "small", "w1", preload=False)
    elif why == "held":
        world.held("small", "w1")
    else:
        world.submit("small")
    world.submit("large", priority=1)
    assert reconcile(world) == []
    assert world.s.draining == {}


def test_what_drains_is_not_loaded() -> None:
    world = World()
    world.worker("w1", replica("small", state=FAILED))
    world.s.replicas["w1"]["small"] = replica("small", state=FAILED)
    world.submit("small")
    world.drain("small")
    assert [type(order) for order in reconcile(world)] == [UnloadReplica]


# ---------------------------------------------------------------- views


def pending(world: World, model: str = "small") -> dict[str, str]:
    task = world.submit(model)
    reasons = view.live_task(world.s, world.now, task).pending
    return {each.worker_id: each.reason for each in reasons}


def test_every_reason_to_wait() -> None:
    world = World()
    assert pending(world) == {"": "no worker has registered yet"}
    world.known("w0")
    world.worker("w1", state=EngineState.ERROR, message="no card")
    world.worker("w2")
    world.worker("w3", replica("large"))
    world.worker("w4", replica("sized", state=FETCHING), replica("echo"))
    world.worker("w5", replica("small", state=LOADING, stage="upload", done=1, total=4))
    world.worker("w6", replica("small", state=LOADING))
    world.worker("w7", replica("small", state=FAILED, error="bad"))
    world.worker("w8", replica("small", state=UNLOADING))
    world.worker("w9", replica("small"))
    assert pending(world) == {
        "w0": "the worker is offline",
        "w1": "the worker is error: no card",
        "w2": "small is not loaded",
        "w3": "small does not fit: it needs 4GB, 1GB of 8GB free (7GB by large)",
        "w4": "small is not loaded; the worker is loading sized first",
        "w5": "small is loading (upload 25%)",
        "w6": "small is loading",
        "w7": "small could not be loaded (1 times): bad",
        "w8": "small is being unloaded",
        "w9": "it is next and about to be assigned",
    }
    world.held("small", "w9")
    world.held("small", "w9")
    assert pending(world)["w9"] == "all slots are taken; 2 tasks are ahead in the queue"
    world.worker("w1", device=device(stand_in=False))
    assert pending(world, "echo")["w1"] == "echo only runs on the stand-in engine"
    world.s.catalogue = {"echo": CATALOGUE["echo"]}
    gone = next(task for task in world.s.tasks.values() if task.model_name == "small")
    (reason,) = view.pending_reasons(world.s, T0, gone)
    assert reason.reason == "`small` is no longer in the catalogue"
    assert view.estimated_wait_s(world.s, T0, gone) is None


def test_estimated_waits() -> None:
    world = World()
    first = world.submit("small")
    assert view.live_task(world.s, T0, first).estimated_wait_s is None  # nothing is up
    world.take(Decision(changes=[Save(
        LoadProfile(model_name="small", device_name="card", memory_bytes=GIB, load_s=9.0)
    )]))  # fmt: skip
    world.worker("w1")
    assert view.estimated_wait_s(world.s, T0, first) == 9.0
    world.worker("w1", replica("small", state=LOADING, since=T0 - 4))
    assert view.estimated_wait_s(world.s, T0, first) == 5.0
    world.worker("w1", replica("small"))
    assert view.estimated_wait_s(world.s, T0, first) == 0.0
    third = [world.submit("small") for _ in range(2)][-1]
    assert view.estimated_wait_s(world.s, T0, third) is None  # no run time has been measured
    world.take(Decision(changes=[Pace("small", 4.0), Pace("small", 14.0)]))
    assert view.estimated_wait_s(world.s, T0, third) == 5.0
    held = view.live_task(world.s, T0, world.held("small", "w1"))
    assert (held.estimated_wait_s, held.peer_id) == (None, "p1")


def test_workers_and_their_score() -> None:
    world = World()
    world.known("w0")
    world.worker("w1", replica("echo"))
    world.worker("w2")
    world.worker("w3")
    counts = {
        "w1": Counts(completed=1, response_s=2.0, run_s=1.0, tokens=10),
        "w2": Counts(completed=1, failed=1, response_s=2.0, run_s=1.0, tokens=5),
        "w3": Counts(failed=1),
    }
    world.take(Decision(changes=[Save(Bucket(resolution="1s", start=int(T0), workers=counts))]))
    assert [w.performance_score for w in view.workers(world.s, T0)] == [0.0, 10.0, 2.5, 0.0]
    shown = view.worker(world.s, T0, "w1")
    assert (shown.status, shown.metrics.tasks_last_hour) == ("online", 1)
    with pytest.raises(NotFound):
        view.worker(world.s, T0, "w9")
    silent = {"w1": Counts(completed=1, run_s=1.0)}
    world.take(Decision(changes=[Save(Bucket(resolution="1s", start=int(T0), workers=silent))]))
    assert view.worker(world.s, T0, "w1").performance_score == 10.0
    assert meter.worker_metrics(world.s, "w0", T0).average_run_s is None


def test_models_and_assignments() -> None:
    world = World()
    world.worker("w1", replica("small"), replica("echo"))
    assign(world, "small", "w1")
    world.submit("large")
    (one,) = view.assignments(world.s)
    assert ([r.model_name for r in one.replicas], [w.model_name for w in one.wishes]) == (
        ["small", "echo"],
        ["small"],
    )
    models = {each.model.name: (len(each.replicas), each.queued) for each in view.models(world.s)}
    assert models == {"echo": (1, 0), "small": (1, 0), "large": (0, 1), "sized": (0, 0)}


def test_the_clusters_status() -> None:
    world = World()
    assert (view.cluster(world.s, T0).status, view.cluster(world.s, T0).reasons) == (
        "down",
        ("no worker has registered yet",),
    )
    world.known("w0")
    world.worker("w1", replica("echo"))
    shown = view.cluster(world.s, T0 + 1)
    assert (shown.status, shown.reasons) == ("degraded", ("w0 is offline",))
    assert (shown.gpu_utilization, shown.available_memory_bytes) == (50.0, 7 * GIB)
    world.worker("w0", state=EngineState.ERROR, message="no card")
    assert view.cluster(world.s, T0).reasons == ("w0 is error: no card",)
    world.running()
    world.worker("w0", telemetry=Telemetry(memory_total_bytes=0, memory_used_bytes=0))
    shown = view.cluster(world.s, T0)
    assert (shown.status, shown.running_tasks, shown.total_workers) == ("operational", 1, 2)
    world.worker("w1", telemetry=Telemetry(memory_total_bytes=0, memory_used_bytes=0))
    assert view.cluster(world.s, T0).gpu_utilization == 0.0


def test_unmeasured_models_are_estimated_from_their_size() -> None:
    world = World()
    world.worker("w1")
    model: Model = CATALOGUE["sized"]
    assert place.memory_needed(world.s, model, "w1") == int(1.25 * GIB)
    assert place.load_seconds(world.s, model, "w1") == pytest.approx(GIB / 100e6)
    profile = LoadProfile(model_name="sized", device_name="card", memory_bytes=7, load_s=2.0)
    world.take(Decision(changes=[Save(profile)]))
    assert (place.memory_needed(world.s, model, "w1"), place.load_seconds(world.s, model, "w1")) == (7, 2.0)
