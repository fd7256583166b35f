"""*Sometimes* assertions: what must have happened now and then over many runs, or the runs prove little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from peer.state.task import TRANSITIONS

FAULTS = (
    "engine_death", "engine_hang", "load_failure", "run_error", "foreign_memory", "peer_crash", "peer_freeze",
    "leader_crash", "commit_fails", "commit_ambiguous", "crash_after_commit", "report_lost", "report_late",
    "report_duplicated", "order_lost", "order_late", "slow_store", "burst", "clock_step", "worker_flap",
    "stuck_cancel", "memory_surprise", "session_drop", "wrong_gossip", "leader_stall", "sessions_drop",
)  # fmt: skip
STATES = (
    "ambiguous commit was done", "ambiguous commit was not done", "late result refused", "late start refused",
    "idempotent replay of a live task", "idempotent replay of a finished task", "idempotency mismatch",
    "queue full", "leader behind", "cancel of a queued task", "cancel of a held task",
    "cancel of a finished task", "attempts exhausted", "timeout while queued", "timeout while held",
    "model unavailable", "eviction for room", "busy model gave way", "load did not fit the device", "quarantine",
    "forced unload", "drain waited for a task", "rebalance began", "rebalance completed", "rebalance failed",
    "rebalance lived through a new leader", "task re-queued without strike",
    "outcome reported again", "leader slept", "owner's unload happened", "retention forgot tasks",
    "retention forgot events", "unload lived through a new leader", "load retried after a failure", "does not fit",
    "device sizes differ", "peer lost by its session", "peer lost by its silence", "loss put off by the share",
    "loss confirmed by gossip", "lost peer came back", "host drained", "host's drain undone",
    "host's drain lived through a new leader", "plan to empty a host", "plan of the leader's own",
    "drained host ended empty", "no other host to drain to",
)  # fmt: skip


def transition_name(before: str, after: str) -> str:
    return f"{before} -> {after}"


TRANSITION_NAMES = tuple(
    transition_name(before.value, after.value) for before, of in TRANSITIONS.items() for after in of.values()
)


class Sometimes:
    """Counts by name; names that are not declared are a simulator's error."""

    _KNOWN = frozenset(f"fault {name}" for name in FAULTS) | frozenset(STATES) | frozenset(TRANSITION_NAMES)

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def saw(self, name: str) -> None:
        if name not in self._KNOWN:
            raise KeyError(f"{name!r} is no declared sometimes-assertion")
        self.counts[name] += 1

    def fault(self, name: str) -> None:
        self.saw(f"fault {name}")

    @classmethod
    def never(cls, counts: Counter[str]) -> Iterable[str]:
        return [name for name in sorted(cls._KNOWN) if not counts[name]]
