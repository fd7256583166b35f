"""Readers of texts as they come: what each is given has no gap and no repeat, and in the end is what is recorded."""

from __future__ import annotations

from collections import Counter
from typing import Final

from peer.errors import BitinglipError, NotFound
from peer.state.command import StreamEnd, StreamItem, StreamRestart, TaskView
from simulations.world.calls import Broken, Door, NoAnswer
from simulations.world.kernel import World

READ_S_MAX: Final = 60.0


class StreamReaders:
    def __init__(self, world: World, door: Door) -> None:
        self.checks: Counter[str] = Counter()
        self.sometimes: Counter[str] = Counter()
        self._world = world
        self._door = door

    async def read(self, peer_id: str, task_id: str) -> TaskView | None:
        """To its end, which is given; None: it broke off."""
        reader = _Reader(self._world, task_id)
        try:
            await self._door.read_stream(peer_id, task_id, reader.take, READ_S_MAX)
        except NotFound:
            self._world.violated("stream_is_what_is_recorded", f"{task_id} is not known to {peer_id}")
        except (BitinglipError, NoAnswer, Broken):
            pass
        self.checks["stream_without_gap"] += reader.pieces
        if reader.pieces > 1:
            self.sometimes["stream_in_pieces"] += 1
        if reader.restarts:
            self.sometimes["stream_restarted"] += 1
        if reader.ended is None:
            self.sometimes["stream_broke_off"] += 1
            return None
        self.checks["stream_is_what_is_recorded"] += 1
        result = reader.ended.result
        if result is not None and (reader.text, reader.attempt) != (result.generated_text, result.attempt):
            text = f"{reader.text[-60:]!r} of {reader.attempt}, not {result.generated_text[-60:]!r}"
            self._world.violated("stream_is_what_is_recorded", f"{task_id}: {text} of {result.attempt}")
        return reader.ended


class _Reader:
    def __init__(self, world: World, task_id: str) -> None:
        self.text = ""
        self.attempt = 0
        self.pieces = 0
        self.restarts = 0
        self.ended: TaskView | None = None
        self._tokens = 0
        self._world = world
        self._task_id = task_id

    def take(self, item: StreamItem) -> float:
        if self.ended is not None:
            self._wrong(f"{type(item).__name__} after the end")
        if isinstance(item, StreamEnd):
            self.ended = item.view
        elif isinstance(item, StreamRestart):
            if item.attempt <= self.attempt:
                self._wrong(f"attempt {item.attempt} after {self.attempt}")
            self.attempt, self.text, self._tokens = item.attempt, "", 0
            self.restarts += 1
        else:
            if item.attempt != (self.attempt or item.attempt) or item.index != self._tokens:
                self._wrong(f"{item.attempt}/{item.index} after {self.attempt}/{self._tokens}")
            self.attempt = item.attempt
            self.text += item.text
            self._tokens += item.count
            self.pieces += 1
        return 0.0

    def _wrong(self, what: str) -> None:
        self._world.violated("stream_without_gap", f"{self._task_id}: {what}")
