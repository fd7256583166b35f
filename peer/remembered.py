"""The last answers that a peer has had from whoever led: for readers who take an old one where no leader is found."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import msgspec

from peer import limits
from peer.state.command import (
    GetMetrics,
    GetStatus,
    GetTask,
    GetWorker,
    ListAssignments,
    ListModels,
    ListTasks,
    ListWorkers,
    Query,
    Request,
    TaskView,
)

_RESULT_BYTES_MAX: Final = 16_384  # a task with a larger one is not kept

# What any reader may see; keys, plans and hosts are for the few who can wait for a leader.
_Kept = GetStatus | ListWorkers | GetWorker | ListModels | ListAssignments | GetMetrics | ListTasks | GetTask


class Remembered:
    """Answers by query, at most `answers_max`: the least lately given one goes first. `now` is monotonic."""

    def __init__(self, answers_max: int = limits.STALE_ANSWERS_MAX) -> None:
        self._max = answers_max
        self._answers: OrderedDict[Query, tuple[Any, float]] = OrderedDict()

    def keep(self, request: Request, answer: Any, now: float) -> None:
        if not isinstance(request, _Kept):
            return
        result = answer.result if isinstance(answer, TaskView) else None
        if result is not None and result.nbytes > _RESULT_BYTES_MAX:
            return
        query = _asked(request)
        self._answers[query] = answer, now
        self._answers.move_to_end(query)
        if len(self._answers) > self._max:
            self._answers.popitem(last=False)

    def find(self, query: Query, now: float) -> tuple[Any, float] | None:
        """The answer and its age in seconds."""
        found = self._answers.get(_asked(query))
        return None if found is None else (found[0], now - found[1])


def _asked(query: Query) -> Query:
    """However long somebody would have waited for the answer."""
    return msgspec.structs.replace(query, wait_s=0.0, past=None) if isinstance(query, GetTask) else query
