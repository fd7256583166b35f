"""What a check of the doctor finds."""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """`advice` says what to do; empty where there is nothing to do."""

    name: str
    status: Status
    message: str
    advice: str = ""


def ok(name: str, message: str) -> Finding:
    return Finding(name, "ok", message)


def warn(name: str, message: str, advice: str) -> Finding:
    return Finding(name, "warn", message, advice)


def fail(name: str, message: str, advice: str) -> Finding:
    return Finding(name, "fail", message, advice)
