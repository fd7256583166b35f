"""API keys: hashed, owned, scoped, expiring, revocable."""

from __future__ import annotations

import hashlib
import hmac
from typing import Literal, get_args

from peer.state.base import Record

Scope = Literal["read", "submit", "operate", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)
PREFIX = "blk"
RateLimit = int | Literal["default"] | None  # "default": as the configuration says; None: no limit


class ApiKey(Record, frozen=True):
    """What is stored of a key. The secret itself is 256 random bits, so one SHA-256 is a sound hash of it."""

    key_id: str
    owner: str
    scopes: tuple[str, ...]
    secret_sha256: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    requests_per_hour: RateLimit = "default"
    requests_per_minute: RateLimit = "default"

    def allows(self, scope: str) -> bool:
        """`admin` includes every scope, `operate` and `submit` include `read`."""
        have = set(self.scopes)
        if "admin" in have or scope in have:
            return True
        return scope == "read" and bool(have & {"submit", "operate"})


def token(key_id: str, secret: str) -> str:
    """What the client sends as its bearer token."""
    return f"{PREFIX}_{key_id}_{secret}"


def split(token_text: str) -> tuple[str, str] | None:
    """(key_id, secret) of a well-formed token, else None."""
    parts = token_text.split("_", 2)
    if len(parts) != 3 or parts[0] != PREFIX or not parts[1] or not parts[2]:
        return None
    return parts[1], parts[2]


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(key: ApiKey, secret: str) -> bool:
    """Constant-time comparison of the secret with the stored hash."""
    return hmac.compare_digest(digest(secret), key.secret_sha256)
