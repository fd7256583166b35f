"""What clients asked and were answered, kept until it has been checked.

Threads share it. A call that was not answered, or answered with 503, is one of unknown outcome: it may have taken
effect, and may still.
"""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from simulations.linear import Operation, Outcome

FINISHED: Final = frozenset({"completed", "failed", "cancelled"})
Kind = Literal["submit", "get", "cancel"]


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` 0: none came. `ended_at` is then when the client gave up."""

    status: int
    body: dict[str, Any]
    began_at: float
    ended_at: float
    replayed: bool = False


@dataclass(slots=True)
class Told:
    """All that was said of one task."""

    key: str
    prompt: str
    operations: list[Operation] = field(default_factory=list)
    task_id: str = ""  # once it is acknowledged
    final: dict[str, Any] | None = None  # as it was first read when it had ended
    final_at: float = 0.0
    cancelled_at: float = 0.0  # a cancel was acknowledged
    closed: bool = False


class History:
    """Of one cluster. `broken` has what no order of events could explain."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.acknowledged_at: list[float] = []  # of submissions, monotonic seconds
        self.broken: list[str] = []
        self.open: dict[str, Told] = {}  # by key: not yet checked to the end
        self.closed: dict[str, Told] = {}  # by key: checked, and without their operations

    def begin(self, key: str, prompt: str) -> None:
        with self.lock:
            self.open[key] = Told(key, prompt)

    def submitted(self, client: str, key: str, answer: Answer) -> str:
        """The task's id if it is acknowledged, else ""."""
        with self.lock:
            told = self.open[key]
            if answer.status != 201:
                self._unexpected("submit", key, answer, {0, 503})
                self._note(told, client, "submit", answer, None)
                return ""
            task_id = str(answer.body["task_id"])
            if told.task_id not in ("", task_id):
                self.broken.append(f"one key, {key}, made {told.task_id} and {task_id}")
            told.task_id = task_id
            self.acknowledged_at.append(answer.ended_at)
            self._read(told, answer)
            outcome = _seen(answer.body, replayed=answer.replayed)
            self._note(told, client, "submit", answer, outcome)
            return task_id

    def read(self, client: str, key: str, answer: Answer) -> None:
        with self.lock:
            told = self._of(key)
            if told is None:
                return
            if answer.status == 200:
                self._read(told, answer)
                self._note(told, client, "get", answer, _seen(answer.body))
            elif answer.status == 404:
                self._note(told, client, "get", answer, Outcome("missing"))
                self.broken.append(
                    f"{told.task_id} was acknowledged, and {client} is told that there is no such task"
                )
            else:
                self._unexpected("get", key, answer, {0, 503})

    def cancelled(self, client: str, key: str, answer: Answer) -> None:
        """An acknowledged cancel does not tell the attempt: linear.py takes it as one that may have taken effect."""
        with self.lock:
            told = self._of(key)
            if told is None:
                return
            if answer.status == 200:
                told.cancelled_at = answer.ended_at
                if answer.body["status"] != "cancelled":
                    self.broken.append(
                        f"{told.task_id}: cancelled, and its status is {answer.body['status']}"
                    )
            elif answer.status != 409:
                self._unexpected("cancel", key, answer, {0, 503})
            self._note(told, client, "cancel", answer, None)

    def waiting(self) -> list[Told]:
        """Those that are acknowledged and were not seen to have ended."""
        with self.lock:
            return [told for told in self.open.values() if told.task_id and told.final is None]

    def acknowledged(self) -> list[Told]:
        with self.lock:
            return [told for told in (*self.open.values(), *self.closed.values()) if told.task_id]

    def ended(self) -> list[Told]:
        """Those that were seen to have ended, to be checked and closed."""
        with self.lock:
            return [told for told in self.open.values() if told.final is not None]

    def close(self, told: Told) -> None:
        """It is checked: from now on it must stay as it is."""
        with self.lock:
            told.closed = True
            told.operations.clear()
            self.closed[told.key] = self.open.pop(told.key)

    def gap_s(self, since: float, until: float) -> float:
        """The longest time in between without an acknowledged submission."""
        with self.lock:
            inside = [at for at in self.acknowledged_at if since <= at <= until]
        moments = [since, *inside, until]
        return max(after - before for before, after in itertools.pairwise(moments))

    # ---------------------------------------------------------------- under the lock

    def _of(self, key: str) -> Told | None:
        return self.open.get(key) or self.closed.get(key)

    def _read(self, told: Told, answer: Answer) -> None:
        """Compare a task as it was answered with what is known of it."""
        view, task_id = answer.body, told.task_id
        status = view["status"]
        if told.cancelled_at and answer.began_at > told.cancelled_at and status != "cancelled":
            self.broken.append(f"{task_id} was cancelled and is {status}")
        if status in FINISHED:
            if told.final is None:
                told.final, told.final_at = view, answer.ended_at
            elif told.final != view:
                self.broken.append(f"{task_id} has changed: {told.final} -> {view}")
        elif told.final is not None and answer.began_at > told.final_at:
            self.broken.append(f"{task_id} had ended as {told.final['status']} and is {status}")

    def _note(self, told: Told, client: str, kind: Kind, answer: Answer, outcome: Outcome | None) -> None:
        if told.closed:
            return
        returned = None if outcome is None else answer.ended_at
        argument = told.key if kind == "submit" else told.task_id
        told.operations.append(
            Operation(client, told.key, kind, argument, answer.began_at, returned, outcome)
        )

    def _unexpected(self, what: str, key: str, answer: Answer, expected: set[int]) -> None:
        if answer.status not in expected:
            self.broken.append(f"{what} {key}: answered {answer.status}: {answer.body}")


def _seen(view: dict[str, Any], *, replayed: bool = False) -> Outcome:
    result = None if view["result"] is None else json.dumps(view["result"], sort_keys=True)
    return Outcome(view["status"], view["attempt"], result, task_id=view["task_id"], replayed=replayed)
