"""Measured history: what goes into its buckets, how seconds roll up into minutes and hours, and what is read back.

A batch that ends tasks saves the second's bucket in the same transaction, so counts are exact across a crash. Gauges
are sampled each second into memory and saved when their minute closes; a crash loses at most a minute of those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from msgspec.structs import replace as changed

from peer.decide.decision import Decision
from peer.limits import METRIC_HOURS_KEPT, METRIC_MINUTES_KEPT, METRIC_SECONDS_KEPT
from peer.state.history import History
from peer.state.metric import (
    RESOLUTIONS,
    TIMEFRAMES,
    Bucket,
    Counts,
    Metrics,
    WorkerMetrics,
    add_counts,
    add_gauges,
    merge,
    sample,
)
from peer.state.model import HOLDS_MEMORY
from peer.state.snapshot import Drop, Save, Snapshot
from peer.state.task import Status, Task

_KEPT: Mapping[str, int] = MappingProxyType(
    {"1s": METRIC_SECONDS_KEPT + 120, "1m": METRIC_MINUTES_KEPT * 60, "1h": METRIC_HOURS_KEPT * 3600}
)
_FINER: Mapping[str, str] = MappingProxyType({"1m": "1s", "1h": "1m"})
_DAY_S = 86_400


def ended(snapshot: Snapshot, now: float, tasks: Iterable[tuple[Task, int]]) -> Decision:
    """Count tasks that ended, each with its generated tokens, in the second's bucket. Cancelled ones do not count."""
    bucket = _open_bucket(snapshot, now)
    workers = dict(bucket.workers)
    total = bucket.total
    for task, tokens in tasks:
        if task.status is Status.CANCELLED:
            continue
        end = task.completed_at or now
        done = task.status is Status.COMPLETED
        counts = Counts(
            completed=int(done),
            failed=int(not done),
            response_s=end - task.created_at if done else 0.0,
            run_s=end - task.started_at if done and task.started_at is not None else 0.0,
            tokens=tokens,
        )
        total = add_counts(total, counts)
        if task.worker_id is not None:
            workers[task.worker_id] = add_counts(workers.get(task.worker_id, Counts()), counts)
    if total == bucket.total:
        return Decision()
    return Decision(changes=[Save(changed(bucket, total=total, workers=workers))])


def sample_gauges(snapshot: Snapshot, now: float) -> Decision:
    """One sample of utilisation and memory over all devices that report; once a second."""
    utilizations, used, total, ours = [], 0, 0, 0
    for worker_id, report in snapshot.reports.items():
        if worker_id not in snapshot.listened:
            continue
        telemetry = report.telemetry
        if telemetry.utilization_percent is not None:
            utilizations.append(telemetry.utilization_percent)
        used += telemetry.memory_used_bytes
        total += telemetry.memory_total_bytes
        replicas = snapshot.replicas[worker_id].values()
        ours += sum(r.memory_bytes for r in replicas if r.state in HOLDS_MEMORY)
    bucket = _open_bucket(snapshot, now)
    if utilizations:
        gauge = sample(sum(utilizations) / len(utilizations))
        bucket = changed(bucket, utilization=add_gauges(bucket.utilization, gauge))
    if total:
        bucket = changed(bucket, memory=add_gauges(bucket.memory, sample(100 * used / total)))
    if used:
        useful = sample(min(100.0, 100 * ours / used))
        bucket = changed(bucket, useful_memory=add_gauges(bucket.useful_memory, useful))
    return Decision(changes=[Save(bucket, durable=False)])  # a gauge alone is not worth an fsync each second


def roll_up(snapshot: Snapshot, now: float) -> Decision:
    """Close every minute and hour that has passed, and drop what is older than is kept."""
    decision = Decision()
    closed: dict[str, list[Bucket]] = {"1s": [], "1m": [], "1h": []}
    for resolution, finer in _FINER.items():
        width = RESOLUTIONS[resolution]
        open_start = int(now) // width * width
        starts = set(_unclosed(snapshot.history, resolution, finer))
        starts |= {bucket.start // width * width for bucket in closed[finer]}
        for start in sorted(starts):
            if start >= open_start or snapshot.history.get(resolution, start) is not None:
                continue
            parts = snapshot.history.span(finer, start, start + width)
            parts += [b for b in closed[finer] if start <= b.start < start + width]
            bucket = merge(parts, resolution, start)
            closed[resolution].append(bucket)
            decision.changes.append(Save(bucket))
    if not decision.changes:
        return decision  # old buckets can wait for the next minute's transaction
    for resolution, kept_s in _KEPT.items():
        for start in list(snapshot.history.starts(resolution)):
            if start >= now - kept_s:
                break
            decision.changes.append(Drop(Bucket(resolution=resolution, start=start)))
    return decision


def _unclosed(history: History, resolution: str, finer: str) -> Iterator[int]:
    """Starts of the coarser spans that have finer buckets and may not be closed yet, the newest first.

    Spans are closed in order and all at once: what is before the last closed one is closed.
    """
    width = RESOLUTIONS[resolution]
    closed = next(history.newest(resolution), None)
    for start in history.newest(finer):
        if closed is not None and start < closed + width:
            return
        yield start // width * width


# ---------------------------------------------------------------- reading


def metrics(snapshot: Snapshot, timeframe: str, now: float) -> Metrics:
    """The cluster over a timeframe that ends now."""
    span_s, resolution = TIMEFRAMES[timeframe]
    start = int(now) - span_s
    buckets = _since(snapshot.history, resolution, start, now)
    whole = merge(buckets, resolution, start)
    # Seconds in which no task ended are on disk only as part of their minute.
    gauges = merge(_since(snapshot.history, "1m", start, now), "1m", start) if resolution == "1s" else whole
    total = whole.total
    ended_count = total.completed + total.failed
    return Metrics(
        timeframe=timeframe,
        total_tasks=ended_count,
        successful_tasks=total.completed,
        failed_tasks=total.failed,
        success_rate_percent=100 * total.completed / ended_count if ended_count else None,
        average_response_s=total.response_s / total.completed if total.completed else None,
        peak_tasks_per_minute=_peak_per_minute(snapshot.history, resolution, start, now),
        utilization=gauges.utilization,
        memory=gauges.memory,
        useful_memory=gauges.useful_memory,
    )


def worker_metrics(snapshot: Snapshot, worker_id: str, now: float) -> WorkerMetrics:
    """One worker: today (UTC) and the last hour."""
    midnight = int(now) // _DAY_S * _DAY_S
    today = _of_worker(_since(snapshot.history, "1m", midnight, now), worker_id)
    hour = _of_worker(_since(snapshot.history, "1s", int(now) - 3600, now), worker_id)
    today_ended, hour_ended = today.completed + today.failed, hour.completed + hour.failed
    return WorkerMetrics(
        completed_today=today.completed,
        average_run_s=today.run_s / today.completed if today.completed else None,
        success_rate_percent=100 * today.completed / today_ended if today_ended else None,
        tasks_last_hour=hour_ended,
        average_response_s=hour.response_s / hour.completed if hour.completed else None,
        error_rate=hour.failed / hour_ended if hour_ended else None,
        tokens_per_s=hour.tokens / hour.run_s if hour.run_s > 0 else None,
    )


def speeds(snapshot: Snapshot, now: float) -> dict[str, float]:
    """Tokens/s while running in the last hour, of every worker that ran anything."""
    total: dict[str, tuple[int, float]] = {}
    for bucket in _since(snapshot.history, "1s", int(now) - 3600, now):
        for worker_id, counts in bucket.workers.items():
            tokens, run_s = total.get(worker_id, (0, 0.0))
            total[worker_id] = (tokens + counts.tokens, run_s + counts.run_s)
    return {worker_id: tokens / run_s for worker_id, (tokens, run_s) in total.items() if run_s > 0}


def _of_worker(buckets: Iterable[Bucket], worker_id: str) -> Counts:
    total = Counts()
    for bucket in buckets:
        counts = bucket.workers.get(worker_id)
        if counts is not None:
            total = add_counts(total, counts)
    return total


def _since(history: History, resolution: str, start: int, now: float) -> list[Bucket]:
    """Closed buckets of this resolution, then finer ones for what has not been rolled up yet."""
    buckets = history.span(resolution, start, int(now) + 1)
    finer = _FINER.get(resolution)
    if finer is None:
        return buckets
    closed_until = buckets[-1].start + RESOLUTIONS[resolution] if buckets else start
    return buckets + _since(history, finer, closed_until, now)


def _peak_per_minute(history: History, resolution: str, start: int, now: float) -> int:
    """The busiest minute; the open one and, in an hour's view, the first counted from its seconds."""
    if resolution == "1s":
        minutes: dict[int, int] = {}
        for bucket in _since(history, "1s", start, now):
            minute = bucket.start // 60
            minutes[minute] = minutes.get(minute, 0) + bucket.total.completed + bucket.total.failed
        return max(minutes.values(), default=0)
    coarse = max((b.peak_ended_per_minute for b in _since(history, resolution, start, now)), default=0)
    return max(coarse, _peak_per_minute(history, "1s", int(now) // 60 * 60, now))


def _open_bucket(snapshot: Snapshot, now: float) -> Bucket:
    return snapshot.history.get("1s", int(now)) or Bucket(resolution="1s", start=int(now))
