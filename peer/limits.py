"""Every bound of the peer, in one place. Units are in the names. Owners change those that configs/ names."""

from __future__ import annotations

from typing import Final

# requests; those of a task's parameters stand with them in peer.state.task
BODY_BYTES_MAX: Final = 4 * 1024 * 1024
NAME_CHARS_MAX: Final = 128  # model names, owners, ids
IDEMPOTENCY_KEY_CHARS_MAX: Final = 256
WAIT_S_MAX: Final = 300.0  # long polls
PAGE_DEFAULT: Final = 50
PAGE_MAX: Final = 500
OFFSET_MAX: Final = 10_000_000
TASK_TIMEOUT_S_MAX: Final = 86_400
TASK_TIMEOUT_S_DEFAULT: Final = 300

# leader
RESULT_CHARS_MAX: Final = 1_000_000  # of one task: it goes in one frame and one transaction, whatever characters it has
COMMANDS_WAITING_MAX: Final = 4_096  # handed over by the API, not yet taken by the leader
BATCH_COMMANDS_MAX: Final = 256  # commands and reports in one group commit
QUEUE_TASKS_MAX: Final = 100_000  # live tasks; more are refused with 503
QUEUE_BYTES_MAX: Final = 256 * 1024 * 1024  # their parameters together
ATTEMPTS_MAX: Final = 3
TICK_S: Final = 0.25  # deadlines, reconciliation
COMMAND_S_MAX: Final = 30.0  # a command not answered by then gets 503
PRIORITY_STEP_S: Final = 600.0  # a priority step outweighs so much waiting: no task starves
KEPT_OUT_S: Final = 15.0  # a task that has waited for so long may send busy models away for its own
TURN_S: Final = 60.0  # and those that had so long; or TURN_LOADS times what its load takes, where that is more
TURN_LOADS: Final = 4.0
UNLOADED_S: Final = 600.0  # what an owner unloads by force is not loaded there again for tasks for so long
LOADS_FAILED_MAX: Final = 3
LOAD_RETRY_S: Final = (1.0, 5.0, 30.0)  # after a failed load
MOVES_MAX: Final = 16  # of one rebalance
WORKER_SILENT_S: Final = 6.0  # a worker without a report is offline
RELINK_S: Final = 1.0  # a peer whose session ended and did not come back by then is lost
STARVED_S: Final = 2.0  # a tick so late was the leader's own gap: no worker's silence is counted over it
LOSS_WINDOW_S: Final = 10.0  # no more than a share of the peers is lost within it without confirmation
LOSS_CONFIRM_S: Final = 20.0  # a silence so long confirms a loss, as gossip does
RETENTION_BATCH: Final = 200  # finished tasks forgotten per tick

# leadership
LEASE_TTL_S: Final = 5.0
BEAT_S: Final = 0.5  # the leader's fenced beats
GUARD_S: Final = 1.5  # a leader whose beat has not moved for so long, seen twice, may be deposed on evidence
LEASE_SURE_S: Final = 4.0  # an acknowledged keepalive begun no longer ago vouches, too; less than LEASE_TTL_S
READ_FRESH_S: Final = 1.0  # an acknowledged beat begun no longer ago vouches for reads; less than GUARD_S
STEP_DOWN_S: Final = 3.0  # without an acknowledged beat; less than LEASE_TTL_S
ASIDE_S: Final = 5.0  # so long a peer that has handed the leadership over leaves it to others; < HOLD_S_MAX
FAREWELL_S_MAX: Final = 0.2  # a leader that is none any more answers what it was asked
STORE_CALL_S_MAX: Final = 2.0  # one call of a store over the network
COMMIT_S_MAX: Final = 10.0  # a commit is tried again so long while it is not sent or its outcome unknown
COMMIT_PAUSE_S: Final = (0.05, 0.25)  # between two tries

# link
DIAL_S_MAX: Final = 1.0
PING_S: Final = 0.5
LINK_SILENT_S: Final = 3.0  # a connection that brings nothing for so long is broken
FRAME_BYTES_MAX: Final = 8 * 1024 * 1024
FRAMES_WAITING_MAX: Final = 1_024  # for one peer
CALLS_MAX: Final = 1_024  # forwarded by one peer and not yet answered, besides what its streams and WebSockets ask
HOLD_S_MAX: Final = 10.0  # a request waits so long for a leader
GOSSIP_POLL_S: Final = 0.5
LOAD_TELL_S: Final = 3.0  # at most so often gossip hears how busy a host is
TAGS_BYTES_MAX: Final = 512

# keys
KEYS_MAX: Final = 10_000
REQUESTS_PER_HOUR: Final = 1_000
REQUESTS_PER_MINUTE: Final = 100
WEBSOCKETS_PER_CLIENT: Final = 10
WEBSOCKETS_MAX: Final = 1_000
TICKET_S: Final = 30.0  # a ticket for a WebSocket stands for its key so long
COUNT_S_MAX: Final = 1.0  # a peer waits so long for the leader's count of a request, then takes its own
STALE_ANSWERS_MAX: Final = 256  # a peer's last answers to queries, for readers who take them when nobody leads

# streams and events
EVENTS_KEPT_MAX: Final = 10_000
EVENTS_BEHIND_MAX: Final = 1_000  # a WebSocket reader that is further behind is cut off
STREAM_IDLE_S_MAX: Final = 15.0  # a comment is sent after so long without a token
STREAMS_MAX: Final = 1_000
ASKED_MAX: Final = CALLS_MAX + WEBSOCKETS_MAX + STREAMS_MAX  # what one peer asks of the leader at a time
STREAM_KEPT_S: Final = 60.0  # text of a finished attempt stays for late readers
LOGPROBS_BYTES_MAX: Final = 1024 * 1024  # about, of a result's log probabilities; those of later tokens are dropped

# engine
ENGINE_OUTBOX_MAX: Final = 4_096  # frames waiting for the engine to read
ENGINE_START_S_MAX: Final = 120.0
ENGINE_STOP_S_MAX: Final = 3.0
CANCEL_S_MAX: Final = 0.8  # a cancelled run that still holds its slot then: the engine is killed
STALL_S: Final = {
    "start": 120.0,
    "idle": 15.0,
    "load": 120.0,
    "warmup": 300.0,
    "prefill": 60.0,
    "decode": 30.0,
}
RESTART_BACKOFF_S: Final = (0.2, 1.0, 5.0, 15.0)
DEATHS_MAX: Final = 3  # within DEATHS_WINDOW_S: quarantine
DEATHS_WINDOW_S: Final = 600.0
QUARANTINE_S: Final = 600.0
REPORT_INTERVAL_S: Final = 1.0

# shutdown
DRAIN_S_MAX: Final = 30.0

# metrics kept: seconds for an hour, minutes for a day and a bit, hours for 31 days
METRIC_SECONDS_KEPT: Final = 3_600
METRIC_MINUTES_KEPT: Final = 1_500
METRIC_HOURS_KEPT: Final = 24 * 31
