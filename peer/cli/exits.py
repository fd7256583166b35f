"""What the command's exit codes mean, in one place, and the error that carries one.

0    done
1    the task or operation failed, or a check found a fault
2    wrong usage or configuration
3    no peer answers
4    no API key, a wrong one, or one without the scope
5    there is no such task, worker, model or key
6    conflict: it is finished already, does not fit, or the port or data directory is in use
7    overloaded or rate limited: try again later
130  interrupted
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import IO, Any, TypeVar

import click

from peer.errors import BitinglipError, ConfigError, Unavailable

T = TypeVar("T")


class Exit(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    UNAUTHORIZED = 4
    NOT_FOUND = 5
    CONFLICT = 6
    BUSY = 7
    INTERRUPTED = 130


BY_STATUS = {
    400: Exit.USAGE,
    401: Exit.UNAUTHORIZED,
    403: Exit.UNAUTHORIZED,
    404: Exit.NOT_FOUND,
    405: Exit.FAILED,
    409: Exit.CONFLICT,
    413: Exit.USAGE,
    415: Exit.FAILED,
    429: Exit.BUSY,
    503: Exit.BUSY,
}


def foreseen(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The first error of these kinds if there are no others, also inside a nursery's groups; else None: a bug."""
    if not isinstance(error, BaseExceptionGroup):
        return error if isinstance(error, kinds) else None
    found = [foreseen(inner, kinds) for inner in error.exceptions]
    return None if None in found else found[0]


class CliError(click.ClickException):
    """What went wrong, and on a second line what to do about it."""

    def __init__(self, message: str, code: Exit, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        stream = file or sys.stderr
        click.echo(f"bitinglip: {self.message}", file=stream)
        if self.hint:
            click.echo(f"  {self.hint}", file=stream)


def guarded(directory: Path, work: Callable[[], T]) -> T:
    """What `work`, on this folder, returns. Raises CliError with what went wrong, in words."""
    kinds = (BitinglipError, ConfigError, OSError)
    try:
        return work()
    except (*kinds, ExceptionGroup) as error:
        known = foreseen(error, kinds)
        if isinstance(known, Unavailable):
            raise CliError(known.message, Exit.UNREACHABLE) from None
        if isinstance(known, BitinglipError):
            raise CliError(known.message, BY_STATUS.get(known.status, Exit.FAILED)) from None
        if isinstance(known, ConfigError):
            raise CliError(str(known), Exit.USAGE) from None
        if isinstance(known, OSError):
            raise CliError(f"{known.filename or directory}: {known.strerror}", Exit.FAILED) from None
        raise
