"""What a child process writes, as lines of the peer's log. Bounded in length and rate.

Engines write records of their own (`engine.process.log`); programs of others have a `say` of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog
import trio

LINE_BYTES_MAX: Final = 2_000
LINES_PER_S_MAX: Final = 100

_LEVELS = {"debug": "debug", "warning": "warning", "error": "error"}


class Lines:
    """Bytes in, lines out; a line longer than the limit is cut, its rest dropped."""

    def __init__(self, bytes_max: int = LINE_BYTES_MAX) -> None:
        self._max = bytes_max
        self._buffer = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> list[str]:
        lines = []
        *whole, rest = data.split(b"\n")
        for part in whole:
            if not self._skipping:
                self._buffer += part
                lines.append(self._take())
            self._skipping = False
            self._buffer.clear()
        if not self._skipping:
            self._buffer += rest
            if len(self._buffer) > self._max:
                lines.append(self._take())
                self._skipping = True
        return [line for line in lines if line]

    def end(self) -> list[str]:
        """The last line, if it had no newline."""
        return [self._take()] if self._buffer and not self._skipping else []

    def _take(self) -> str:
        cut = len(self._buffer) > self._max
        text = bytes(self._buffer[: self._max]).decode("utf-8", "replace").rstrip()
        self._buffer.clear()
        return text + " [cut]" if cut else text


async def log_lines(
    descriptor: int,
    log: structlog.typing.FilteringBoundLogger,
    say: Callable[[str, structlog.typing.FilteringBoundLogger], None] | None = None,
    *,
    per_s_max: int = LINES_PER_S_MAX,
) -> None:
    """Read the pipe to its end; closes it. Lines beyond the rate are dropped and counted.

    `say` writes a line to the log; by default it is taken for an engine's.
    """
    say = say or _log_line
    lines = Lines()
    second, count, dropped = 0, 0, 0
    async with trio.lowlevel.FdStream(descriptor) as pipe:
        while True:
            data = await pipe.receive_some(64 * 1024)
            for line in lines.feed(bytes(data)) if data else lines.end():
                now = int(trio.current_time())
                if now != second:
                    if dropped:
                        log.warning("output_dropped", lines=dropped)
                    second, count, dropped = now, 0, 0
                count += 1
                if count <= per_s_max:
                    say(line, log)
                else:
                    dropped += 1
            if not data:
                return


def _log_line(line: str, log: structlog.typing.FilteringBoundLogger) -> None:
    """An engine's own records keep their fields; anything else is a line of text."""
    record: Any = None
    if line.startswith("{"):
        try:
            record = msgspec.json.decode(line)
        except msgspec.DecodeError:
            record = None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        log.warning("engine_output", line=line)
        return
    fields = {
        f"engine_{name}": value for name, value in record.items() if name not in ("event", "level", "t")
    }
    write = getattr(log, _LEVELS.get(str(record.get("level")), "info"))
    write("engine_log", engine_event=record["event"], **fields)
