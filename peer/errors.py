"""Every error that a caller may see, as one tree; each knows its HTTP status and machine code.

    BitinglipError                        500 internal_error
    +-- BadRequest                        400 invalid_request     names the field
    +-- Unauthorized                      401 unauthorized
    +-- NotFound                          404 not_found           with the nearest names
    +-- MethodNotAllowed                  405 method_not_allowed
    +-- Conflict                          409 conflict
    +-- TooLarge                          413 too_large
    +-- UnsupportedMediaType              415 unsupported_media_type
    +-- RateLimited                       429 rate_limited        with Retry-After
    +-- Overloaded                        503 overloaded          with Retry-After
    +-- Unavailable                       503 unavailable         with Retry-After: no leader, stopping, ...
    +-- StoreError                        503, never retried by the peer
        +-- Fenced                        another epoch leads: step down
        +-- Ambiguous                     a time-out: neither done nor failed
        +-- Compacted                     the watched revision is gone: read anew
        +-- StoreBroken                   fsync or disk error: the peer stops

Any other exception is a bug: it is answered as 500 without its text, and logged with its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BitinglipError(Exception):
    status = 500
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        details: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.details = dict(details or {})
        self.retry_after_s = retry_after_s


class BadRequest(BitinglipError):
    status = 400
    code = "invalid_request"


class Unauthorized(BitinglipError):
    status = 401
    code = "unauthorized"


class NotFound(BitinglipError):
    status = 404
    code = "not_found"


class MethodNotAllowed(BitinglipError):
    status = 405
    code = "method_not_allowed"


class Conflict(BitinglipError):
    status = 409
    code = "conflict"


class TooLarge(BitinglipError):
    status = 413
    code = "too_large"


class UnsupportedMediaType(BitinglipError):
    status = 415
    code = "unsupported_media_type"


class RateLimited(BitinglipError):
    status = 429
    code = "rate_limited"


class Overloaded(BitinglipError):
    status = 503
    code = "overloaded"


class Unavailable(BitinglipError):
    status = 503
    code = "unavailable"


class StoreError(BitinglipError):
    status = 503
    code = "store_error"


class Fenced(StoreError):
    code = "fenced"


class Ambiguous(StoreError):
    code = "ambiguous"


class Compacted(StoreError):
    code = "compacted"


class StoreBroken(StoreError):
    code = "store_broken"


class ConfigError(Exception):
    """A configuration that cannot be used; the text names file, line, key and the nearest right one."""
