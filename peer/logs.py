"""The peer's log: structlog, JSON where a machine reads it, columns on a terminal.

In the journal each line has its level as priority (`journalctl -p warning`), given as sd-daemon(3) says.

Fields bound with `structlog.contextvars.bind_contextvars` (request_id) are in every line of that task. Secrets
are never passed to a logger; fields with telling names are blanked nevertheless, prompts and results too.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import IO, Any, Final, Literal

import structlog

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
VALUE_CHARS_MAX: Final = 4_000
_BLANKED = frozenset(
    {
        "authorization",
        "generated_text",
        "key_secret",
        "messages",
        "parameters",
        "password",
        "prompt",
        "secret",
        "text",
        "token",
    }
)

_PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (0, 7),
)

_level = logging.INFO


def setup(
    level: Literal["debug", "info", "warning", "error"] = "info",
    format: Literal["auto", "json", "console"] = "auto",
    stream: IO[str] | None = None,
) -> None:
    """Send every log line, the standard library's included, to `stream` (stderr)."""
    out = stream or sys.stderr
    as_json = format == "json" or (format == "auto" and not out.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _blank,
    ]
    renderer: structlog.typing.Processor
    if as_json:
        renderer = structlog.processors.JSONRenderer(sort_keys=False, default=str)
        shared.append(structlog.processors.format_exc_info)
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=out.isatty(), sort_keys=False)
    structlog.configure(
        processors=[_below_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),  # the level is ours to change
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    formatter = _JournalFormatter if _is_journal(out) else structlog.stdlib.ProcessorFormatter
    handler.setFormatter(
        formatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for name in ("httpx", "httpcore", "hypercorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    set_level(level)


def set_level(level: Literal["debug", "info", "warning", "error"]) -> None:
    """From now on; loggers that exist follow."""
    global _level
    _level = LEVELS[level]
    logging.getLogger().setLevel(_level)


class _JournalFormatter(structlog.stdlib.ProcessorFormatter):
    """The journal takes `<N>` off each line and makes it the entry's priority."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{next(priority for level, priority in _PRIORITIES if record.levelno >= level)}>"
        return prefix + super().format(record).replace("\n", f"\n{prefix}")


def _is_journal(out: IO[str]) -> bool:
    """$JOURNAL_STREAM names the journal's stream by device and inode; `out` may have been sent elsewhere."""
    try:
        found = os.fstat(out.fileno())
    except (OSError, ValueError):  # no descriptor, or a closed one
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _below_level(_: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Drop early what is below the level, before anything is formatted."""
    if LEVELS.get("error" if method in ("exception", "critical") else method, logging.INFO) < _level:
        raise structlog.DropEvent
    return event


def _blank(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """No secrets, no prompts, no endless values."""
    for name, value in event.items():
        if name in _BLANKED:
            event[name] = "[not logged]"
        elif isinstance(value, str) and len(value) > VALUE_CHARS_MAX:
            event[name] = value[:VALUE_CHARS_MAX] + " [cut]"
    return event
