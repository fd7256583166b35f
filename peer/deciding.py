"""What the leader asks `peer.decide`: for each command, report and tick, in which order, and with what entropy.

Nothing here waits or is durable: decisions go into a batch, which the leader commits and carries out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
import trio

from peer.decide import admit, keys, lose, meter, place, rebalance, record, recover, replan, retain, space
from peer.decide.batch import Batch
from peer.decide.decision import Decision
from peer.errors import BitinglipError
from peer.ports import Entropy
from peer.registrar import Registrar
from peer.state import command as asks
from peer.state.order import Report, WorkerReported
from peer.state.record import task_id
from peer.state.snapshot import Linked, Rumoured, Snapshot
from peer.state.task import Idempotency, Task

log = structlog.get_logger(__name__)

_ENTROPY_BYTES = 5
_encode_json = msgspec.json.Encoder().encode


class Pending:
    """A command on its way, and where its answer will be."""

    __slots__ = ("answer", "command", "done", "error", "size", "stored")

    def __init__(self, command: asks.Command) -> None:
        self.command = command
        self.size = len(_encode_json(command.parameters)) if isinstance(command, asks.SubmitTask) else 0
        self.done = trio.Event()
        self.answer: Any = None
        self.error: BitinglipError | None = None
        self.stored: Task | Idempotency | None = None  # read from the store before it is decided


@dataclass(frozen=True, slots=True)
class First:
    """The answer to a repeated idempotency key: the task that the first request made."""

    task_id: str


class Deciding:
    """Over one leadership's snapshot."""

    def __init__(self, snapshot: Snapshot, entropy: Entropy, registrar: Registrar) -> None:
        self._snapshot = snapshot
        self._entropy = entropy
        self._registrar = registrar
        self._sampled_at = 0

    def evidence(self, item: Linked | Rumoured, work: Batch) -> None:
        """About who is there."""
        work.take(Decision(changes=[item]))
        if isinstance(item, Linked) and item.dead:  # beyond doubt: its tasks wait for no tick
            work.take(lose.lose(self._snapshot, work.now))
            work.take(recover.lost_attempts(self._snapshot, work.now))

    def command(self, pending: Pending, work: Batch) -> None:
        if pending.error is not None:
            return
        try:
            decision = self._decide(pending, work)
        except BitinglipError as error:
            pending.error = error
        except Exception:
            # Decisions change nothing before they return, so a bug in one costs this command and no more.
            log.exception("command_failed", command=type(pending.command).__name__)
            pending.error = BitinglipError("an internal error; it has been logged")
        else:
            work.take(decision)
            pending.answer = decision.reply

    def _decide(self, pending: Pending, work: Batch) -> Decision:
        snapshot, now = self._snapshot, work.now
        match pending.command:
            case asks.SubmitTask() as command:
                return self._submit(command, pending, now)
            case asks.CancelTask() as command:
                stored = pending.stored if isinstance(pending.stored, Task) else None
                if command.task_id in work.ended:  # by this very batch
                    stored, _ = work.ended[command.task_id]
                return admit.cancel(snapshot, now, command, stored)
            case asks.AssignModel() as command:
                return place.assign(snapshot, now, command, f"assign-{self._entropy.token(_ENTROPY_BYTES)}")
            case asks.UnloadModel() as command:
                return place.unload(snapshot, now, command)
            case asks.RestartWorker() as command:
                return place.restart(snapshot, now, command)
            case asks.Rebalance() as command:
                rebalance_id = f"rebal-{self._entropy.token(_ENTROPY_BYTES)}"
                return rebalance.rebalance(snapshot, now, command, rebalance_id)
            case asks.DrainHost() as command:
                return replan.drain_host(snapshot, now, command)
            case asks.CreateKey() as command:
                return keys.create(snapshot, command)
            case asks.RevokeKey() as command:
                return keys.revoke(snapshot, now, command)
            case command:
                return self._registrar.decide(command, now)

    def _submit(self, command: asks.SubmitTask, pending: Pending, now: float) -> Decision:
        stored = pending.stored if isinstance(pending.stored, Idempotency) else None
        first = admit.first_of(self._snapshot, command, stored)
        if first is not None:
            return Decision(reply=First(first))
        new_id = task_id(now, self._entropy.token(_ENTROPY_BYTES))
        return admit.submit(self._snapshot, now, command, new_id, pending.size)

    def report(self, message: Report, work: Batch) -> None:
        try:
            decision = record.report(self._snapshot, work.now, message)
        except Exception:
            # Decisions change nothing before they return, so a bug in one costs this report and no more.
            log.exception("report_failed", report=type(message).__name__)
        else:
            work.take(decision)
            if isinstance(message, WorkerReported):  # a restart may be over before the next tick
                work.take(recover.announce(self._snapshot, work.now, [message.report.worker_id]))

    def tick(self, work: Batch) -> None:
        snapshot, now = self._snapshot, work.now
        work.take(lose.wake(snapshot, now))
        work.take(lose.lose(snapshot, now))
        work.take(recover.time_out(snapshot, now))
        work.take(recover.lost_attempts(snapshot, now))
        work.take(recover.hopeless(snapshot, now))
        work.take(place.reconcile(snapshot, now))
        work.take(rebalance.advance(snapshot, now))
        work.take(recover.announce(snapshot, now))
        work.take(retain.forget_plans(snapshot))
        work.take(space.tell_room(snapshot))
        work.take(self._registrar.tick(now))
        if int(now) != self._sampled_at:
            self._sampled_at = int(now)
            work.take(replan.replan(snapshot, now, f"rebal-{self._entropy.token(_ENTROPY_BYTES)}"))
            work.take(retain.forget_revoked(snapshot))
            work.take(meter.sample_gauges(snapshot, now))
            work.take(meter.roll_up(snapshot, now))
