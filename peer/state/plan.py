"""A rebalance: its moves, what each is predicted to cost, and how far it has come."""

from __future__ import annotations

from typing import Literal

from peer.state.base import Record

Strategy = Literal["memory_optimized", "load_balanced", "latency_optimized"]


class Move(Record, frozen=True):
    """One step. A migration loads on `to_worker` before it unloads from `from_worker`."""

    type: Literal["model_migration", "model_load", "model_unload"]
    model: str
    from_worker: str | None = None
    to_worker: str | None = None
    memory_bytes: int = 0
    predicted_s: float = 0.0
    tasks_touched: int = 0
    reason: str = ""
    state: Literal["planned", "loading", "draining", "done", "failed"] = "planned"
    started_at: float | None = None
    actual_s: float | None = None


class Leaving(Record, frozen=True):
    """A host that is to hold nothing: no model is loaded there, and what is there moves away."""

    peer_id: str
    since: float
    by: str = ""


class Plan(Record, frozen=True):
    rebalance_id: str
    strategy: str
    dry_run: bool
    force: bool
    status: Literal["planned", "initiated", "completed", "failed"]
    created_at: float
    moves: tuple[Move, ...] = ()
    reasons: tuple[str, ...] = ()
    finished_at: float | None = None
