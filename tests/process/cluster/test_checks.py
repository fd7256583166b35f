"""The checks of clusters themselves: each finds what it is there for."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.process.cluster import chaos, check
from tests.process.cluster.history import Answer, History


def view(status: str = "queued", attempt: int = 0, text: str = "", **more: Any) -> dict[str, Any]:
    result = {"generated_text": text} if status == "completed" else None
    return {"task_id": "task-1", "status": status, "attempt": attempt, "result": result, "error": None} | more


def answer(at: float, body: dict[str, Any], status: int = 200) -> Answer:
    return Answer(status, body, at, at + 0.5)


@pytest.fixture
def history() -> History:
    """One task that was acknowledged at 1."""
    made = History()
    made.begin("k", "hello")
    assert made.submitted("c", "k", Answer(503, {}, 0.0, 0.5)) == ""
    assert made.submitted("c", "k", answer(0.6, view(), 201)) == "task-1"
    return made


def wrong(history: History) -> str:
    with pytest.raises(AssertionError) as caught:
        check.tasks(history)
    return str(caught.value)


def test_a_task_that_ends_well_is_closed(history: History) -> None:
    history.read("r", "k", answer(2.0, view("running", 1)))
    history.read("r", "k", answer(3.0, view("completed", 2, "hello")))
    assert check.tasks(history) == (1, 1)
    assert check.tasks(history) == (0, 0)
    assert [told.task_id for told in history.acknowledged()] == ["task-1"]
    history.read("r", "k", answer(4.0, view("completed", 2, "other")))
    assert "has changed" in wrong(history)


def test_a_lost_task_is_found(history: History) -> None:
    history.read("r", "k", answer(2.0, {}, 404))
    assert "no such task" in wrong(history)


def test_two_tasks_of_one_key_are_found(history: History) -> None:
    history.submitted("c", "k", answer(2.0, view() | {"task_id": "task-2"}, 201))
    assert "made task-1 and task-2" in wrong(history)


def test_what_goes_back_is_found(history: History) -> None:
    history.read("r", "k", answer(2.0, view("running", 2)))
    history.read("r", "k", answer(3.0, view("running", 1)))
    history.read("r", "k", answer(4.0, view("completed", 2, "hello")))
    assert "no order" in wrong(history)


def test_what_has_ended_stays_so(history: History) -> None:
    history.read("r", "k", answer(2.0, view("completed", 1, "hello")))
    history.read("r", "k", answer(3.0, view("running", 2)))
    assert "had ended" in wrong(history)


def test_who_began_to_read_before_the_end_may_not_see_it(history: History) -> None:
    history.read("r", "k", answer(2.0, view("completed", 1, "hello")))
    history.read("s", "k", answer(2.4, view("running", 1)))
    assert check.tasks(history) == (1, 0)


def test_an_acknowledged_cancel_holds(history: History) -> None:
    history.cancelled("c", "k", answer(2.0, view("cancelled")))
    history.read("r", "k", answer(3.0, view("completed", 1, "hello")))
    assert "was cancelled and is completed" in wrong(history)


def test_nobody_else_cancels(history: History) -> None:
    history.read("r", "k", answer(3.0, view("cancelled", 1)))
    assert "nobody has asked" in wrong(history)


def test_another_result_and_too_many_attempts_are_found(history: History) -> None:
    history.read("r", "k", answer(3.0, view("completed", 4, "bye")))
    found = wrong(history)
    assert "another one's result" in found
    assert "4 attempts" in found


@pytest.mark.parametrize(("code", "fine"), [("attempts_exhausted", True), ("timeout", False)])
def test_a_task_may_fail_of_three_lost_workers_only(history: History, code: str, fine: bool) -> None:
    history.read("r", "k", answer(3.0, view("failed", 3, error={"code": code})))
    if fine:
        assert check.tasks(history) == (1, 2)
    else:
        assert "failed of" in wrong(history)


def test_an_answer_that_nobody_expects_is_found(history: History) -> None:
    history.read("r", "k", answer(3.0, {"error": "!"}, 500))
    assert "answered 500" in wrong(history)


def test_gaps_reach_to_both_ends() -> None:
    history = History()
    history.acknowledged_at = [1.0, 2.0, 5.5, 6.0]
    assert history.gap_s(0.0, 6.5) == 3.5
    assert history.gap_s(2.5, 5.0) == 2.5
    assert history.gap_s(5.0, 20.0) == 14.0


def line(event: str, epoch: int) -> dict[str, Any]:
    return {"event": event, "epoch": epoch}


def test_leaders_of_epochs() -> None:
    logs = {
        "a": [line("elected", 3), line("leading", 3), line("elected", 9)],
        "b": [line("elected", 5), {"event": "x"}],
    }
    assert check.leaders(logs) == {3: "a", 9: "a", 5: "b"}
    with pytest.raises(AssertionError, match="two leaders"):
        check.leaders(logs | {"c": [line("leading", 9)]})
    with pytest.raises(AssertionError, match="after 9"):
        check.leaders({"a": [line("elected", 9), line("elected", 5)]})


def test_who_is_agreed_upon() -> None:
    assert check.agreed([{"leader": "a", "epoch": 3}] * 3) == ("a", 3)
    assert check.agreed([{"leader": "a", "epoch": 3}, {"leader": "a", "epoch": 4}]) is None
    assert check.agreed([{"leader": "", "epoch": 0}]) is None
    assert check.agreed([]) is None


def test_faults_are_drawn_by_the_seed_and_engines_are_spared() -> None:
    found = chaos.drawn(400, random.Random(7))
    assert found == chaos.drawn(400, random.Random(7))
    assert len(found) == 400
    for start in range(400 - chaos.ENGINE_KILLS_WITHIN):
        window = found[start : start + chaos.ENGINE_KILLS_WITHIN]
        assert sum(each in chaos.ENGINE_KILLS for each in window) <= chaos.ENGINE_KILLS_MAX
