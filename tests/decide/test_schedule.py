"""Which task goes to which worker, and what a worker must give up again."""

from __future__ import annotations

from peer.decide import admit, recover
from peer.state.command import CancelTask
from peer.state.order import StopAttempt
from tests.decide.build import T0, World, replica, worker_report
from tests.decide.test_record import ready


def test_what_a_returning_worker_still_runs_is_stopped() -> None:
    """The order to stop it was lost with its peer; its slot is not waited for."""
    world = ready()
    task, other = world.running(), world.submit()
    world.schedule()
    running = (f"{task.task_id}/1", f"{other.task_id}/1")
    world.hear(worker_report("w1", replica("echo"), running=running))
    assert world.orders == []
    world.take(recover.requeue(world.s, T0, world.task(task), "x", "y", strike=False))
    world.hear(worker_report("w1", replica("echo"), running=running))
    assert [(type(o), o.task_id, o.attempt) for o in world.orders] == [(StopAttempt, task.task_id, 1)]
    assert world.batch.reasons == [f"w1 still has the dead attempt {task.task_id}/1"]
    world.take(admit.cancel(world.s, T0, CancelTask(task_id=task.task_id), None))
    world.hear(worker_report("w1", replica("echo"), running=(running[1], "gone/3")))
    assert world.orders == []  # that one is named for the first time
    world.hear(worker_report("w1", replica("echo"), running=(running[1], "gone/3")))
    assert [(o.task_id, o.attempt) for o in world.orders] == [("gone", 3)]


def test_a_devices_own_bound_on_slots_is_shared_by_its_models() -> None:
    world = World()
    world.worker("w1", replica("echo"), replica("small"), slots_max=2)
    for _ in range(2):
        world.submit("echo")
        world.submit("small")
    assert [run.model_name for run in world.schedule()] == ["echo", "echo"]
    assert world.schedule() == []


def test_scheduling_prefers_rank_and_the_least_loaded_worker() -> None:
    world = World()
    world.worker("w1", replica("echo", slots=1))
    world.worker("w2", replica("echo", "w2", slots=2), replica("small", "w2"))
    low, high, other = world.submit(priority=8), world.submit(priority=1), world.submit("small")
    given = {order.task_id: order.worker_id for order in world.schedule()}
    assert given[high.task_id] == "w1"
    assert given[low.task_id] == "w2"
    assert given[other.task_id] == "w2"
    assert world.s.queues == {}
    world.submit()
    world.submit()
    assert len(world.schedule()) == 1  # one slot was left
    world.submit("sized")  # nowhere loaded
    assert world.schedule() == []


def test_draining_takes_no_tasks_and_can_be_taken_back() -> None:
    world = ready()
    assert world.schedule() == []  # nothing waits
    world.submit()
    world.drain("echo")
    assert world.schedule() == []
    world.undrain("echo")
    assert len(world.schedule()) == 1
