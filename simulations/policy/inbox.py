"""What waits for the simulated leader: commands with who wants to know, reports, and evidence about peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from peer.errors import BitinglipError
from peer.state import command as asks
from peer.state.order import AttemptFinished, Report
from peer.state.snapshot import Linked, Rumoured
from peer.state.task import Idempotency, Task

_encode_json = msgspec.json.Encoder().encode
Answered = Callable[[Any, BitinglipError | None], None]


class Pending:
    __slots__ = ("answer", "answered", "command", "error", "size", "stored")

    def __init__(self, command: asks.Command, answered: Answered) -> None:
        self.command = command
        self.answered = answered
        self.size = len(_encode_json(command.parameters)) if isinstance(command, asks.SubmitTask) else 0
        self.answer: Any = None
        self.error: BitinglipError | None = None
        self.stored: Task | Idempotency | None = None


Item = Pending | Report | Linked | Rumoured


def size_of(item: Item) -> int:
    if isinstance(item, Pending):
        return item.size
    return item.nbytes if isinstance(item, AttemptFinished) else 0
