"""Measured history: counts that are exact over minutes, hours, restarts and gaps; and what is forgotten."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from peer.decide import meter, retain
from peer.decide.decision import Decision
from peer.state.event import Event
from peer.state.metric import Bucket
from peer.state.plan import Plan
from peer.state.record import decode
from peer.state.snapshot import Save, Snapshot
from peer.state.task import Status, Task
from peer.state.worker import Telemetry
from tests.decide.build import GIB, POLICY, T0, World, replica, snapshot, worker_report

HOUR0 = T0 // 3600 * 3600


def done(at: float, status: Status = Status.COMPLETED, **fields: object) -> Task:
    return Task(
        **{
            "task_id": f"t{at}",
            "task_type": "x",
            "model_name": "m",
            "priority": 5,
            "timeout_s": 1.0,
            "created_at": at - 3,
            "deadline": at,
            "worker_id": "w1",
            "started_at": at - 2,
            "completed_at": at,
            "status": status,
            **fields,
        }  # type: ignore[arg-type]
    )


def end(world: World, *tasks: Task) -> None:
    world.take(meter.ended(world.s, world.now, [(task, 10) for task in tasks]))


def tick(world: World) -> None:
    world.take(meter.sample_gauges(world.s, world.now))
    world.take(meter.roll_up(world.s, world.now))


def restarted(world: World) -> World:
    """Another process over what was durable."""
    again = World(snapshot(), world.now)
    again.disk = world.disk
    for key in sorted(world.disk):
        if key.startswith("metric/"):
            again.s.load(decode(Bucket, world.disk[key]))
    return again


def test_what_counts() -> None:
    world = World()
    end(world, done(T0, Status.CANCELLED))
    assert world.batch.writes == {}
    end(world, done(T0), done(T0, Status.FAILED), done(T0, started_at=None, worker_id=None))
    (bucket,) = world.s.history.span("1s", int(T0), int(T0) + 1)
    assert (bucket.total.completed, bucket.total.failed) == (2, 1)
    assert (bucket.total.response_s, bucket.total.run_s, bucket.total.tokens) == (6.0, 2.0, 30)
    assert bucket.workers["w1"].completed == 1
    shown = meter.metrics(world.s, "1h", T0)
    assert (shown.total_tasks, shown.average_response_s, shown.peak_tasks_per_minute) == (3, 3.0, 3)
    assert shown.success_rate_percent == 100 * 2 / 3
    of_worker = meter.worker_metrics(world.s, "w1", T0)
    assert (of_worker.completed_today, of_worker.error_rate, of_worker.tokens_per_s) == (1, 0.5, 10.0)


def test_nothing_measured_is_nothing_shown() -> None:
    shown = meter.metrics(snapshot(), "30d", T0)
    assert (shown.total_tasks, shown.success_rate_percent, shown.average_response_s) == (0, None, None)
    assert meter.worker_metrics(snapshot(), "w1", T0).tokens_per_s is None


def test_gauges_are_of_workers_that_report() -> None:
    world = World()
    tick(world)
    assert world.s.history.get("1s", int(T0)).memory.samples == 0  # type: ignore[union-attr]
    world.worker("w1", replica("small"))
    world.worker("w2", telemetry=Telemetry(memory_total_bytes=8 * GIB, memory_used_bytes=4 * GIB))
    world.later(1)
    tick(world)
    bucket = world.s.history.get("1s", int(world.now))
    assert bucket is not None
    assert (bucket.utilization.sum, bucket.memory.sum, bucket.useful_memory.sum) == (50.0, 50.0, 50.0)
    world.later(6.1).hear(worker_report("w1", replica("small")))
    world.wake()
    tick(world)  # w2 is silent: what it said last is no measurement
    bucket = world.s.history.get("1s", int(world.now))
    assert bucket is not None
    assert (bucket.memory.sum, bucket.useful_memory.sum) == (50.0, 100.0)
    assert bucket.memory.samples == 1


def test_gauges_of_the_last_hour_survive_a_restart_with_their_minutes() -> None:
    world = World()
    for _ in range(180):
        world.hear(worker_report("w1", replica("small")))
        tick(world)
        world.later(1)
    tick(world)
    assert meter.metrics(world.s, "1h", world.now).utilization.samples == 181
    shown = meter.metrics(restarted(world).s, "1h", world.now)
    assert (shown.utilization.samples, shown.utilization.maximum) == (180, 50.0)


@given(st.lists(st.tuples(st.integers(1, 5_000), st.booleans(), st.booleans()), min_size=1, max_size=25))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_counts_are_exact_across_boundaries_restarts_and_gaps(steps: list[tuple[int, bool, bool]]) -> None:
    world, ends = World(snapshot(), HOUR0 + 3_590.0), list[float]()
    for pause_s, restarts, ticks in steps:
        world.later(pause_s)
        if restarts:
            world = restarted(world)
        if ticks:
            tick(world)
        end(world, done(world.now))
        ends.append(world.now)
    tick(world)
    for timeframe, span_s, slack_s in (("1h", 3_600, 0), ("24h", 86_400, 60), ("7d", 7 * 86_400, 3_600)):
        start = int(world.now) - span_s
        start += -start % max(1, slack_s)  # a bucket that began before is no part of it
        wanted = sum(at >= start for at in ends)
        for each in (world, restarted(world)):
            assert meter.metrics(each.s, timeframe, world.now).total_tasks == wanted, timeframe
    per_minute: dict[int, int] = {}
    for at in ends:
        if at >= world.now - 3_600:
            per_minute[int(at) // 60] = per_minute.get(int(at) // 60, 0) + 1
    assert meter.metrics(world.s, "1h", world.now).peak_tasks_per_minute == max(per_minute.values())


def test_a_month_in_rollups() -> None:
    world = World(snapshot(), HOUR0)
    for _ in range(32 * 24):
        end(world, done(world.now), done(world.now, Status.FAILED))
        tick(world)
        world.later(3_600)
    tick(world)
    for each in (world, restarted(world)):
        shown = {name: meter.metrics(each.s, name, world.now) for name in ("1h", "24h", "7d", "30d")}
        assert {n: m.total_tasks for n, m in shown.items()} == {"1h": 2, "24h": 48, "7d": 336, "30d": 1440}
        assert {m.peak_tasks_per_minute for m in shown.values()} == {2}
        assert {m.success_rate_percent for m in shown.values()} == {50.0}
    kept = {name: sum(key.startswith(f"metric/{name}/") for key in world.disk) for name in ("1s", "1m", "1h")}
    assert kept == {"1s": 1, "1m": 25, "1h": 744}
    assert {key for key in world.disk if key.startswith("metric/")} == {
        f"metric/{name}/{start:012d}" for name in ("1s", "1m", "1h") for start in world.s.history.starts(name)
        if name != "1s" or start < world.now
    }  # fmt: skip


# ---------------------------------------------------------------- retention


def test_tasks_too_old_or_too_many_are_due() -> None:
    s = snapshot(replace(POLICY, retention_count=3, retention_age_s=100.0))
    s.finished = 5
    oldest = [(T0 - 200, "a"), (T0 - 150, "b"), (T0 - 120, "c"), (T0 - 50, "d"), (T0, "e")]
    assert retain.due(s, T0, oldest) == ["a", "b", "c"]
    assert retain.due(s, T0 - 1_000, oldest) == ["a", "b"]
    s.finished = 3
    assert retain.due(s, T0 - 1_000, oldest) == []


def test_tasks_whose_prompts_and_results_take_too_much_room_are_due() -> None:
    """A store that is full takes no beat, so that nobody can lead, nor forget anything."""
    s = snapshot(replace(POLICY, retention_bytes=1_000))
    oldest = [(T0 - 3, "a"), (T0 - 2, "b"), (T0 - 1, "c")]
    s.finished, s.finished_bytes = 3, 1_000
    assert retain.due(s, T0, oldest, [400, 300, 300]) == []
    s.finished_bytes = 1_401
    assert retain.due(s, T0, oldest, [400, 501, 500]) == ["a", "b"]
    assert retain.due(s, T0, oldest) == ["a", "b", "c"]  # of unknown size


def test_a_forgotten_task_leaves_nothing() -> None:
    world = World()
    for idempotency_key in ("", "i"):
        task = world.submit(idempotency_key=idempotency_key)
        ended = changed(task, status=Status.FAILED, completed_at=T0, worker_id="w1")
        world.take(Decision(changes=[Save(ended)]))
        assert world.s.finished == 1
        world.take(retain.forget_tasks([ended]))
        assert [key for key in world.disk if not key.startswith("metric/")] == []
        assert world.s.finished == 0


def events(s: Snapshot, world: World, count: int) -> None:
    for _ in range(count):
        world.take(Decision(changes=[Save(Event(id=s.events_next, event="x", timestamp=T0, data={}))]))


def test_the_newest_events_are_kept() -> None:
    world = World(snapshot(replace(POLICY, events_kept=5)))
    events(world.s, world, 300)
    world.take(retain.forget_events(world.s))
    assert (world.s.events_from, world.s.events_next) == (201, 301)
    world.take(retain.forget_events(world.s))
    assert (world.s.events_from, len(world.disk)) == (296, 5)
    assert retain.forget_events(world.s).changes == []
    world.s.policy = replace(POLICY, events_kept=0)
    world.take(retain.forget_events(world.s))
    assert list(world.disk) == ["event/0000000000000300"]  # numbering goes on from it


def test_plans_are_kept_for_a_while() -> None:
    world = World()
    for n in range(60):
        world.take(Decision(changes=[Save(Plan(
            rebalance_id=str(n), strategy="load_balanced", dry_run=False, force=False,
            status="initiated" if n == 3 else "completed", created_at=T0 - n,
        ))]))  # fmt: skip
    world.take(retain.forget_plans(world.s))
    assert set(world.s.plans) == {str(n) for n in range(51)}
