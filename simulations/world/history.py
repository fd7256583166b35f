"""What the clients saw, in one order: the operations that simulations.linear judges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import msgspec

from peer.errors import BitinglipError, Conflict, NotFound, Overloaded
from peer.state.command import TaskView
from peer.state.task import Task, shown
from simulations.linear import Kind, Operation, Outcome, Violation, check
from simulations.world.calls import NoAnswer

TICK_S: Final = 1e-9  # between two moments that virtual time does not tell apart
# A peer answers so if it is sure that nothing was done.
NOT_DONE: Final = frozenset({"no_leader", "not_leading", "link_broken", "stopping", "overloaded"})


def is_done_unknown(error: BitinglipError | NoAnswer) -> bool:
    """Whether what was asked for may have been done, or may be yet."""
    if isinstance(error, NoAnswer):
        return error.sent
    return error.status == 503 and error.code not in NOT_DONE and not isinstance(error, Overloaded)


def outcome_of(view: TaskView, *, replayed: bool = False) -> Outcome:
    result = None if view.result is None else msgspec.json.encode(view.result).decode()
    task = view.task
    return Outcome(shown(task.status), task.attempt, result, task_id=task.task_id, replayed=replayed)


class History:
    def __init__(self) -> None:
        self.operations: list[tuple[str, Operation]] = []  # and the task's id, "" where it is not known
        self._group: dict[str, str] = {}  # task id: its key, as linear's `task`
        self._last = 0.0

    def stamp(self, now: float) -> float:
        """`now`, after every earlier one: real order also within one moment of virtual time."""
        self._last = max(now, self._last + TICK_S)
        return self._last

    def submit(
        self, client: str, key: str, began: float, ended: float | None, outcome: Outcome | None
    ) -> None:
        """One without a key and without an answer is nobody's: what it may have made is another task."""
        if outcome is not None:
            self._group.setdefault(outcome.task_id, f"key {key}" if key else outcome.task_id)
        elif not key:
            return
        task_id = outcome.task_id if outcome is not None else ""
        group = f"key {key}" if key else task_id
        self.operations.append((task_id, Operation(client, group, "submit", key, began, ended, outcome)))

    def about(
        self,
        client: str,
        kind: Kind,
        task_id: str,
        began: float,
        ended: float | None,
        outcome: Outcome | None,
    ) -> None:
        self.operations.append((task_id, Operation(client, "", kind, task_id, began, ended, outcome)))

    def missing(self, client: str, task_id: str, began: float, ended: float) -> None:
        """404."""
        self.about(client, "get", task_id, began, ended, Outcome("missing"))

    def listed(self, client: str, task: Task, began: float, ended: float) -> None:
        outcome = Outcome(shown(task.status), task.attempt, task_id=task.task_id)
        self.about(client, "list", task.task_id, began, ended, outcome)

    def refused_cancel(
        self, client: str, task_id: str, began: float, ended: float, error: BitinglipError
    ) -> None:
        """Of a task that is finished, or that there is not."""
        if isinstance(error, NotFound):
            outcome = Outcome("missing")
        elif isinstance(error, Conflict):
            outcome = Outcome(str(error.details.get("status", "")), refused=True)
        else:
            return
        self.about(client, "cancel", task_id, began, ended, outcome)

    def known(self) -> list[Operation]:
        """Those about tasks whose submit was answered, in the groups that linear wants."""
        found: list[Operation] = []
        for task_id, operation in self.operations:
            group = operation.task or self._group.get(task_id, "")
            if group:
                found.append(replace(operation, task=group))
        return found

    def check(self) -> Violation | None:
        return check(self.known())


def retry_after(error: Any, most_s: float) -> float:
    """As long as the answer asks for; a second if it does not."""
    wanted = getattr(error, "retry_after_s", None)
    return min(most_s, wanted if wanted is not None else 1.0)
