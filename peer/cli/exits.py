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
from enum import IntEnum
from typing import IO, Any

import click


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
