"""A batch of decisions as transactions: one, or as few as a store takes, each a state that could have been."""

from __future__ import annotations

from dataclasses import replace

from peer.adapters.stores.etcd_store import OPERATIONS_MAX, REQUEST_BYTES_MAX
from peer.decide import admit, recover
from peer.decide.batch import TRANSACTION_BYTES_MAX, TRANSACTION_WRITES_MAX, Batch
from peer.decide.decision import Decision
from peer.decide.record import report
from peer.limits import FRAME_BYTES_MAX
from peer.state.command import SubmitTask
from peer.state.snapshot import Save
from peer.state.task import TaskInput
from tests.decide.build import POLICY, T0, World, finished, replica, snapshot


def record(number: int, nbytes: int = 10) -> Save:
    """A record of about so many bytes."""
    return Save(TaskInput(task_id=f"task-{number:06}", parameters={"prompt": "x" * nbytes}))


def keys(batch: Batch) -> list[list[str]]:
    return [list(writes) for writes in batch.transactions]


def test_a_store_of_a_cluster_takes_every_transaction() -> None:
    assert TRANSACTION_WRITES_MAX <= OPERATIONS_MAX // 2
    assert max(TRANSACTION_BYTES_MAX, FRAME_BYTES_MAX) + 1024 * 1024 < REQUEST_BYTES_MAX


def test_decisions_go_together_while_they_fit() -> None:
    batch = Batch(snapshot(), T0)
    batch.take(Decision())
    assert batch.transactions == []
    for number in range(3):
        batch.take(Decision(changes=[record(number)]))
    assert keys(batch) == [[f"input/task-{number:06}" for number in range(3)]]
    assert batch.writes == batch.transactions[0]


def test_what_does_not_fit_begins_another_transaction() -> None:
    third = TRANSACTION_BYTES_MAX // 3
    batch = Batch(snapshot(), T0)
    for number in range(5):
        batch.take(Decision(changes=[record(number, third)]))
    assert [len(writes) for writes in batch.transactions] == [2, 2, 1]
    batch.take(Decision(changes=[record(0), record(9)]))  # again: what is written last counts
    assert [len(writes) for writes in batch.transactions] == [2, 2, 3]
    assert batch.writes["input/task-000000"] == batch.transactions[2]["input/task-000000"]


def test_a_decision_is_whole_while_it_fits_and_else_goes_record_by_record() -> None:
    half = TRANSACTION_BYTES_MAX // 2
    batch = Batch(snapshot(), T0)
    batch.take(Decision(changes=[record(0, half - 100_000)]))
    batch.take(Decision(changes=[record(1, half - 100_000), record(2, half - 100_000)]))
    assert [len(writes) for writes in batch.transactions] == [1, 2]
    batch.take(Decision(changes=[record(number, half - 100_000) for number in (3, 4, 5)]))
    assert [len(writes) for writes in batch.transactions] == [1, 2, 2, 1]


def test_a_record_that_is_larger_than_a_transaction_goes_alone() -> None:
    batch = Batch(snapshot(), T0)
    batch.take(Decision(changes=[record(0)]))
    batch.take(Decision(changes=[record(1, TRANSACTION_BYTES_MAX)]))
    batch.take(Decision(changes=[record(2)]))
    assert [len(writes) for writes in batch.transactions] == [1, 1, 1]


def test_a_task_is_never_apart_from_what_belongs_to_it() -> None:
    """A leader that died between the two would leave a task without its prompt, which no later one could load, or one
    that is completed and has no result."""
    prompts = [{"prompt": letter * (TRANSACTION_BYTES_MAX + 1)} for letter in "ab"]
    world = World(snapshot())
    batch = Batch(world.s, T0)
    for number, parameters in enumerate(prompts):
        batch.take(
            admit.submit(
                world.s,
                T0,
                SubmitTask(
                    task_type="text_generation",
                    model_name="echo",
                    parameters=parameters,
                    priority=5,
                    timeout_s=300.0,
                    owner="o",
                    key_id="k",
                    idempotency_key=f"key-{number}",
                    body_digest="d",
                ),
                f"task-{number}",
                10,
            )
        )
    for number, writes in enumerate(batch.transactions):
        kinds = sorted(key.partition("/")[0] for key in writes)
        assert kinds == ["by", "idempotency", "input", "task"]
        assert f"task/task-{number}" in writes

    world = World()
    world.worker("w1", replica("echo"))
    task = world.running()
    outcome = finished(task, world.now, generated_text="x" * (TRANSACTION_BYTES_MAX + 1))
    batch = Batch(world.s, world.now)
    batch.take(report(world.s, world.now, outcome))
    (whole,) = [writes for writes in batch.transactions if f"task/{task.task_id}" in writes]
    assert f"result/{task.task_id}" in whole


def test_a_long_queue_that_is_over_at_once_is_several_transactions() -> None:
    """Each task with its index keys in one of them, and all of it as if there had been but one."""
    world = World(snapshot(replace(POLICY, queue_tasks_max=2_000, queue_bytes_max=1_000_000)))
    tasks = [world.submit(timeout_s=60.0) for _ in range(1_500)]
    world.later(61)
    batch = Batch(world.s, world.now)
    batch.take(recover.time_out(world.s, world.now))
    assert len(batch.transactions) > 1
    for writes in batch.transactions:
        assert len(writes) <= TRANSACTION_WRITES_MAX
        ended = {key.removeprefix("task/") for key in writes if key.startswith("task/")}
        assert ended == {key.rpartition("/")[2] for key in writes if key.startswith("by/status/")}
    assert set(batch.ended) <= {task.task_id for task in tasks}
    assert len(batch.ended) == len([key for key in batch.writes if key.startswith("task/")])
