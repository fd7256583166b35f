"""What a rehearsal says: waiting, gaps and losses, without the events and with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from peer.state.task import Status, Task
from peer.units import format_seconds
from simulations.rehearsal.cluster import Rehearsed
from simulations.rehearsal.plan import Plan

AFTER_EVENT_S = 900.0  # what was submitted so soon after the first event is looked at by itself
_CURVE_STEPS = 240


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds; None where there is nothing to measure."""

    submitted: int
    completed: int
    failed: int  # and timed out
    refused: int
    requeued: int
    wait_s: (
        tuple[float, float, float] | None
    )  # p50, p95, p99: from acceptance to the start of the attempt that counted
    wait_after_s: tuple[float, float, float] | None  # of those submitted soon after the first event
    answer_s: tuple[float, float, float] | None  # from acceptance to the result
    noticed_s: float | None  # from the first event to the first task queued again
    running_again_s: float | None  # and to the last one of these having begun again
    gap_s: float | None  # of which no leader: nothing is accepted or assigned
    utilisation: float  # 0 to 1, of all devices' time


def figures(plan: Plan, ran: Rehearsed, *, with_events: bool) -> Figures:
    first = min((event.at_s for event in plan.events), default=None)
    event_at = None if first is None else ran.start_wall + first - plan.from_s
    done = [task for task in ran.tasks if task.status is Status.COMPLETED]
    after = [
        task
        for task in done
        if event_at is not None and event_at <= task.created_at < event_at + AFTER_EVENT_S
    ]
    requeued = [event for event in ran.events if event.event == "task_requeued"]
    lost = {str(event.data["task_id"]) for event in requeued}
    noticed = min((event.timestamp for event in requeued), default=None)
    again = [task.started_at for task in ran.tasks if task.task_id in lost and task.started_at is not None]
    struck = with_events and event_at is not None
    return Figures(
        submitted=len(ran.tasks),
        completed=len(done),
        failed=sum(task.status is Status.FAILED for task in ran.tasks),
        refused=ran.unanswered,
        requeued=len(requeued),
        wait_s=percentiles(map(_wait_s, done)),
        wait_after_s=percentiles(map(_wait_s, after)),
        answer_s=percentiles((task.completed_at or 0.0) - task.created_at for task in done),
        noticed_s=noticed - event_at if struck and noticed is not None and event_at is not None else None,
        running_again_s=max(again) - event_at if struck and again and event_at is not None else None,
        gap_s=_gap_s(plan) if with_events else None,
        utilisation=ran.busy_s / ran.device_s if ran.device_s else 0.0,
    )


def percentiles(values: Iterable[float]) -> tuple[float, float, float] | None:
    """The nearest ranks: each is a value that was measured."""
    line = sorted(values)
    if not line:
        return None

    def rank(percent: float) -> float:
        return line[max(0, math.ceil(percent / 100 * len(line)) - 1)]

    return rank(50), rank(95), rank(99)


def table(before: Figures, after: Figures) -> Iterator[tuple[str, str, str]]:
    """(what, without the events, with them)"""
    soon = f"submitted within {format_seconds(AFTER_EVENT_S)} of the first event"
    yield "tasks submitted", f"{before.submitted:,}", f"{after.submitted:,}"
    yield "tasks completed", f"{before.completed:,}", f"{after.completed:,}"
    yield "tasks failed or timed out", f"{before.failed:,}", f"{after.failed:,}"
    yield "submissions given up", f"{before.refused:,}", f"{after.refused:,}"
    yield "tasks queued again", f"{before.requeued:,}", f"{after.requeued:,}"
    for name, a, b in (
        ("queue wait", before.wait_s, after.wait_s),
        (f"queue wait, {soon}", before.wait_after_s, after.wait_after_s),
        ("until the result", before.answer_s, after.answer_s),
    ):
        for i, percent in enumerate(("p50", "p95", "p99")):
            yield f"{name}, {percent}", _seconds(a and a[i]), _seconds(b and b[i])
    yield "no leader for", _seconds(before.gap_s), _seconds(after.gap_s)
    yield "lost tasks noticed after", _seconds(before.noticed_s), _seconds(after.noticed_s)
    yield "the last of them running after", _seconds(before.running_again_s), _seconds(after.running_again_s)
    yield "devices busy", f"{before.utilisation:.1%}", f"{after.utilisation:.1%}"


def waiting(plan: Plan, ran: Rehearsed) -> list[tuple[float, float]]:
    """How many tasks waited, over the plan's time."""
    step = (plan.until_s - plan.from_s) / _CURVE_STEPS
    changes = [0] * (_CURVE_STEPS + 2)
    for task in ran.tasks:
        until = task.started_at if task.started_at is not None else task.completed_at
        changes[_step(task.created_at - ran.start_wall, step)] += 1
        if until is not None:
            changes[_step(until - ran.start_wall, step)] -= 1
    return [(i * step, float(count)) for i, count in enumerate(accumulate(changes[: _CURVE_STEPS + 1]))]


def longest_waits(plan: Plan, ran: Rehearsed) -> list[tuple[float, float]]:
    """The longest queue wait of those that were submitted at each time."""
    step = (plan.until_s - plan.from_s) / _CURVE_STEPS
    found = [0.0] * (_CURVE_STEPS + 1)
    for task in ran.tasks:
        if task.started_at is not None:
            i = min(_CURVE_STEPS, _step(task.created_at - ran.start_wall, step))
            found[i] = max(found[i], _wait_s(task))
    return [(i * step, value) for i, value in enumerate(found)]


def assumptions(plan: Plan) -> Sequence[str]:
    used = sorted({(host.device, placement.model) for host in plan.hosts for placement in plan.placement})
    lines = []
    for key in used:
        speed = plan.speeds[key]
        rates = ", ".join(f"{rate:g} at {runs}" for runs, rate in speed.tokens_per_s)
        lines.append(f"{key[1]} on {key[0]}: {rates} at once (tokens/s in all), loaded in {speed.load_s:g} s")
    lines.append(f"a lost leader is replaced within {format_seconds(plan.failover_s)}")
    return lines


def _step(at_s: float, step: float) -> int:
    return min(_CURVE_STEPS + 1, max(0, math.ceil(at_s / step)))


def _wait_s(task: Task) -> float:
    """Of a task that an event threw back too: until the attempt that counted began."""
    return max(0.0, (task.started_at or task.created_at) - task.created_at)


def _gap_s(plan: Plan) -> float | None:
    struck = any(plan.leader in event.hosts for event in plan.events)
    return plan.failover_s if struck else 0.0


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"
