"""Attempts and what peers report of them: the first result wins, and only of the live attempt."""

from __future__ import annotations

import pytest
from msgspec.structs import replace as changed

from peer.decide import admit, place, recover
from peer.decide.decision import Decision
from peer.decide.record import report
from peer.decide.workers import status
from peer.limits import ATTEMPTS_MAX, LOAD_RETRY_S
from peer.state.command import AssignModel, CancelTask, RestartWorker, UnloadModel
from peer.state.model import LoadProfile, ReplicaState
from peer.state.order import (
    AlertRaised,
    EngineStarted,
    ForgetAttempt,
    LoadReplica,
    ReplicaLoaded,
    RestartEngine,
    StopAttempt,
    UnloadReplica,
    WorkerReported,
)
from peer.state.record import decode
from peer.state.snapshot import Foresee
from peer.state.task import Array, Status, Task, TaskResult
from peer.state.worker import EngineState
from tests.decide.build import GIB, T0, World, device, failed, finished, replica, started, worker_report

FAILED, LOADING, READY, FETCHING, UNLOADING = (
    ReplicaState.FAILED,
    ReplicaState.LOADING,
    ReplicaState.READY,
    ReplicaState.FETCHING,
    ReplicaState.UNLOADING,
)


def ready(**fields: object) -> World:
    world = World()
    world.worker("w1", replica("echo"), **fields)
    return world


# ---------------------------------------------------------------- attempts


def test_a_start_is_kept_in_memory_and_bounded_by_this_clock() -> None:
    world = ready()
    task = world.submit()
    (order,) = world.later(5).schedule()
    task = world.task(task)
    assert (order.attempt, task.status, task.assigned_at) == (1, Status.ASSIGNED, T0 + 5)
    for said, kept in ((T0 - 900, T0 + 5), (T0 + 900, T0 + 8), (T0 + 6, T0 + 6)):
        decision = report(world.s, T0 + 8, started(task, said))
        (save,) = decision.changes
        assert save.record.started_at == kept  # type: ignore[union-attr]
    world.take(decision)
    assert world.batch.writes == {}
    assert world.task(task).status is Status.RUNNING
    assert report(world.s, T0 + 9, started(task, T0 + 9)).changes == []


def test_arrays_are_part_of_the_result() -> None:
    world = ready()
    task = world.running()
    arrays = (Array("embeddings", "float32", (2, 3), bytes(24)),)
    world.take(report(world.s, world.now, finished(task, world.now, generated_text="", arrays=arrays)))
    assert decode(TaskResult, world.disk[f"result/{task.task_id}"]).arrays == arrays
    assert decode(Task, world.disk[f"task/{task.task_id}"]).result_bytes == 32


def test_the_result_is_written_once() -> None:
    world = ready()
    task = world.running()
    world.later(4).take(report(world.s, world.now, finished(task, world.now, cached_tokens=3)))
    assert {f"task/{task.task_id}", f"result/{task.task_id}"} <= world.disk.keys()
    assert decode(TaskResult, world.disk[f"result/{task.task_id}"]).cached_tokens == 3
    assert world.events == ["task_completed"]
    assert world.data("task_completed")["duration_s"] == 4.0
    assert world.orders == [ForgetAttempt(epoch=7, worker_id="w1", task_id=task.task_id, attempt=1)]
    before = dict(world.disk)
    world.take(report(world.s, world.now, finished(task, world.now, generated_text="another")))
    assert world.disk == before
    assert world.orders == [ForgetAttempt(epoch=7, worker_id="w1", task_id=task.task_id, attempt=1)]


def test_the_duration_excludes_the_queue_and_a_lost_start_is_the_assignment() -> None:
    world = ready()
    task = world.submit()
    world.later(100).hear(worker_report("w1", replica("echo")))
    world.schedule()
    world.later(2).take(report(world.s, world.now, finished(world.task(task), world.now)))
    assert world.data("task_completed")["duration_s"] == 2.0
    assert world.s.run_s == {"echo": 2.0}


def test_a_failure_that_never_started_has_no_duration() -> None:
    world = ready()
    task = world.running()
    world.later(3).take(report(world.s, world.now, failed(task, 0.0, "bad", retryable=False)))
    assert world.events == ["task_failed"]
    assert world.data("task_failed")["duration_s"] == 3.0
    world.submit(timeout_s=10)
    world.later(10).take(recover.time_out(world.s, world.now))
    assert world.data("task_failed")["duration_s"] is None
    assert world.data("task_failed")["code"] == "timeout"


@pytest.mark.parametrize(("attempt", "worker"), [(2, "w1"), (1, "w2"), (0, "w1")])
def test_reports_of_other_attempts_are_refused(attempt: int, worker: str) -> None:
    world = ready()
    world.worker("w2")
    task = world.running()
    wrong = {"attempt": attempt, "worker_id": worker}
    for message, order in ((started, StopAttempt), (finished, ForgetAttempt), (failed, ForgetAttempt)):
        world.take(report(world.s, T0, message(task, T0, **wrong)))
        assert world.orders == [order(epoch=7, worker_id=worker, task_id=task.task_id, attempt=attempt)]
    assert world.task(task) == task


def test_a_refused_report_of_an_unknown_worker_is_only_refused() -> None:
    world = ready()
    task = world.running()
    world.take(report(world.s, T0, finished(task, T0, worker_id="nobody")))
    assert world.orders == []
    assert world.batch.reasons == [f"attempt 1 of {task.task_id} is dead"]


def test_lost_attempts_are_tried_again_so_often_and_no_more() -> None:
    world = ready()
    task = world.submit()
    for attempt in range(1, ATTEMPTS_MAX + 1):
        world.hear(worker_report("w1", replica("echo")))
        world.schedule()
        task = world.task(task)
        assert task.attempt == attempt
        world.later(1).take(report(world.s, world.now, failed(task, world.now)))
    assert world.s.tasks == {}
    assert world.data("task_failed")["code"] == "attempts_exhausted"


@pytest.mark.parametrize("code", ["worker_unavailable", "model_not_loaded", "engine_restarted"])
def test_being_refused_is_no_strike_and_waits_for_the_next_report(code: str) -> None:
    world = ready()
    task = world.submit()
    for _ in range(3 * ATTEMPTS_MAX):
        assert len(world.schedule()) == 1
        task = world.task(task)
        world.take(report(world.s, T0, failed(task, T0, code)))
        assert (world.task(task).strikes, world.task(task).started_at) == (0, None)
        assert world.schedule() == []  # not again and again before anything has changed
        world.hear(worker_report("w1", replica("echo")))


def test_a_strike_of_a_worker_that_has_gone() -> None:
    world = World()
    task = world.held("echo", "nobody")
    world.take(report(world.s, T0, failed(task, T0)))
    assert world.orders == []
    assert world.task(task).strikes == 1


def test_a_restart_requeues_and_waits_for_a_report() -> None:
    world = ready()
    task = world.running()
    reply = world.take(place.restart(world.s, T0, RestartWorker(worker_id="w1")), then_schedule=True)
    assert (reply.requeued_tasks, reply.estimated_s) == ((task.task_id,), 5.0)
    assert [type(order) for order in world.orders] == [StopAttempt, RestartEngine]
    assert (world.task(task).status, world.task(task).strikes) == (Status.QUEUED, 0)
    world.take(report(world.s, T0, EngineStarted(worker_id="w1", downtime_s=2.5)))
    assert place.restart(world.s, T0, RestartWorker(worker_id="w1")).reply.estimated_s == 2.5


# ---------------------------------------------------------------- lost attempts


def test_a_silent_worker_loses_its_tasks() -> None:
    world = ready()
    task = world.running()
    world.hear(worker_report("w1", replica("echo"), running=(f"{task.task_id}/1",)))
    world.later(5).lost_attempts()
    assert world.events == []
    world.later(-5)
    world.later(6.5).lost_attempts()
    text = "worker w1 is lost: it has not reported for 6.5 s"
    assert world.data("task_requeued")["message"] == text
    assert world.task(task).strikes == 1


def test_an_attempt_that_no_report_names_is_lost() -> None:
    world = ready()
    task, other = world.running(), world.running()
    world.later(2).hear(worker_report("w1", replica("echo"), running=(f"{other.task_id}/1",)))
    assert recover.lost_attempts(world.s, world.now).changes == []  # it may not show yet
    world.later(2).take(recover.lost_attempts(world.s, world.now))
    assert world.data("task_requeued")["message"] == "worker w1 lost the attempt"
    assert world.task(task).status is Status.QUEUED
    assert world.task(other).status is Status.RUNNING
    assert recover.lost_attempts(world.s, world.now).changes == []  # nothing else is in doubt


def test_a_new_leader_waits_for_first_reports() -> None:
    world = World()
    world.known("w1")
    task = world.held("echo", "w1")
    world.s.tasks[task.task_id] = world.s.held["w1"][task.task_id] = changed(task, assigned_at=None)
    world.later(5.9).lost_attempts()
    assert world.events == []
    world.later(0.2).lost_attempts()
    assert world.events == ["task_requeued"]


def test_one_silent_worker_of_a_peer_that_reports_loses_its_tasks() -> None:
    """Nothing is to be confirmed where the peer itself is there."""
    world = ready()
    task = world.running()
    world.worker("w2", running=())
    world.later(5).hear(worker_report("w2"))
    world.later(1.5).lost_attempts()
    assert world.data("task_requeued")["message"] == "worker w1 is silent"
    assert (world.task(task).strikes, world.s.lost) == (1, {})


def test_an_engine_that_is_down_loses_its_tasks() -> None:
    world = ready()
    task = world.running()
    named = (f"{task.task_id}/1",)
    world.later(4).hear(worker_report("w1", replica("echo"), running=named))
    world.lost_attempts()
    assert world.events == []
    world.hear(worker_report("w1", state=EngineState.RESTARTING, running=named))
    world.lost_attempts()
    assert world.data("task_requeued")["message"] == "worker w1 is silent"


def test_a_long_queue_whose_time_is_up_is_no_giant_transaction() -> None:
    world = World()
    for n in range(90):
        world.submit(timeout_s=float(n + 1))
    limit, recover._FAILED_MAX = recover._FAILED_MAX, 40
    try:
        world.later(89.5).take(recover.time_out(world.s, world.now))
        assert len(world.events) == 40
        assert min(task.timeout_s for task in world.s.tasks.values()) == 41
        world.take(recover.time_out(world.s, world.now))
        world.take(recover.time_out(world.s, world.now))
    finally:
        recover._FAILED_MAX = limit
    assert [task.timeout_s for task in world.s.tasks.values()] == [90]


def test_a_model_that_cannot_be_loaded_anywhere_fails_its_tasks() -> None:
    world = World()
    task = world.submit("small")
    assert recover.hopeless(world.s, T0).changes == []
    world.worker("w2", replica("small", "w2"))
    for worker, failures in (("w1", 3), ("w2", 2)):
        bad = replica("small", worker, state=FAILED, failures=failures, error="bad")
        world.take(Decision(changes=[Foresee(worker, "small", bad, T0)]))
        assert recover.hopeless(world.s, T0).changes == []
    worst = changed(world.s.replicas["w2"]["small"], failures=3)
    world.take(Decision(changes=[Foresee("w2", "small", worst, T0)]))
    world.take(recover.hopeless(world.s, T0))
    assert world.data("task_failed") | {"task_id": ""} == {
        "task_id": "",
        "worker_id": None,
        "model_name": "small",
        "duration_s": None,
        "success": False,
        "code": "model_unavailable",
        "message": "small cannot be loaded: bad",
    }
    assert task.task_id not in world.s.tasks


def test_status_changes_are_told_once() -> None:
    world = World()
    world.known("w1")
    world.take(recover.announce(world.s, T0))
    assert (world.data("worker_status_changed")["status"], world.events) == (
        "offline",
        ["worker_status_changed"],
    )
    world.hear(worker_report("w1", state=EngineState.ERROR, message="no such card"))
    world.take(recover.announce(world.s, T0))
    assert world.data("worker_status_changed") == {
        "worker_id": "w1",
        "status": "error",
        "previous_status": "offline",
        "message": "no such card",
    }
    assert recover.announce(world.s, T0).events == []


# ---------------------------------------------------------------- workers and replicas


def test_a_worker_is_saved_when_it_is_new_or_has_changed() -> None:
    world = World()
    world.take(report(world.s, T0, WorkerReported(report=worker_report())))
    assert "worker/w1" in world.batch.writes
    world.later(1).hear(worker_report())
    assert world.batch.writes == {}
    world.hear(worker_report(device=device(driver_version="6.8")))
    assert "worker/w1" in world.batch.writes
    world.hear(worker_report(device=device(driver_version="6.8"), peer_id="p2"))
    assert world.s.workers["w1"].peer_id == "p2"
    assert world.s.workers["w1"].first_seen == T0


def test_a_load_is_foreseen_until_a_report_shows_it() -> None:
    world = World()
    world.worker("w1")
    world.submit("small")
    world.take(place.reconcile(world.s, T0))
    assert [type(order) for order in world.orders] == [LoadReplica]
    world.later(1).hear(worker_report())  # made before the order came
    assert world.s.replicas["w1"]["small"].state is LOADING
    assert place.reconcile(world.s, world.now).orders == []
    world.hear(worker_report("w1", replica("small", state=FETCHING)))
    assert world.s.replicas["w1"]["small"].state is FETCHING
    assert world.s.foreseen == {}
    world.hear(worker_report("w1", replica("small", load_s=3.0)))
    assert world.data("model_loaded") == {
        "model_name": "small",
        "worker_id": "w1",
        "load_s": 3.0,
        "memory_bytes": 4 * GIB,
    }
    world.hear(worker_report("w1", replica("small")))
    assert world.events == []


def test_a_load_order_that_was_lost_is_given_anew() -> None:
    world = World()
    world.worker("w1")
    world.submit("small")
    world.take(place.reconcile(world.s, T0))
    world.later(5.5).hear(worker_report())
    assert world.s.replicas["w1"] == {}
    assert world.events == []  # it was never loaded, so it is not unloaded either
    assert [type(order) for _, order in place.reconcile(world.s, world.now).orders] == [LoadReplica]


def test_failures_are_counted_with_growing_patience() -> None:
    world = World()
    world.worker("w1")
    world.submit("small")
    waited = []
    for n in range(len(LOAD_RETRY_S)):
        world.take(place.reconcile(world.s, world.now))
        assert len(world.orders) == 1, n
        world.later(0.1).hear(worker_report("w1", replica("small", state=LOADING)))
        bad = replica("small", state=FAILED, error="bad", error_code="load_failed")
        world.hear(worker_report("w1", bad))
        assert world.events == ["model_load_failed"]
        waited.append(round(world.s.replicas["w1"]["small"].not_before - world.now, 3))
        world.later(0.1).hear(worker_report("w1", bad))
        assert world.s.replicas["w1"]["small"].failures == n + 1
        assert place.reconcile(world.s, world.now).orders == []
        world.later(waited[-1])
        world.hear(worker_report("w1", bad))
    assert tuple(waited) == LOAD_RETRY_S
    assert place.reconcile(world.s, world.now).orders == []  # not tried again by itself
    ask = AssignModel(model_name="small", worker_ids=("w1",), preload=True, priority=5)
    world.take(place.assign(world.s, world.now, ask, "a1"))
    assert len(place.reconcile(world.s, world.now).orders) == 1


def test_an_older_failure_does_not_hide_a_retry() -> None:
    world = World()
    bad = replica("small", state=FAILED, error="bad")
    world.worker("w1", bad)
    world.later(1.5)
    world.submit("small")
    world.take(place.reconcile(world.s, world.now))
    world.later(1).hear(worker_report("w1", bad))
    assert world.s.replicas["w1"]["small"].state is LOADING
    world.later(2).hear(worker_report("w1", bad))  # by now it is the new failure
    assert (world.s.replicas["w1"]["small"].state, world.s.replicas["w1"]["small"].failures) == (FAILED, 2)


def test_an_unload_is_foreseen_until_it_is_done_or_lost() -> None:
    world = World()
    world.worker("w1", replica("small"))
    world.take(place.unload(world.s, T0, UnloadModel(model_name="small", worker_ids=(), force=False)))
    world.take(place.reconcile(world.s, T0))
    assert [type(order) for order in world.orders] == [UnloadReplica]
    world.later(1).hear(worker_report("w1", replica("small")))
    assert world.s.replicas["w1"]["small"].state is UNLOADING
    assert place.reconcile(world.s, world.now).orders == []
    world.later(30).hear(worker_report("w1", replica("small")))
    assert world.s.replicas["w1"]["small"].state is READY
    world.take(place.reconcile(world.s, world.now))
    assert [type(order) for order in world.orders] == [UnloadReplica]
    world.later(1).hear(worker_report("w1"))
    assert world.events == ["model_unloaded"]
    world.take(place.reconcile(world.s, world.now))
    assert (world.s.draining, world.s.foreseen) == ({}, {})


def test_what_is_foreseen_of_one_worker_is_nothing_to_another() -> None:
    world = World()
    world.worker("w1")
    world.worker("w2")
    world.take(_foreseen(world, "w1"))
    world.hear(worker_report("w2"))
    assert set(world.s.foreseen) == {("w1", "small")}
    assert world.s.replicas["w2"] == {}


def _foreseen(world: World, worker: str) -> Decision:
    return Decision(changes=[Foresee(worker, "small", replica("small", worker, state=LOADING), world.now)])


def test_what_a_load_measured_is_kept() -> None:
    world = World()
    measured = {"model_name": "small", "device_name": "card", "memory_bytes": 5, "load_s": 2.0}
    world.take(report(world.s, T0, ReplicaLoaded(worker_id="w1", **measured)))
    assert world.s.profiles == {("card", "small"): LoadProfile(**measured)}


def test_alerts_become_events() -> None:
    world = World()
    alert = AlertRaised(
        worker_id="w1", kind="temperature", level="warning", raised=True, value=96.0, threshold=95.0,
        unit="°C", message="hot",
    )  # fmt: skip
    world.take(report(world.s, T0, alert))
    assert world.data("gpu_alert")["value"] == 96.0


def test_busy_offline_error() -> None:
    world = World()
    world.known("w1")
    assert status(world.s, "w1", T0) == "offline"
    world.worker("w1", replica("echo", slots=1), replica("small", state=LOADING))
    assert status(world.s, "w1", T0) == "online"
    world.running()
    assert status(world.s, "w1", T0) == "busy"
    world.later(6).wake()
    assert status(world.s, "w1", world.now) == "busy"
    world.later(0.1).wake()
    assert status(world.s, "w1", world.now) == "offline"
    world.hear(worker_report(state=EngineState.RESTARTING))
    assert status(world.s, "w1", T0) == "offline"


def test_cancel_after_requeue_is_told_once() -> None:
    world = ready()
    task = world.running()
    world.take(report(world.s, T0, failed(task, T0)))
    assert world.batch.requeued == [world.task(task)]
    world.take(admit.cancel(world.s, T0, CancelTask(task_id=task.task_id), None))
    assert list(world.batch.ended) == [task.task_id]
