"""What a peer keeps of the answers it has had: little, and only what any reader may see."""

from __future__ import annotations

from peer.remembered import Remembered
from peer.state import command as asks
from peer.state.task import Task, TaskResult


def view(text: str) -> asks.TaskView:
    task = Task(
        task_id="t",
        task_type="text_generation",
        model_name="m",
        priority=5,
        timeout_s=1.0,
        created_at=0.0,
        deadline=1.0,
        owner="tests",
    )
    result = TaskResult(
        task_id="t",
        attempt=1,
        worker_id="w",
        generated_text=text,
        tokens_generated=1,
        prompt_tokens=1,
        finish_reason="stop",
        processing_s=1.0,
        first_token_s=0.1,
    )
    return asks.TaskView(task=task, result=result)


def test_the_last_answer_is_found_with_its_age() -> None:
    remembered = Remembered()
    assert remembered.find(asks.ListWorkers(), 0.0) is None
    remembered.keep(asks.ListWorkers(), ("first",), 1.0)
    remembered.keep(asks.ListWorkers(), ("second",), 2.0)
    assert remembered.find(asks.ListWorkers(), 5.0) == (("second",), 3.0)
    assert remembered.find(asks.GetWorker(worker_id="w"), 5.0) is None


def test_answers_are_bounded_and_the_oldest_goes() -> None:
    remembered = Remembered(answers_max=2)
    for worker_id in ("a", "b", "a", "c"):
        remembered.keep(asks.GetWorker(worker_id=worker_id), worker_id, 0.0)
    found = [remembered.find(asks.GetWorker(worker_id=worker_id), 0.0) for worker_id in "abc"]
    assert found == [("a", 0.0), None, ("c", 0.0)]


def test_keys_and_commands_are_not_kept() -> None:
    remembered = Remembered()
    for request in (asks.ListKeys(), asks.RevokeKey(key_id="k")):
        remembered.keep(request, "secret", 0.0)
        assert remembered.find(request, 0.0) is None


def test_tasks_are_kept_without_what_is_large() -> None:
    remembered = Remembered()
    remembered.keep(asks.GetTask(task_id="t", wait_s=30.0), view("x" * 20_000), 0.0)
    assert remembered.find(asks.GetTask(task_id="t"), 0.0) is None
    remembered.keep(asks.GetTask(task_id="t", wait_s=30.0), view("short"), 1.0)
    found = remembered.find(asks.GetTask(task_id="t"), 1.0)
    assert found is not None
    assert found[0].result.generated_text == "short"
