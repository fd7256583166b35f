"""Every error as the API answers it: one JSON shape, whatever went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from api import format
from peer.errors import BitinglipError

TYPES: Mapping[int, str] = MappingProxyType(
    {
        400: "bad_request",
        401: "unauthorized",
        404: "not_found",
        405: "method_not_allowed",
        409: "conflict",
        413: "payload_too_large",
        415: "unsupported_media_type",
        429: "too_many_requests",
        500: "internal_server_error",
        503: "service_unavailable",
    }
)
RETRY_AFTER_S_DEFAULT = 1.0


class ErrorInfo(msgspec.Struct, frozen=True):
    """`code` is for programs, `message` for people, `details` names fields, ids or numbers."""

    code: str
    type: str
    message: str
    details: dict[str, Any]
    request_id: str
    timestamp: str


class ErrorBody(msgspec.Struct, frozen=True):
    """`detail` repeats the message."""

    error: ErrorInfo
    detail: str


Headers = list[tuple[bytes, bytes]]
_encode = msgspec.json.Encoder(enc_hook=str).encode


def body(error: BitinglipError, request_id: str, wall: float) -> bytes:
    """The error as JSON."""
    return _encode(
        ErrorBody(
            error=ErrorInfo(
                code=error.code,
                type=TYPES.get(error.status, "internal_server_error"),
                message=error.message,
                details=error.details,
                request_id=request_id,
                timestamp=format.timestamp(wall),
            ),
            detail=error.message,
        )
    )


def headers(error: BitinglipError) -> Headers:
    """What HTTP wants beside the body."""
    if error.status in (429, 503):
        wait_s = error.retry_after_s if error.retry_after_s is not None else RETRY_AFTER_S_DEFAULT
        return [(b"retry-after", b"%d" % max(1, math.ceil(wait_s)))]
    if error.status == 401:
        return [(b"www-authenticate", b'Bearer realm="bitinglip"')]
    if error.status == 405:
        return [(b"allow", str(error.details.get("allow", "")).encode("ascii"))]
    return []


def internal() -> BitinglipError:
    """What a client learns of a bug: where to look for it."""
    return BitinglipError("An internal error occurred; the peer's log has it under this request id")
