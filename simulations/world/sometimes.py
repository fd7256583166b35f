"""What many runs together must have reached, beside every kind of fault: rare states in which mistakes would show."""

from __future__ import annotations

from typing import Final

STATES: Final = (
    # leadership
    "leader_elected",
    "two_believe_they_lead",
    "led_by_another_after_a_fault",
    # tasks, as the store saw them
    "queued->assigned",
    "queued->failed",
    "queued->cancelled",
    "assigned->queued",
    "assigned->completed",
    "assigned->failed",
    "assigned->cancelled",
    "failed:timeout",
    "given_a_third_time",
    # clients
    "submit_replayed",
    "submit_unknown",
    "cancel_unknown",
    "cancel_too_late",
    "client_vanished",
    "rebalance_accepted",
    "unload_accepted",
    "drain_accepted",
    "undrain_accepted",
    "transfer_accepted",
    "voters_grown",
    "lost_at_once",
    "a voter is lost for ever",
    # the world
    "net: reset",
    "net: a frame is retransmitted",
    "disk: fsync error",
    "disk: torn write",
    "disk: full",
    "gossip: agent died",
)
