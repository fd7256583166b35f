"""Measured history: buckets of one second, one minute, one hour, and what is read from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from peer.state.base import Record

RESOLUTIONS: Mapping[str, int] = MappingProxyType({"1s": 1, "1m": 60, "1h": 3600})
TIMEFRAMES: Mapping[str, tuple[int, str]] = MappingProxyType(
    {  # name: (seconds, resolution that holds all of it)
        "1h": (3_600, "1s"),
        "24h": (86_400, "1m"),
        "7d": (7 * 86_400, "1h"),
        "30d": (30 * 86_400, "1h"),
    }
)


class Counts(Record, frozen=True):
    """What ended in a bucket. `response_s` is submission to end, `run_s` start to end, both summed."""

    completed: int = 0
    failed: int = 0
    response_s: float = 0.0
    run_s: float = 0.0
    tokens: int = 0


class Gauge(Record, frozen=True):
    """Samples of a percentage."""

    samples: int = 0
    sum: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0


class Bucket(Record, frozen=True):
    """One span of history. `peak_ended_per_minute` is the highest minute in it (a 1 s bucket has none)."""

    resolution: str
    start: int  # seconds since 1970, a multiple of the resolution
    total: Counts = Counts()
    workers: dict[str, Counts] = {}
    utilization: Gauge = Gauge()
    memory: Gauge = Gauge()  # percent of device memory in use
    useful_memory: Gauge = Gauge()  # percent of the used memory that loaded models hold
    peak_ended_per_minute: int = 0


def add_counts(a: Counts, b: Counts) -> Counts:
    return Counts(
        completed=a.completed + b.completed,
        failed=a.failed + b.failed,
        response_s=a.response_s + b.response_s,
        run_s=a.run_s + b.run_s,
        tokens=a.tokens + b.tokens,
    )


def add_gauges(a: Gauge, b: Gauge) -> Gauge:
    if not a.samples or not b.samples:
        return a if a.samples else b
    return Gauge(
        samples=a.samples + b.samples,
        sum=a.sum + b.sum,
        minimum=min(a.minimum, b.minimum),
        maximum=max(a.maximum, b.maximum),
    )


def sample(value: float) -> Gauge:
    return Gauge(samples=1, sum=value, minimum=value, maximum=value)


def merge(buckets: Iterable[Bucket], resolution: str, start: int) -> Bucket:
    """One coarser bucket out of finer ones."""
    total, utilization, memory, useful = Counts(), Gauge(), Gauge(), Gauge()
    workers: dict[str, Counts] = {}
    peak, ended = 0, 0
    for bucket in buckets:
        total = add_counts(total, bucket.total)
        utilization = add_gauges(utilization, bucket.utilization)
        memory = add_gauges(memory, bucket.memory)
        useful = add_gauges(useful, bucket.useful_memory)
        for worker_id, counts in bucket.workers.items():
            workers[worker_id] = add_counts(workers.get(worker_id, Counts()), counts)
        peak = max(peak, bucket.peak_ended_per_minute)
        ended += bucket.total.completed + bucket.total.failed
    if resolution == "1m":
        peak = ended
    return Bucket(
        resolution=resolution,
        start=start,
        total=total,
        workers=workers,
        utilization=utilization,
        memory=memory,
        useful_memory=useful,
        peak_ended_per_minute=peak,
    )


class WorkerMetrics(Record, frozen=True):
    """Of one worker, measured. None where nothing has ended in the span."""

    completed_today: int = 0
    average_run_s: float | None = None  # today
    success_rate_percent: float | None = None  # today
    tasks_last_hour: int = 0
    average_response_s: float | None = None  # last hour
    error_rate: float | None = None  # last hour, 0..1
    tokens_per_s: float | None = None  # last hour, while running


class Metrics(Record, frozen=True):
    """Of the cluster over a timeframe. None where nothing was measured."""

    timeframe: str
    total_tasks: int
    successful_tasks: int
    failed_tasks: int
    success_rate_percent: float | None
    average_response_s: float | None
    peak_tasks_per_minute: int
    utilization: Gauge
    memory: Gauge
    useful_memory: Gauge
