"""Events of the journal that `/ws` sends; numbered without gaps by the leader."""

from __future__ import annotations

from typing import Any

from peer.state.base import Record

EVENT_NAMES = (
    "worker_status_changed",
    "task_completed",
    "task_failed",
    "cluster_rebalance_started",
    "model_loaded",
    "gpu_alert",
    # beyond the documented ones
    "task_cancelled",
    "task_requeued",
    "model_unloaded",
    "model_load_failed",
    "cluster_rebalance_finished",
    "store_alert",
)


class Event(Record, frozen=True):
    """`data` holds plain values; seconds and bytes as numbers: the API formats them."""

    id: int
    event: str
    timestamp: float
    data: dict[str, Any]


class EventDraft(Record, frozen=True):
    """An event before the leader numbers it."""

    event: str
    data: dict[str, Any]
