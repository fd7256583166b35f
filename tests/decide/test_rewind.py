"""Times of a leader whose clock was ahead."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peer.decide import rewind
from peer.state.model import Draining
from peer.state.plan import Leaving, Move, Plan
from peer.state.task import Status, Task

NOW = 1_000.0


def a_task(created_at: float, assigned_at: float | None = None, started_at: float | None = None) -> Task:
    return Task(
        task_id="t1",
        task_type="text_generation",
        model_name="m",
        priority=5,
        timeout_s=60.0,
        created_at=created_at,
        deadline=created_at + 60.0,
        status=Status.QUEUED,
        assigned_at=assigned_at,
        started_at=started_at,
    )


def test_times_that_have_come_are_left_alone() -> None:
    record = a_task(900.0, 901.0, 902.0)
    assert rewind.task(record, NOW) is record


def test_a_task_of_the_future_begins_now_and_keeps_its_time_limit() -> None:
    moved = rewind.task(a_task(2_676.0), NOW)
    assert (moved.created_at, moved.deadline) == (NOW, NOW + 60.0)
    assert moved.assigned_at is None


@given(created=st.floats(0, 1e5), waited=st.floats(0, 1e3), began=st.floats(0, 1e3), now=st.floats(0, 1e5))
def test_distances_stay_and_nothing_lies_ahead(
    created: float, waited: float, began: float, now: float
) -> None:
    record = a_task(created, created + waited, created + waited + began)
    moved = rewind.task(record, now)
    assert moved.started_at is not None
    assert moved.assigned_at is not None
    assert moved.started_at <= max(now, 0.0) + 1e-6
    assert abs((moved.deadline - moved.created_at) - 60.0) < 1e-6
    assert abs((moved.started_at - moved.assigned_at) - began) < 1e-6


def test_a_move_of_the_future_begins_now() -> None:
    moves = (
        Move(type="model_load", model="a", started_at=900.0),
        Move(type="model_load", model="b", started_at=2_000.0),
        Move(type="model_load", model="c"),
    )
    ahead = Plan(
        rebalance_id="r", strategy="load_balanced", dry_run=False, force=False, status="initiated",
        created_at=2_000.0, moves=moves,
    )  # fmt: skip
    assert [move.started_at for move in rewind.plan(ahead, NOW).moves] == [900.0, NOW, None]
    settled = rewind.record(ahead, 2_000.0)
    assert settled is ahead


def test_what_an_owner_keeps_out_stays_out_no_longer_than_it_was_to() -> None:
    ahead = Draining(worker_id="w1", model_name="m", since=4_600.0, because="owner", until=5_200.0)
    moved = rewind.record(ahead, NOW)
    assert isinstance(moved, Draining)
    assert (moved.since, moved.until) == (NOW, NOW + 600.0)
    assert rewind.record(moved, NOW) is moved
    plain = Draining(worker_id="w1", model_name="m", since=4_600.0, because="room")
    assert rewind.draining(plain, NOW).until == 0.0


def test_other_records_are_taken_in_as_they_are() -> None:
    leaving = Leaving(peer_id="p1", since=4_600.0, by="o")
    assert rewind.record(leaving, NOW) is leaving
